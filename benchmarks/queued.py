"""More prompts than the cache has rows: how fast a queue is answered, and what a step costs when one row is left.

Prompts and answers have 8 to 256 tokens each, long-tailed: as many between 8 and 16 as between 128 and 256. The random
weights count down (`ours.count_down`), so the last id of a prompt says how long its answer is, and each answer ends
with the end of sequence in every engine alike, whatever engine that is: no engine is patched, and no length is asked
for. All answers are checked. Every turn has prompts of its own, of the same lengths, so that no cache knows them.
"""

import random
import statistics
from collections.abc import Callable

from benchmarks.clock import spread
from benchmarks.ours import EOS, Elsewhere, Ours, resized_copy
from llama import Transformer

ROWS = 8  # of the cache
SHORTEST = 8
LONGEST = 256
CONTEXT = 2 * LONGEST + 8
PROMPT_OF_ONE = 32

Way = Callable[[list[list[int]]], tuple[float, list[int]]]  # prompts -> seconds, tokens of each answer


def long_tailed(count: int, seed: str) -> list[int]:
    rng = random.Random(seed)
    return [round(SHORTEST * (LONGEST / SHORTEST) ** rng.random()) for _ in range(count)]


def prompts_of(lengths: list[int], answers: list[int], vocab_size: int, turn: int) -> list[list[int]]:
    """Random ids, none of them one that answers hold, and last the id from which the answer counts down."""
    rng = random.Random(turn)
    first = EOS + LONGEST + 2
    return [
        [rng.randrange(first, vocab_size) for _ in range(length - 1)] + [EOS + 1 + answer]
        for length, answer in zip(lengths, answers, strict=True)
    ]


def queue_ways(ours: Ours, against: Elsewhere | None, peer) -> dict[str, Way]:
    """The engines that answer all prompts, by name; the first is the one that the others are compared with."""
    ways = {"llama, chunks": ours.rows_in_chunks, "llama, all at once": ours.rows_at_once}
    if against is not None:
        ways[f"llama of {against.folder.name}, all at once"] = against.rows_at_once
    if peer is not None:
        ways["transformers, chunks"] = peer.rows_in_chunks
        ways["transformers, continuous"] = peer.rows_at_once
    return ways


def measure_queue(ways: dict[str, Way], count: int, vocab_size: int, turns: int) -> list[dict]:
    """Tokens of answers a second, the median and spread of the turns; the first turn only warms up."""
    lengths = long_tailed(count, "prompts")
    answers = long_tailed(count, "answers")
    rates = {name: [] for name in ways}
    for turn in range(turns + 1):
        prompts = prompts_of(lengths, answers, vocab_size, turn)
        for name, way in ways.items():
            spent, found = way(prompts)
            if found != answers:
                raise RuntimeError(f"{name} gave answers of {found} tokens where {answers} were planted.")
            if turn:
                rates[name].append(sum(answers) / spent)

    baseline = statistics.median(next(iter(rates.values())))
    return [
        {
            "engine": name,
            "tokens_per_s": statistics.median(found),
            "tokens_per_s_spread": spread(found),
            "of_chunks": statistics.median(found) / baseline,
        }
        for name, found in rates.items()
    ]


def measure_one_of(ours: Ours, against: Elsewhere | None, model: Transformer, steps: int, turns: int) -> list[dict]:
    """Seconds of a step with one row left of `ROWS`, beside those of a cache of one row; the first turn warms up."""
    alone = Ours(resized_copy(model, max_batch_size=1), eos_id=EOS)
    cases = {"llama, a cache of 1 row": (alone, 1, 0)}
    for row in (0, ROWS - 1):
        cases[f"llama, row {row} of {ROWS}"] = (ours, ROWS, row)
        if against is not None:
            cases[f"llama of {against.folder.name}, row {row} of {ROWS}"] = (against, ROWS, row)

    times = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, (engine, rows, row) in cases.items():
            answers = [LONGEST if index == row else 1 for index in range(rows)]
            prompts = prompts_of([PROMPT_OF_ONE] * rows, answers, model.vocab_size, turn)
            found = engine.lone_steps(prompts, row, min(steps, LONGEST - 4))
            if turn:
                times[name].append(statistics.median(found))

    baseline = statistics.median(next(iter(times.values())))
    return [
        {
            "engine": name,
            "step_s": statistics.median(found),
            "step_s_spread": spread(found),
            "of_one_row": statistics.median(found) / baseline,
        }
        for name, found in times.items()
    ]


def print_queue(queue: list[dict], one_of: list[dict], count: int) -> None:
    print(f"| {count} prompts, {ROWS} rows | tokens/s | of chunks |\n| --- | ---: | ---: |")
    for r in queue:
        low, high = r["tokens_per_s_spread"]
        print(f"| {r['engine']} | {r['tokens_per_s']:,.0f} ({low:,.0f}..{high:,.0f}) | {r['of_chunks']:.2f} |")

    print("\n| one active row | step, ms | of a cache of 1 row |\n| --- | ---: | ---: |")
    for r in one_of:
        low, high = (1e3 * value for value in r["step_s_spread"])
        print(f"| {r['engine']} | {r['step_s'] * 1e3:.2f} ({low:.2f}..{high:.2f}) | {r['of_one_row']:.2f} |")
    print()
