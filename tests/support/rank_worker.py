"""What one rank does in the tests of several: `torchrun ... rank_worker.py TASK FOLDER`, or alone, without torchrun.

FOLDER holds checkpoints, one a folder, and `requests.json`. Every rank writes what it computed to
`FOLDER/TASK.RANK.json`, for the test to compare. Nothing is printed here but by the library.
"""

import atexit
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale_state
from fairscale.nn.model_parallel import layers as fairscale_layers

from bench import timed_collectives
from llama import Llama, Transformer, parallel
from llama.formats import meta
from llama.model import FeedForward

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", 0))
Results = dict[str, object]


def build(folder: Path, **options) -> Llama:
    return Llama.build(folder, max_seq_len=48, max_batch_size=4, device="cpu", **options)


def answers(llama: Llama, requests: dict) -> Results:
    """Everything a caller can ask of one model."""
    prompts, texts, dialogs = requests["prompts"], requests["texts"], requests["dialogs"]
    return {
        "greedy": greedy(llama, requests),
        "sampled": llama.generate(prompts, 5, 0.9, 0.95, seed=11),
        "text": llama.text_completion(texts, 0, max_gen_len=4, stop=["e"]),
        "chat": llama.chat_completion(dialogs, 0, max_gen_len=4, logprobs=True),
        "score": llama.score(texts),
        "stepped": llama.model(torch.tensor([prompts[0]]), 0).tolist(),
    }


def greedy(llama: Llama, requests: dict) -> object:
    return llama.generate(requests["prompts"], 5, 0, logprobs=True, echo=True)


def all_answers(folder: Path, requests: dict) -> Results:
    """Of one checkpoint of each model everything, of the others, cut into other numbers of files, the greedy ids."""
    found = {}
    for name, everything in requests["checkpoints"].items():
        llama = build(folder / name)
        found[name] = answers(llama, requests) if everything else {"greedy": greedy(llama, requests)}
    return found


def held_bytes(model: torch.nn.Module) -> list[int]:
    """Bytes of this rank's weights and cache."""
    return [
        sum(weight.nbytes for weight in model.parameters()),
        model.cache.k.nbytes + model.cache.v.nbytes,
    ]


def disagreeing(llama: Llama, requests: dict) -> Results:
    """Ranks that are given other prompts, more or fewer, other options and other seeds."""
    prompts, texts, dialogs = requests["prompts"], requests["texts"], requests["dialogs"]
    if RANK:
        prompts, texts, dialogs = prompts[:RANK], texts[1:], dialogs[:1]
    return {
        "sampled": llama.generate(prompts, 5, 0.9, 0.95, seed=11 + RANK),
        "unseeded": llama.generate(prompts, 5 - RANK, 0.9, 0.95),
        "text": llama.text_completion(texts, 0.5 * RANK, max_gen_len=4, stop=["e", "a"][: RANK + 1]),
        "chat": llama.chat_completion(dialogs, 0, max_gen_len=4 + RANK, logprobs=True),
        "score": llama.score(texts),
    }


def contradicted(llama: Llama, requests: dict) -> Results:
    """Ids where every rank but the first finds the least likely token the likeliest."""
    prompts = requests["prompts"]
    if RANK:
        llama.model.output.register_forward_hook(lambda layer, inputs, logits: -logits)
    streamed = [(piece.row, piece.ids) for piece in llama.stream(prompts, 5, 0)]
    return {
        "greedy": llama.generate(prompts, 5, 0, echo=True)[0],
        "sampled": llama.generate(prompts, 5, 0.9, 0.95, seed=11)[0],
        "streamed": [[id for row, ids in streamed if row == index for id in ids] for index in range(len(prompts))],
    }


def collectives_a_token(llama: Llama, prompts: list[list[int]]) -> Results:
    """Calls that four more tokens of the answers take, for each of them."""
    counts = []
    for length in (2, 6):
        with timed_collectives() as spent:
            ids, _ = llama.generate(prompts, length, 0)
        assert max(map(len, ids)) == length, "every answer ended early"
        counts.append({kind: len(calls) for kind, calls in spent.items()})
    return {kind: (counts[1][kind] - counts[0][kind]) / 4 for kind in spent}


def gradients(model: Transformer, tokens: list[list[int]]) -> Results:
    """The loss of predicting each next token, and its gradient in each of this rank's weights."""
    model.requires_grad_(True)
    ids = torch.tensor(tokens)
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    found = {name: weight.grad.tolist() for name, weight in model.named_parameters()}
    return {"loss": loss.item(), "weights": found}


def gradients_of_an_input() -> Results:
    """Of a feed-forward layer whose products are large enough for the way that MKL prefers."""
    generator = torch.Generator().manual_seed(3)
    layer, hidden = FeedForward(512, 1024), 1024 // parallel.size()
    for linear, dim in ((layer.w1, 0), (layer.w2, 1), (layer.w3, 0)):
        whole = torch.randn(1024, 512, generator=generator).mul(0.05)
        whole = whole if dim == 0 else whole.T
        linear.weight.data = whole.narrow(dim, parallel.rank() * hidden, hidden).contiguous()
    found = {}
    for rows in (1, 24, 40):
        x = torch.randn(1, rows, 512, generator=generator).requires_grad_()
        layer(x).square().mean().backward()
        found[rows] = x.grad.flatten().tolist()
    return found


def gradients_of_copies() -> Results:
    """Of a matrix that neighbouring ranks hold whole, each with its own use for the output."""
    generator, copies = torch.Generator().manual_seed(4), parallel.size()
    weight, x = (
        torch.randn(6, 8, generator=generator),
        torch.randn(5, 8, generator=generator).requires_grad_(),
    )
    uses = torch.randn(2, 5, 6, generator=generator)
    layer = parallel.ColumnParallelLinear(8, 6 * copies, copies=copies)
    layer.weight.data = weight
    mine = uses.chunk(copies)[parallel.rank()]
    (layer(x) * mine).sum().backward()
    return {"weight": layer.weight.grad.tolist(), "input": x.grad.tolist()}


def layers_equal() -> Results:
    """Whether our layers compute fairscale's numbers, bit for bit, from the same weights, with autograd and without."""
    with torch.no_grad():
        without = layers_equal_once()
    return {name: equal and without[name] for name, equal in layers_equal_once().items()}


def layers_equal_once() -> Results:
    torch.manual_seed(RANK)
    ids, x = (
        torch.tensor([[0, 5, 6], [3, 3, 1]]),
        torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5)),
    )
    share = parallel.ColumnParallelLinear(16, 16)(x).detach()
    plain = {"bias": False, "init_method": torch.nn.init.ones_}
    pairs = {
        "column": (
            parallel.ColumnParallelLinear(16, 24),
            lambda **kw: ColumnOf(16, 24, gather_output=False, **kw),
            x,
        ),
        "gathered": (
            parallel.ColumnParallelLinear(16, 24, True),
            lambda **kw: ColumnOf(16, 24, **kw),
            x,
        ),
        "row": (
            parallel.RowParallelLinear(16, 40),
            lambda **kw: fairscale_layers.RowParallelLinear(16, 40, input_is_parallel=True, **kw),
            share,
        ),
        "embedding": (
            parallel.ParallelEmbedding(7, 16),
            lambda bias, **kw: EmbeddingOf(7, 16, **kw),
            ids,
        ),
    }
    equal = {}
    for name, (ours, make, inputs) in pairs.items():
        theirs = make(**plain)
        theirs.load_state_dict(ours.state_dict())
        found, expected = ours(inputs), theirs(inputs)
        equal[name] = torch.equal(found, expected) and bool(found.abs().sum() > 0)
    return equal


ColumnOf, EmbeddingOf = fairscale_layers.ColumnParallelLinear, fairscale_layers.ParallelEmbedding


@contextlib.contextmanager
def model_parallel(ranks: int):
    """fairscale's groups for a moment; the process group stays."""
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_state.initialize_model_parallel(ranks)
    yield
    fairscale_state.destroy_model_parallel()


def watch_exit(results: Results, write: Callable[[], None]) -> None:
    """Note at the very end whether there is still a process group: handlers run last in, first out."""

    def note() -> None:
        results["group at exit"] = dist.is_initialized()
        write()
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(note)


def alone(folder: Path, requests: dict, results: Results) -> None:
    """One process: no group, whatever `torchrun` says; then fairscale's layers in a group of one, made here."""
    results |= {
        "answers": all_answers(folder, requests),
        "group": dist.is_initialized(),
        "group of": parallel.group(),
    }
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with model_parallel(1):
        results["layers"] = layers_equal()
    dist.destroy_process_group()


def pair(folder: Path, requests: dict, results: Results) -> None:
    """Two processes, first each for itself, then sharing models over a group that the library makes."""
    results["apart"] = answers(build(folder / "gqa2", model_parallel_size=1), requests)
    results["group apart"] = dist.is_initialized()
    results["group of, apart"] = parallel.group()
    results["answers"] = all_answers(folder, requests)
    results["disagreeing"] = disagreeing(build(folder / "gqa2", seed=1 + RANK), requests)
    results["contradicted"] = contradicted(build(folder / "gqa2"), requests)
    results["held"] = {name: held_bytes(build(folder / name).model) for name in requests["checkpoints"]}
    names = [name for name, everything in requests["checkpoints"].items() if everything]
    results["collectives"] = {n: collectives_a_token(build(folder / n), requests["prompts"]) for n in names}
    results["layers"] = layers_equal()
    results["gradients"] = {n: gradients(build(folder / n).model, requests["tokens"]) for n in requests["gradients"]}
    results["input gradients"] = gradients_of_an_input()
    results["group of"] = parallel.group()
    results["copies"] = gradients_of_copies()
    results["size"] = [parallel.rank(), parallel.size()]
    try:
        build(folder / "gqa2", model_parallel_size=1)
    except ValueError as error:
        results["another size"] = str(error)


def four(folder: Path, requests: dict, results: Results) -> None:
    """Four processes in a group that exists already: all share a model, then two groups of two, then each its own."""
    dist.init_process_group("gloo")
    results["answers"] = all_answers(folder, requests)
    results["disagreeing"] = disagreeing(build(folder / "gqa2", seed=1 + RANK), requests)
    results["contradicted"] = contradicted(build(folder / "gqa2"), requests)
    results["layers"] = layers_equal()
    results["group of"] = parallel.group()
    fairscale_state.destroy_model_parallel()
    llama = build(folder / "gqa2", model_parallel_size=2)
    results["pair of"] = [parallel.rank(), parallel.size()]
    results["group of, in pairs"] = parallel.group()
    results["pairs unseeded"] = [llama.generate(requests["prompts"], 5, 0.9, 0.95) for _ in range(2)]
    results["halves"] = llama.generate(requests["prompts"][RANK // 2 :][:2], 6 + RANK // 2, 0.9, 0.95, seed=RANK)
    fairscale_state.destroy_model_parallel()
    results["apart"] = answers(build(folder / "gqa2", model_parallel_size=1), requests)
    results["group of, apart"] = parallel.group()
    dist.barrier()


def fail_in_build(folder: Path, requests: dict, results: Results) -> None:
    if RANK == 1:

        def unreadable(path: Path) -> None:
            raise OSError("the second disk is gone")

        meta.open_pickle = unreadable
    build(folder / "mha8").generate(requests["prompts"], 30, 0)


def fail_in_generate(folder: Path, requests: dict, results: Results) -> None:
    llama = build(folder / "mha8")
    for count, piece in enumerate(llama.stream(requests["prompts"], 30, 0)):
        if RANK == 1 and count == 5:
            raise RuntimeError("the second rank is tired")
        results[str(count)] = piece.ids


def fail_everywhere(folder: Path, requests: dict, results: Results) -> None:
    build(folder / requests["bad"])


def quantized(folder: Path, requests: dict, results: Results) -> None:
    """Logits of several rows, and of one, of each checkpoint as it is to be quantized."""
    for name, options in requests["quantized"].items():
        model = build(folder / name, **options).model
        results[name] = [model(torch.tensor(tokens), 0).tolist() for tokens in requests["tokens"]]


TASKS = (alone, pair, four, fail_in_build, fail_in_generate, fail_everywhere, quantized)


def main(task: str, folder: Path) -> None:
    results: Results = {}
    path = folder / f"{task}.{RANK}.json"
    watch_exit(results, lambda: path.write_text(json.dumps(results)))
    {task.__name__: task for task in TASKS}[task](folder, json.loads((folder / "requests.json").read_text()), results)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
