r"""How fast this machine runs a model, beside what the machine could do and, if asked, beside other libraries.

    python bench.py                                  # the demo checkpoint
    python bench.py --shape 110m --dtype float32 --peers
    python bench.py --shape 1.1b --formats plain,int8,int4 --ragged
    python bench.py --shape 15m --against ../before  # this checkout beside another one, each in its own process
    python bench.py --shape 110m --queue 64 --peers  # more prompts than rows
    torchrun --standalone --nproc_per_node 2 bench.py --shape 15m

Decoding reads every weight once for each token, so memory bandwidth bounds it; a prompt is bound by matrix products.
Both limits are measured in the same run, and each figure stands beside its share of the limit. Every engine runs each
case once before the clock starts; then engines take turns, and every figure is the median of its turns, with the least
and the most beside it. The last line printed is the whole result as JSON.

This library is measured through its public calls, as its callers have it: the first token is that of a stream, after
prefill and choice; a step is what passes until every row of the stream has one more token, chosen, checked, read and
given out as text. Peers are stepped by hand and only choose. Every step is waited for, so what a GPU gains where steps
are queued does not show, and llama.cpp's batches are filled within the clock, about a microsecond a token. Ranks that
share a model also count the collectives of a step, and the share of it that they take.

`--queue` measures something else, which `benchmarks/queued.py` explains. The other engines, and how to install them,
are in `benchmarks/peers.py`.
"""

import contextlib
import functools
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date

import torch
import torch.distributed as dist

from benchmarks import queued
from benchmarks.clock import Clocked, seconds, spread
from benchmarks.ours import EOS, Elsewhere, Ours, make_model
from benchmarks.peers import TransformersQueue, check_peers, peer_engines
from llama import Transformer, cli, kernels, parallel
from llama.device import dtype_name

COLLECTIVES = ("all_reduce", "all_gather", "broadcast")
FORMATS = ("plain", "compiled", *kernels.FORMATS)
RAGGED = (8, 64, 256, 512)  # tokens of each prompt
COLUMNS = (
    "engine", "rows", "prompt", "first token, ms", "prefill, tokens/s", "of matrix", "prefill memory, MB",
    "decode, tokens/s", "of read",
)  # fmt: skip


def main(
    shape: str = "demo",
    ckpt_dir: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    prompts: tuple[int, ...] = (32, 512, 2048),
    batches: tuple[int, ...] = (1, 4, 16),
    steps: int = 32,
    turns: int = 5,
    formats: tuple[str, ...] = ("plain",),
    ragged: bool = False,
    layers: int | None = None,
    peers: bool = False,
    against: str | None = None,
    queue: int = 0,
):
    """Print one table and one JSON line.

    Args:
        shape: demo (the checkpoint in demo/), or random weights of 15m, 110m, 1.1b or 7b.
        ckpt_dir: measure this checkpoint instead.
        dtype: float32, bfloat16 or float16; what the device computes natively if not given.
        device: cuda, mps or cpu; the best of them if not given.
        prompts: prompt lengths in tokens.
        batches: rows decoded at once, with the prompt length that is nearest to 512.
        steps: tokens decoded in a turn.
        turns: how often each engine takes its turn; publish no figure of fewer than five.
        formats: any of plain, compiled, int8 and int4, one engine each, over the same weights.
        ragged: also a batch of prompts of 8, 64, 256 and 512 tokens.
        layers: so many layers only, for figures that do not depend on their number.
        peers: also run transformers' LlamaForCausalLM (static cache, sdpa) and, on a CPU, llama.cpp; same weights.
        against: also run another checkout of this library, the folder of which this is; same weights.
        queue: instead, so many prompts (64 for figures to keep) that wait for 8 rows, at random weights of the shape.
    """
    plan = Plan(
        prompts=several(prompts),
        batches=several(batches),
        steps=steps,
        turns=turns,
        formats=several(formats),
        ragged=ragged,
        peers=peers,
        against=against,
        queue=queue,
    )
    plan.check()
    if queue and ckpt_dir:
        raise ValueError("--queue plants how long its answers are in random weights; give --shape, not --ckpt_dir.")

    where = {"shape": shape, "device": device, "dtype": dtype, "layers": layers}
    if queue:
        run_queue(where, plan)
    else:
        run_cases(where | {"ckpt_dir": ckpt_dir}, plan)


def several(values: object) -> tuple:
    """What a flag lists: fire reads one value as itself."""
    return tuple(values) if isinstance(values, tuple | list) else (values,)


@dataclass
class Plan:
    """The flags that say what is measured of a model."""

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    turns: int
    formats: tuple[str, ...]
    ragged: bool
    peers: bool
    against: str | None
    queue: int

    def check(self) -> None:
        """Raise `ValueError` for the first flag out of its range, or that does not go with how bench.py was started."""
        for name in ("prompts", "batches", "steps", "turns", "queue"):
            numbers = several(getattr(self, name))
            if name == "queue" and numbers == (0,):
                continue
            if not all(isinstance(number, int) and number > 0 for number in numbers):
                raise ValueError(f"{name} is {','.join(map(str, numbers))}; it must be positive integers.")
        if not set(self.formats) <= set(FORMATS):
            raise ValueError(f"formats is {','.join(map(str, self.formats))}; it must be some of {', '.join(FORMATS)}.")

        if self.peers:
            check_peers()
        if (self.against or self.queue) and parallel.world()[1] > 1:
            raise ValueError("--against and --queue run in one process; start bench.py without torchrun.")

    def cases(self) -> list[tuple[int, ...]]:
        """The prompt lengths of each case: every length with one row, every batch at the length nearest to 512."""
        middle = min(self.prompts, key=lambda length: abs(length - 512))
        alone = [(length,) for length in self.prompts]
        batches = [(middle,) * rows for rows in self.batches if rows > 1]
        return alone + batches + [RAGGED] * self.ragged


def run_cases(where: dict, plan: Plan) -> None:
    """Measure prefill and decode of every engine at every case, and print them."""
    cases = plan.cases()
    longest = max(map(max, cases)) + plan.steps + 1
    model = make_model(**where, longest=longest, most=max(map(len, cases)))
    if any(isinstance(module, kernels.Quantized) for module in model.modules()):
        raise ValueError(f"{where['ckpt_dir']} is quantized; give the original, with --formats int8,int4.")
    model.own_cache().clear()  # writes to every page: what a prefill needs does not include them

    engines = {f"llama {name}".removesuffix(" plain"): Ours(model, name) for name in plan.formats}
    with other_checkout(plan.against, where, model) as other:
        if other is not None:
            engines[f"llama of {other.folder.name}"] = other
        if plan.peers:
            engines |= peer_engines(model, plan.steps)

        before = machine_limits(model)
        fresh = fresh_ids(model.vocab_size)
        results = []
        for case in cases:
            results += measure(engines, model, case, plan, fresh)
        after = machine_limits(model)

    if parallel.world()[0] == 0:
        limits = {name: max(value, after[name]) for name, value in before.items()}
        name = where["ckpt_dir"] or where["shape"]
        last = summary(model, engines.values(), name) | {"limits": limits, "results": results}
        print_machine(model, last["versions"])
        print_table(results, limits)
        print(json.dumps(last))


def run_queue(where: dict, plan: Plan) -> None:
    """Measure what answers a queue, and a step of one row, and print them."""
    where = where | {"longest": queued.CONTEXT, "most": queued.ROWS, "counting": True}
    model = make_model(**where)
    ours = Ours(model, eos_id=EOS)
    peer = TransformersQueue(model, queued.ROWS, EOS) if plan.peers else None
    with other_checkout(plan.against, where, model, EOS) as other:
        ways = queued.queue_ways(ours, other, peer)
        queue = queued.measure_queue(ways, plan.queue, model.vocab_size, plan.turns)
        one_of = queued.measure_one_of(ours, other, model, plan.steps, plan.turns)

    last = summary(model, (other, peer), where["shape"]) | {"queue": queue, "one_of": one_of}
    print_machine(model, last["versions"])
    queued.print_queue(queue, one_of, plan.queue)
    print(json.dumps(last))


@contextlib.contextmanager
def other_checkout(folder: str | None, where: dict, model: Transformer, eos_id: int = -1) -> Iterator[Elsewhere | None]:
    """The library of another checkout over the same model, in its own process for as long as this lasts."""
    if folder is None:
        yield None
        return

    args = model.params
    weight = model.norm.weight
    same = {"longest": args.max_seq_len, "most": args.max_batch_size}
    same |= {"device": str(weight.device), "dtype": dtype_name(weight.dtype)}
    other = Elsewhere(folder, where | same, eos_id)
    try:
        yield other
    finally:
        other.close()


# --- measuring ---------------------------------------------------------------------------------------------------


def machine_limits(model: Transformer) -> dict[str, float]:
    """Bytes a second of the fastest of several reads of 2 GiB, operations a second of the best of ten products."""
    weight = model.norm.weight
    device = weight.device
    size = 2**31 if device.type != "cpu" or parallel.size() == 1 else 2**29
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    matrix = buffer.view(-1, 8192)
    ones = torch.ones(8192, device=device)
    reads = (buffer.sum, buffer.max, lambda: matrix @ ones)
    read = min(seconds(work, device) for work in reads for _ in range(3))

    a = torch.randn(2048, 2048, device=device).to(weight.dtype)
    b = torch.randn(2048, 2048, device=device).to(weight.dtype)
    a @ b
    product = min(seconds(lambda: a @ b, device) for _ in range(10))
    return {"read": size / read, "matrix": 2 * 2048**3 / product}


def fresh_ids(vocab_size: int) -> Iterator[int]:
    """First ids of which each is taken once in a long while, so that no cache knows how a prompt begins."""
    return itertools.cycle(range(3, vocab_size))


def measure(
    engines: dict[str, Clocked], model: Transformer, lengths: tuple[int, ...], plan: Plan, fresh: Iterator[int]
) -> list[dict]:
    """The median time of a prefill and of a step for each engine, taking turns; the first turn only warms up."""
    rng = random.Random(0)
    rest = [[rng.randrange(3, model.vocab_size) for _ in range(length - 1)] for length in lengths]

    def prompts() -> list[list[int]]:
        return [[next(fresh), *ids] for ids in rest]

    # Every engine in its turn.
    prefill = {name: [] for name in engines}
    decode = {name: [] for name in engines}
    peaks = {name: engine.peak(prompts()) for name, engine in engines.items()}
    for turn in range(plan.turns + 1):
        for name, engine in engines.items():
            first, step = engine.turn(prompts(), plan.steps)
            if turn:
                prefill[name].append(first)
                decode[name].append(step)

    # Medians, and what they are held against.
    results = []
    for name, engine in engines.items():
        result = {
            "engine": name,
            "prompts": lengths,
            "first_token_s": statistics.median(prefill[name]),
            "first_token_s_spread": spread(prefill[name]),
            "step_s": statistics.median(decode[name]),
            "step_s_spread": spread(decode[name]),
            "prefill_bytes": peaks[name],
        }
        result |= work_of(engine, model, lengths)
        if counts_collectives(name, engine):
            result["collectives"] = collectives_of(engine, prompts(), plan.steps)
        results.append(result)
    return results


def work_of(engine: Clocked, model: Transformer, lengths: tuple[int, ...]) -> dict[str, float]:
    """Operations of a prefill and bytes of a step at these lengths, of this rank: what any engine has to do."""
    args = model.params
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    pairs = sum(length * (length + 1) / 2 for length in lengths)  # of a query and a key it sees
    attention = 4 * args.n_layers * pairs * args.dim / parallel.size()
    output = 2 * model.output.weight.numel() * len(lengths)
    operations = 2 * matrices * sum(lengths) + output + attention

    kv_heads = max(args.kv_heads // parallel.size(), 1)
    cache = 2 * args.n_layers * kv_heads * args.head_dim * sum(lengths)
    return {"operations": operations, "bytes": engine.weight_bytes + cache * engine.cache_itemsize}


def counts_collectives(name: str, engine: Clocked) -> bool:
    """Not with one rank, nor for a compiled step, which holds its collectives itself, nor on a GPU, where a call
    returns before its work is done."""
    if parallel.size() == 1 or name.endswith("compiled"):
        return False
    return engine.device.type == "cpu"


def collectives_of(engine: Clocked, prompts: list[list[int]], steps: int) -> dict[str, float]:
    """Calls a token of each collective and the share of a step inside them, in steps of their own after the timed.

    Waiting for a slower rank counts.
    """
    engine.prefill(prompts)
    with timed_collectives() as spent:
        whole = sum(seconds(engine.step, engine.device) for _ in range(steps))
    engine.end()

    found = {kind: len(times) / steps for kind, times in spent.items()}
    found["share"] = sum(map(sum, spent.values())) / whole
    return found


@contextlib.contextmanager
def timed_collectives() -> Iterator[dict[str, list[float]]]:
    """The seconds of each call of torch's collectives, by kind, for as long as this lasts."""
    plain = {kind: getattr(dist, kind) for kind in COLLECTIVES}
    spent = {kind: [] for kind in COLLECTIVES}

    def timed(kind: str, *args, **options) -> object:
        started = time.perf_counter()
        result = plain[kind](*args, **options)
        spent[kind].append(time.perf_counter() - started)
        return result

    try:
        for kind in plain:
            setattr(dist, kind, functools.partial(timed, kind))
        yield spent
    finally:
        for kind, collective in plain.items():
            setattr(dist, kind, collective)


# --- printing ----------------------------------------------------------------------------------------------------


def print_machine(model: Transformer, about: dict[str, str]) -> None:
    args = model.params
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads x {parallel.size()} ranks, "
        f"{model.norm.weight.device}, {dtype_name(model.norm.weight.dtype)}, "
        f"dim {args.dim}, {args.n_layers} layers, vocabulary {args.vocab_size}"
    )
    print(", ".join(f"{name} {version}" for name, version in about.items()))


def print_table(results: list[dict], limits: dict[str, float]) -> None:
    print(f"limits: read {limits['read'] / 1e9:.1f} GB/s, matrix {limits['matrix'] / 1e12:.3f} TFLOP/s\n")
    shared = any("collectives" in result for result in results)
    columns = (*COLUMNS, "of step in collectives") if shared else COLUMNS
    print(f"| {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * (len(columns) - 1)}")
    for result in results:
        row = cells(result, limits)
        if shared:
            row.append(collectives_cell(**result.get("collectives", {})))
        print(f"| {' | '.join(row)} |")
    print()


def cells(result: dict, limits: dict[str, float]) -> list[str]:
    """The columns of one result; times and rates with the least and the most of the turns."""
    lengths = result["prompts"]
    first = result["first_token_s"]
    step = result["step_s"]
    soonest, latest = (1e3 * value for value in result["first_token_s_spread"])
    fastest, slowest = (len(lengths) / value for value in result["step_s_spread"])
    memory = result["prefill_bytes"]
    return [
        result["engine"],
        f"{len(lengths)}",
        "/".join(map(str, dict.fromkeys(lengths))),
        f"{first * 1e3:.1f} ({soonest:.1f}..{latest:.1f})",
        f"{sum(lengths) / first:,.0f}",
        f"{result['operations'] / first / limits['matrix']:.0%}",
        "" if memory is None else f"{memory / 1e6:,.0f}",
        f"{len(lengths) / step:,.1f} ({slowest:,.1f}..{fastest:,.1f})",
        f"{result['bytes'] / step / limits['read']:.0%}",
    ]


def collectives_cell(share: float | None = None, **calls: float) -> str:
    if share is None:
        return ""
    return f"{share:.0%}: {', '.join(f'{count:g} {kind}' for kind, count in calls.items())}"


def summary(model: Transformer, engines: Iterable, name: str) -> dict:
    """What the last line says of the run itself."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for engine in engines:
        versions |= getattr(engine, "version", {})
    weight = model.norm.weight
    return {
        "date": date.today().isoformat(),
        "model": str(name),
        "device": str(weight.device),
        "dtype": dtype_name(weight.dtype),
        "ranks": parallel.size(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


if __name__ == "__main__":
    cli.run(main)
