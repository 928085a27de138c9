"""Train the demo model: corpus, tokenizer, weights and checklist, from nothing, on a CPU.

    python -m demo.train                 # 2 1/2 hours on two cores; Ctrl-C and start again: it goes on where it was

The corpus is what `Corpus.build` takes from `demo.corpus`, no more and no less. Sequences are not packed: in the chat
encoding every exchange begins with BOS, so a neighbour in the same row could not be told from the dialog's own past.
Rows of about the same length form a batch instead, padded at their end, where causal attention never looks.

The optimizer is Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the layers, AdamW
for embedding, output and norms.
"""

from __future__ import annotations

import argparse
import array
import hashlib
import itertools
import json
import os
import random
import re
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import sentencepiece
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from demo.corpus import Sample, drills, owners, practice, samples
from llama.model import ModelArgs, Transformer
from llama.prompts import E_INST, format_dialog
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).parent
RUN = DEMO / "run"  # caches and snapshots; not part of the repository

SAMPLES, DRILLS, MORE, PRACTICE, OWNERS = 190_000, 100_000, 30_000, 40_000, 40_000
VOCABULARY = 2560
PARAMS = {
    "dim": 256,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": VOCABULARY,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.75,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
TRAINED_LENGTH = 768  # longest sequence, in tokens
BATCH = 6144  # tokens in a batch, padding included
MUON_RATE, ADAM_RATE = 0.012, 3e-3
QUESTION_STRIDE = 10  # of what the user says, every tenth token is learned; of answers and stories, all
LANGUAGE_STEPS = 300  # in which all learned tokens weigh alike; afterwards an answer's token weighs most:
STORY_WEIGHT, QUESTION_WEIGHT = 0.3, 0.2
SCHEDULE = {  # steps in which two batches of three are of that part of the corpus; see `schedule`
    "drill": range(1400, 3750),
    "reread": range(4150, 4550),
    "practice": range(4550, 5550),
    "owners": range(5550, 6250),
}
LEGS = (4550, 5550, 6350)  # the steps at which the learning rate has fallen to zero
REREAD_LENGTH = 160  # of the longest dialog then read again, in tokens

PARTS = ("everything", *SCHEDULE)  # of the corpus

# ---------------------------------------------------------------------------------------------------------------------
# Text to ids


def train_tokenizer(path: Path) -> None:
    """A byte-fallback BPE tokenizer with Llama's special ids, from the beginning of the training corpus."""
    texts = (lesson for sample in samples("train", 40_000) for text in texts_of(sample) for lesson in lessons(text))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        max_sentence_length=65536,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.9995,
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


def lessons(text: str) -> Iterator[str]:
    """The text as the tokenizer's trainer reads it, which decides what can become one piece.

    A line break is hidden behind a mark, so that it stays a byte token, as in Llama's own tokenizer. Digits stand
    apart from signs: "15" is one piece, whatever follows it. Capital letters come often enough to be whole words.
    """
    text = re.sub(r"(?<=\d)(?=[^\d\s])|(?<=[^\d\s])(?=\d)", " ", text.replace("\n", '"'))
    yield text
    if hashlib.sha256(text.encode()).digest()[0] < 48:
        yield text.upper()


def texts_of(sample: Sample) -> list[str]:
    """What is encoded, each between BOS and EOS: the text, or every exchange of the dialog, finished."""
    if not sample.messages:
        return [sample.text]
    *finished, _ = format_dialog([*sample.messages, {"role": "user", "content": "?"}])
    return finished


def encode(tokenizer: Tokenizer, sample: Sample) -> tuple[list[int], bytes]:
    """The sample's ids, and for each whether its loss counts in full (1) or it is given (0), by the user or a text."""
    ids, counts = [], b""
    for text in texts_of(sample):
        whole = tokenizer.encode(text, bos=True, eos=True)
        question = 1
        if sample.given:
            question = len(tokenizer.encode(text[: sample.given], bos=True, eos=False))
        elif sample.messages:
            prompt = tokenizer.encode(text[: text.rindex(E_INST) + len(E_INST)], bos=True, eos=False)
            if whole[: len(prompt)] != prompt:
                raise RuntimeError(f"The prompt is no prefix of its exchange: {text!r}")
            question = len(prompt)
        ids += whole
        counts += bytes(question) + b"\1" * (len(whole) - question)
    return ids, counts


class Corpus:
    """All training sequences in one array of ids, with the offset of each."""

    def __init__(self, tokenizer: Tokenizer, cache: Path):
        if not cache.exists():
            self.build(tokenizer, cache)
        self.cache = cache
        stored = torch.load(cache, weights_only=True)
        self.ids, self.counts, self.offsets = stored["ids"], stored["counts"], stored["offsets"].tolist()
        self.part = stored["part"].tolist()

    @staticmethod
    def build(tokenizer: Tokenizer, cache: Path) -> None:
        ids, counts, offsets, part = array.array("h"), bytearray(), array.array("q", [0]), bytearray()
        for sample in itertools.chain(
            samples("train", SAMPLES), drills(DRILLS), reread(), practice(PRACTICE), owners(OWNERS)
        ):
            sequence, weights = encode(tokenizer, sample)
            if len(sequence) <= (REREAD_LENGTH if sample.kind == "reread" else TRAINED_LENGTH):
                ids.extend(sequence)
                counts += weights
                offsets.append(len(ids))
                part.append(PARTS.index(sample.kind) if sample.kind in PARTS else 0)
        stored = {
            "ids": torch.frombuffer(ids, dtype=torch.int16),
            "counts": torch.frombuffer(counts, dtype=torch.uint8),
            "offsets": torch.frombuffer(offsets, dtype=torch.int64),
            "part": torch.frombuffer(part, dtype=torch.uint8),
        }
        torch.save(stored, cache)

    def batch(self, rows: list[int], language: bool) -> tuple[Tensor, Tensor]:
        """Ids (B, T) of these sequences, padded with EOS, and the weight of each token in the loss (B, T).

        While `language` is learned, the weight is 0 or 1. What can be known of a story or a question is little, so the
        weights of these fall afterwards, lest their noise hide what the answers teach.
        """
        length = max(self.offsets[row + 1] - self.offsets[row] for row in rows)
        length = -(-length // 16) * 16 + 1
        ids, weights = torch.full((len(rows), length), 2), torch.zeros(len(rows), length)
        for i, row in enumerate(rows):
            start, end = self.offsets[row], self.offsets[row + 1]
            counts = self.counts[start:end]
            story = int(counts.sum()) == end - start - 1  # all but BOS
            ids[i, : end - start] = self.ids[start:end]
            weights[i, row % QUESTION_STRIDE : end - start : QUESTION_STRIDE] = 1.0 if language else QUESTION_WEIGHT
            weights[i, : end - start][counts > 0] = STORY_WEIGHT if story and not language else 1.0
        return ids, weights

    def batches(self, part: str = "everything") -> Iterator[list[int]]:
        """Groups of sequences of similar length, in an order of chance that is always the same, epoch after epoch."""
        for epoch in itertools.count():
            rng = random.Random(epoch)
            order = [row for row, found in enumerate(self.part) if found == PARTS.index(part)]
            rng.shuffle(order)
            for start in range(0, len(order), 6000):
                groups = self.grouped(order[start : start + 6000])
                rng.shuffle(groups)
                yield from groups

    def grouped(self, rows: list[int]) -> list[list[int]]:
        """The rows by length, in groups of up to BATCH tokens; the last, not full, is left out."""
        groups, group = [], []
        for row in sorted(rows, key=lambda row: self.offsets[row + 1] - self.offsets[row]):
            if (len(group) + 1) * (self.offsets[row + 1] - self.offsets[row] + 15) > BATCH:
                groups.append(group)
                group = []
            group.append(row)
        return groups


# ---------------------------------------------------------------------------------------------------------------------
# Optimization


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each of (N, rows, columns): five Newton-Schulz steps, in float32."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal, so that all directions of a matrix learn equally fast.

    One parameter group for each shape: matrices of one shape are orthogonalized together.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        groups = [{"params": [matrix for matrix in matrices if tuple(matrix.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            updates = []
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                updates.append(matrix.grad.lerp(average, group["momentum"]))
            rows, columns = updates[0].shape
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            for matrix, update in zip(group["params"], orthogonalize(torch.stack(updates)), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or not name.startswith("layers.")]
    return [Muon(matrices, lr=MUON_RATE), torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int) -> float:
    """Share of the full rate: up over the first 100 steps, down to a bit less than a half, to zero where a leg ends.

    The next leg begins again at a bit less than a half.
    """
    end = min(steps, next((leg for leg in LEGS if leg > step), steps))
    return min((step + 1) / 100, max(1 - step / 3000, 0.45), (end - step) / 1000)


def loss_of(model: Transformer, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of each token given all before it; weights of 0 cost no output layer."""
    hidden = model.hidden(ids[:, :-1])  # (B, T - 1, C)
    weights = weights[:, 1:]
    wanted = weights > 0
    losses = F.cross_entropy(model.logits(hidden[wanted]), ids[:, 1:][wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


# ---------------------------------------------------------------------------------------------------------------------
# The run


def work(model: Transformer, gradients: list[Tensor], cache: Path, pipe: Connection) -> None:
    """A helper process: gradients of the model, whose weights it shares, for the rows that come through the pipe.

    A session of its own: an interruption from the keyboard reaches the main process, whose end then ends this one.
    """
    os.setsid()
    torch.set_num_threads(1)
    corpus = Corpus(Tokenizer(DEMO / "tokenizer.model"), cache)
    while (rows_and_phase := receive(pipe)) is not None:
        loss = loss_of(model, *corpus.batch(*rows_and_phase))
        for shared, gradient in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            shared.copy_(gradient)
        pipe.send(loss.item())


def receive(pipe: Connection) -> tuple[list[int], bool] | None:
    """What the main process sends: rows, and whether language is still learned; None once it has gone."""
    try:
        return pipe.recv()
    except EOFError:
        return None


class Run:
    """A model in training, with all that a snapshot needs to go on.

    Two processes of one thread each compute the gradients of a half of every batch. They meet once a step; two threads
    in one process would meet at every operation, which costs more where other programs run as well.
    """

    def __init__(self, corpus: Corpus, steps: int, snapshot: Path):
        torch.manual_seed(1)
        self.corpus = corpus
        self.model = Transformer(ModelArgs(**PARAMS, max_seq_len=1024, max_batch_size=1))
        self.optimizers = optimizers(self.model)
        self.rates = [group["lr"] for part in self.optimizers for group in part.param_groups]
        self.steps, self.step, self.tokens, self.seconds = steps, 0, 0, 0.0
        self.snapshot = snapshot
        if snapshot.exists():
            stored = torch.load(snapshot, weights_only=True)
            self.model.load_state_dict(stored["model"])
            for part, state in zip(self.optimizers, stored["optimizers"], strict=True):
                part.load_state_dict(state)
            self.step, self.tokens, self.seconds = stored["step"], stored["tokens"], stored["seconds"]
        self.start_helper()

    def start_helper(self) -> None:
        """The helper sees the weights in shared memory and leaves its gradients there, in `theirs`."""
        self.model.share_memory()
        self.theirs = [
            torch.zeros_like(weight, requires_grad=False).share_memory_() for weight in self.model.parameters()
        ]
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        context.Process(target=work, args=(self.model, self.theirs, self.corpus.cache, end), daemon=True).start()

    def save(self) -> None:
        """Write the snapshot beside the old one, then put it in its place: an interruption leaves one of them whole."""
        new = self.snapshot.with_suffix(".new")
        states = [part.state_dict() for part in self.optimizers]
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": states,
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
            },
            new,
        )
        new.replace(self.snapshot)

    def learn(self, rows: list[int]) -> float:
        """One step on these sequences; its loss."""
        began = time.monotonic()
        groups = [group for part in self.optimizers for group in part.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * learning_rate(self.step, self.steps)
        language = self.step < LANGUAGE_STEPS
        self.pipe.send((rows[1::2], language))
        loss = loss_of(self.model, *self.corpus.batch(rows[0::2], language))
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        loss = (loss.item() + self.pipe.recv()) / 2
        for parameter, mine, theirs in zip(self.model.parameters(), gradients, self.theirs, strict=True):
            parameter.grad = (mine + theirs) / 2
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        torch.set_num_threads(2)  # the helper waits
        for part in self.optimizers:
            part.step()
        torch.set_num_threads(1)
        self.step += 1
        self.tokens += sum(self.corpus.offsets[row + 1] - self.corpus.offsets[row] for row in rows)
        self.seconds += time.monotonic() - began
        return loss


def train(steps: int) -> None:
    """Train for so many batches, from the snapshot if there is one; a snapshot every 200 batches."""
    torch.set_num_threads(1)
    RUN.mkdir(exist_ok=True)
    if not (DEMO / "tokenizer.model").exists():
        train_tokenizer(DEMO / "tokenizer.model")
    corpus = Corpus(
        Tokenizer(DEMO / "tokenizer.model"), RUN / f"corpus-{SAMPLES}-{DRILLS}-{MORE}-{PRACTICE}-{OWNERS}.pt"
    )
    print(f"{len(corpus.offsets) - 1} sequences, {len(corpus.ids)} tokens", flush=True)
    run, losses = Run(corpus, steps, RUN / "snapshot.pt"), []
    for rows in schedule(corpus, run.step, steps):
        losses.append(run.learn(rows))
        if run.step % 50 == 0:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {run.step} loss {mean:.4f} tokens {run.tokens} seconds {run.seconds:.0f}", flush=True)
        if run.step % 200 == 0 or run.step == steps:
            run.save()


def schedule(corpus: Corpus, done: int, steps: int) -> Iterator[list[int]]:
    """The batches from number `done` to number `steps`: for some time two of three are drills, then readings.

    To look up in a text what belongs together is learned late and suddenly, from stories and dialogs alone hardly at
    all. A time of little but that brings it on; what is built on it, such as noticing that the text does not say, then
    needs more of the dialogs that ask for it: comparing, then finding the owner of a thing.
    """
    parts = {part: corpus.batches(part) for part in PARTS}
    for step in range(steps):
        rows = next(parts["everything" if step % 3 == 0 else part_of(step)])
        if step >= done:
            yield rows


def part_of(step: int) -> str:
    return next((part for part, steps in SCHEDULE.items() if step in steps), "everything")


def reread() -> Iterator[Sample]:
    """More dialogs that end in a question about a text."""
    for sample in samples("train", MORE, seed=2):
        if sample.kind.startswith("reading"):
            yield sample._replace(kind="reread")


def export(folder: Path = DEMO) -> None:
    """Write the snapshot as a checkpoint in Meta's layout, in bfloat16, beside the tokenizer."""
    state = torch.load(RUN / "snapshot.pt", weights_only=True)["model"]
    torch.save({name: tensor.bfloat16().clone() for name, tensor in state.items()}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    files = ("consolidated.00.pth", "params.json", "tokenizer.model")
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (folder / "checklist.chk").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write its checkpoint beside this script.")
    parser.add_argument("--steps", type=int, default=LEGS[-1])
    parser.add_argument("--export-only", action="store_true", help="write the checkpoint from the last snapshot")
    options = parser.parse_args()
    if not options.export_only:
        train(options.steps)
    export()


if __name__ == "__main__":
    main()
