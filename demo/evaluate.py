"""Judge the demo model on dialogs and stories that training never saw, in the right chat encoding and in wrong ones.

    python -m demo.evaluate              # the tables of MODEL_CARD.md; the last line is JSON
    python -m demo.evaluate --quick      # a tenth of the dialogs
    python -m demo.evaluate --brief --quantize int8     # accuracy and perplexity alone, with smaller weights

An answer is right if the greedy answer ends by itself and equals the expected one character for character, apart from
the space that ends every answer in this encoding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from demo.corpus import SHAPES, Sample, samples
from llama import Dialog, Llama, Tokenizer
from llama.prompts import B_INST, E_INST, encode_dialog, format_dialog

DEMO = Path(__file__).parent
SEED = 7  # of the held-out samples
MAX_ANSWER = 48  # tokens; the longest expected answer has fewer
SHAPE_OF = {text: shape for shape, texts in SHAPES.items() for text in texts}


class Problem(NamedTuple):
    """A dialog that ends with a question, the answer expected, and the groups it is counted in."""

    kind: str
    dialog: Dialog
    answer: str
    shape: str
    turn: str


def problems(per_kind: int) -> list[Problem]:
    """`per_kind` held-out dialogs of every kind of question whose answer is one certain text."""
    chosen: dict[str, list[Problem]] = defaultdict(list)
    for sample in samples("held_out", 400 * per_kind, SEED):
        if (
            sample.messages
            and sample.kind not in ("story on request", "remember")
            and len(chosen[sample.kind]) < per_kind
        ):
            chosen[sample.kind].append(problem(sample))
    return [problem for kind in sorted(chosen) for problem in chosen[kind]]


def problem(sample: Sample) -> Problem:
    *dialog, answer = sample.messages
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    turn = sum(message["role"] == "user" for message in dialog)
    shape = SHAPE_OF[system] if system else "no system prompt"
    return Problem(sample.kind, dialog, answer["content"], shape, str(turn) if turn < 4 else "4 and later")


# ---------------------------------------------------------------------------------------------------------------------
# Encodings: the right one, and what a hurried reimplementation gets wrong

Encoding = Callable[[Tokenizer, Dialog], list[int]]


def joined(tokenizer: Tokenizer, texts: Sequence[str], bos: bool = True, eos: bool = True) -> list[int]:
    *finished, last = texts
    ids = [id for text in finished for id in tokenizer.encode(text, bos=bos, eos=eos)]
    return ids + tokenizer.encode(last, bos=bos, eos=False)


def missing_space(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """`[INST]question[/INST]`."""
    texts = [text.replace(f"{B_INST} ", B_INST).replace(f" {E_INST}", E_INST) for text in format_dialog(dialog)]
    return joined(tokenizer, texts)


def missing_bos(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    return joined(tokenizer, format_dialog(dialog), bos=False)


def missing_eos(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    return joined(tokenizer, format_dialog(dialog), eos=False)


def misplaced_eos(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """In every finished exchange, EOS after the question and not after the answer."""
    *finished, last = format_dialog(dialog)
    ids: list[int] = []
    for text in finished:
        question, answer = text.split(E_INST)
        ids += tokenizer.encode(question + E_INST, bos=True, eos=True) + tokenizer.encode(
            answer.strip(), bos=False, eos=False
        )
    return ids + tokenizer.encode(last, bos=True, eos=False)


def system_in_last_turn(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """The system text before the last question, where it belongs before the first."""
    if dialog[0]["role"] != "system":
        return encode_dialog(tokenizer, dialog)
    system, *rest, last = dialog
    if not rest:
        return encode_dialog(tokenizer, dialog)
    return joined(tokenizer, [*format_dialog([*rest, last])[:-1], *format_dialog([system, last])])


FAULTS: dict[str, Encoding] = {
    "a missing space": missing_space,
    "a missing BOS": missing_bos,
    "a missing EOS": missing_eos,
    "a misplaced EOS": misplaced_eos,
    "the system text in the last turn": system_in_last_turn,
}

# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def greedy(llama: Llama, prompts: list[list[int]], limit: int) -> list[str | None]:
    """The greedy answer to each prompt, or None where it does not end within `limit` tokens."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of one length share a batch
    answers, _ = llama.generate([prompts[i] for i in order], limit, temperature=0)
    texts: list[str | None] = [None] * len(prompts)
    for i, ids in zip(order, answers, strict=True):
        texts[i] = llama.tokenizer.decode(ids).strip() if len(ids) < limit else None
    return texts


def marks(llama: Llama, asked: list[Problem], encoding: Encoding) -> list[bool]:
    """For each problem, whether its answer is right under this encoding."""
    answers = greedy(llama, [encoding(llama.tokenizer, problem.dialog) for problem in asked], MAX_ANSWER)
    return [answer == problem.answer for answer, problem in zip(answers, asked, strict=True)]


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def by_group(asked: list[Problem], right: list[bool], group: str) -> dict[str, tuple[int, float]]:
    """Count and accuracy of each value of a problem's field."""
    found: dict[str, list[bool]] = defaultdict(list)
    for problem, mark in zip(asked, right, strict=True):
        found[getattr(problem, group)].append(mark)
    return {name: (len(found[name]), share(found[name])) for name in sorted(found)}


def under_faults(llama: Llama, asked: list[Problem], right: list[bool]) -> dict[str, tuple[int, float, float]]:
    """Of each fault: how many dialogs it changes, and their accuracy with the right encoding and with the fault."""
    table = {}
    for name, encoding in FAULTS.items():
        changed = [
            (problem, mark)
            for problem, mark in zip(asked, right, strict=True)
            if encoding(llama.tokenizer, problem.dialog) != encode_dialog(llama.tokenizer, problem.dialog)
        ]
        wrong = marks(llama, [problem for problem, _ in changed], encoding)
        table[name] = (len(changed), share([mark for _, mark in changed]), share(wrong))
    return table


def perplexity(llama: Llama, count: int) -> float:
    """Of each token of held-out stories, the EOS that ends them included, given all before it."""
    stories = (sample.text for sample in samples("held_out", 20 * count, SEED) if sample.kind == "story")
    loss, tokens = 0.0, 0
    for story in itertools.islice(stories, count):
        ids = torch.tensor([llama.tokenizer.encode(story, bos=True, eos=True)])
        with torch.inference_mode():
            loss += F.cross_entropy(llama.model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def stories_on_request(llama: Llama, count: int) -> float:
    """Share of held-out requests for a story that get one which ends by itself and speaks of the one asked for."""
    wanted = (sample for sample in samples("held_out", 400 * count, SEED) if sample.kind == "story on request")
    asked = [sample.messages for sample in itertools.islice(wanted, count)]
    answers = greedy(llama, [encode_dialog(llama.tokenizer, messages[:-1]) for messages in asked], 256)
    heroes = [messages[-2]["content"].split(" about ")[1].rstrip(".").split(" and ")[0] for messages in asked]
    named = [hero.removeprefix("a ").removeprefix("an ") for hero in heroes]
    return share([answer is not None and hero in answer for answer, hero in zip(answers, named, strict=True)])


def report(llama: Llama, per_kind: int) -> None:
    """Print every table, then all numbers as one line of JSON."""
    asked = problems(per_kind)
    right = marks(llama, asked, encode_dialog)
    result: dict[str, object] = {"dialogs": len(asked), "accuracy": share(right)}
    print(f"Greedy answers to {len(asked)} held-out dialogs, exact match: {share(right):.1%}\n")
    for group, title in (("kind", "kind of question"), ("shape", "shape asked for"), ("turn", "turn")):
        table = by_group(asked, right, group)
        result[group] = {name: accuracy for name, (_, accuracy) in table.items()}
        print(f"| {title} | dialogs | accuracy |\n| --- | ---: | ---: |")
        print("".join(f"| {name} | {count} | {accuracy:.1%} |\n" for name, (count, accuracy) in table.items()))
    faults = under_faults(llama, asked, right)
    result["faults"] = {name: accuracy for name, (_, _, accuracy) in faults.items()}
    print(
        "| encoding fault | dialogs it changes | accuracy when right | accuracy with it |\n| --- | ---: | ---: | ---: |"
    )
    print("".join(f"| {name} | {n} | {good:.1%} | {bad:.1%} |\n" for name, (n, good, bad) in faults.items()))
    result["stories on request"] = stories_on_request(llama, max(4, per_kind // 2))
    result["perplexity"] = perplexity(llama, max(20, 2 * per_kind))
    print(f"Stories on request that end by themselves and name who was asked for: {result['stories on request']:.1%}")
    print(f"Perplexity of held-out stories, per token: {result['perplexity']:.3f}\n")
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out dialogs and stories.")
    parser.add_argument("--ckpt_dir", default=str(DEMO))
    parser.add_argument("--per-kind", type=int, default=100, help="dialogs of each kind of question")
    parser.add_argument("--quick", action="store_true", help="10 dialogs of each kind")
    parser.add_argument("--brief", action="store_true", help="one line: accuracy and perplexity, nothing by group")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    options = parser.parse_args()
    formats = {"dtype": options.dtype, "quantize": options.quantize}
    llama = Llama.build(options.ckpt_dir, max_seq_len=1024, max_batch_size=32, device="cpu", **formats)
    per_kind = 10 if options.quick else options.per_kind
    if options.brief:
        asked = problems(per_kind)
        right, found = marks(llama, asked, encode_dialog), perplexity(llama, max(20, 2 * per_kind))
        print(f"{share(right):.1%} of {len(asked)} dialogs, perplexity {found:.4f} of {max(20, 2 * per_kind)} stories")
    else:
        report(llama, per_kind)


if __name__ == "__main__":
    main()
