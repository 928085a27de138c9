"""bench.py runs as documented: its table has a line for each engine and case, its last line is the same as JSON."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import queued
from benchmarks.clock import Clocked
from benchmarks.ours import EOS, Elsewhere, Ours, make_model
from benchmarks.peers import LlamaCpp

ROOT = Path(__file__).parents[2]
HAS_LLAMA_CPP = bool(find_spec("llama_cpp") and find_spec("gguf"))
PLAN = bench.Plan((8,), (1,), 1, 3, ("plain",), ragged=False, peers=False, against=None, queue=0)
ONE_LAYER = {"shape": "demo", "layers": 1, "device": "cpu", "dtype": "float32", "counting": True}


def run(starter: list[str], options: list[str]) -> tuple[list[str], dict]:
    """The lines that bench.py prints, and the last one, read."""
    done = subprocess.run(
        [sys.executable, *starter, str(ROOT / "bench.py"), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.strip().splitlines()
    return table, json.loads(last)


@pytest.fixture
def before(tmp_path) -> Path:
    """Another checkout: the library alone, in a folder of another name."""
    folder = tmp_path / "before"
    shutil.copytree(ROOT / "llama", folder / "llama", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# --- cases -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_engine_is_measured_and_the_last_line_is_json(before):
    options = ["--dtype", "float32", "--prompts", "8,20", "--batches", "1,2", "--steps", "2", "--turns", "1", "--peers"]
    table, last = run([], [*options, "--formats", "plain,int8,int4", "--ragged", "--against", str(before)])

    results = last["results"]
    cases = ([8], [20], [20, 20], [8, 64, 256, 512])
    engines = ["llama", "llama int8", "llama int4", "llama of before", "transformers"]
    engines += ["llama.cpp F32", "llama.cpp Q8_0", "llama.cpp Q4_0"] * HAS_LLAMA_CPP
    assert [(r["engine"], r["prompts"]) for r in results] == [(name, case) for case in cases for name in engines]
    for kind in ("first_token_s", "step_s"):
        assert all(0 < r[f"{kind}_spread"][0] <= r[kind] <= r[f"{kind}_spread"][1] for r in results)

    plain, int8, int4, other, *peers = (r["bytes"] for r in results[: len(engines)])  # of a step
    assert int4 < int8 < 0.3 * plain and abs(peers[0] - plain) < 1000 and other == plain
    if HAS_LLAMA_CPP:
        cache = 2 * 4 * 8 * 4 * 32  # keys and values of 4 layers, 8 positions, 4 heads of 32 numbers
        assert peers[1] == plain - 2 * cache and peers[3] < peers[2] < 0.3 * plain

    rows = [line for line in table if line.startswith(tuple(f"| {name} | " for name in engines))]
    assert len(rows) == len(results) and all(line.count("..") == 2 for line in rows)


def test_ranks_count_the_collectives_of_a_step():
    """Two sums for each of the demo's four layers, embedding and logits gathered, the choice broadcast."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    table, last = run(ranks, ["--prompts", "8", "--batches", "1", "--steps", "3", "--turns", "1", "--device", "cpu"])
    (result,) = last["results"]
    share = result["collectives"].pop("share")
    assert result["collectives"] == {"all_reduce": 8, "all_gather": 2, "broadcast": 1}
    assert 0 < share < 1
    assert table[-2].endswith(f"| {share:.0%}: 8 all_reduce, 2 all_gather, 1 broadcast |")


class Counter(Clocked):
    """An engine whose turns are numbered, each slower than the last, and which keeps what it was given."""

    weight_bytes = cache_itemsize = 1

    def __init__(self):
        self.given = []

    def turn(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        self.given.append(prompts)
        return float(len(self.given)), 10.0 * len(self.given)

    def peak(self, prompts: list[list[int]]) -> int:
        self.given.append(prompts)
        return 7


def test_the_first_turn_of_every_engine_is_not_counted():
    """Once the first engine's first case stood there with a third of its speed."""
    engines = {"a": Counter(), "b": Counter()}
    model = make_model(**ONE_LAYER, longest=16, most=2)
    results = bench.measure(engines, model, (4, 6), PLAN, bench.fresh_ids(model.vocab_size))
    assert [(r["first_token_s"], r["first_token_s_spread"]) for r in results] == [(4.0, [3.0, 5.0])] * 2
    assert [(r["step_s"], r["step_s_spread"], r["prefill_bytes"]) for r in results] == [(40.0, [30.0, 50.0], 7)] * 2


def test_no_prompt_begins_as_an_earlier_one():
    """A cache that knows how a prompt begins would not compute it again."""
    engines = {"a": Counter(), "b": Counter()}
    model = make_model(**ONE_LAYER, longest=16, most=2)
    bench.measure(engines, model, (4, 6), PLAN, bench.fresh_ids(model.vocab_size))
    first = [prompt[0] for engine in engines.values() for prompts in engine.given for prompt in prompts]
    assert len(first) == len(set(first)) == 2 * 5 * 2
    assert {tuple(map(len, prompts)) for engine in engines.values() for prompts in engine.given} == {(4, 6)}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"turns": 0}, "turns is 0"),
        ({"prompts": (8, -1)}, "prompts is 8,-1"),
        ({"queue": -3}, "queue is -3"),
        ({"formats": "int5"}, "formats is int5"),
        ({"shape": "1b"}, "shape is '1b'"),
        ({"queue": True, "ckpt_dir": "demo"}, "give --shape"),
        ({"against": "/nowhere", "shape": "demo"}, "/nowhere is no checkout"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        bench.main(**{"prompts": 8, "batches": 1, "steps": 1, "device": "cpu"} | options)


def test_one_process_where_one_is_needed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in ({"queue": True}, {"against": "."}, {"peers": True}):
        with pytest.raises(ValueError, match="without torchrun"):
            bench.main(**options)


# --- the queue ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_queue_is_measured_of_every_engine(before):
    options = ["--queue=5", "--layers", "1", "--dtype", "float32", "--steps", "2", "--turns", "1", "--peers"]
    table, last = run([], [*options, "--against", str(before)])
    ways = ["llama, chunks", "llama, all at once", "llama of before, all at once"]
    ways += ["transformers, chunks", "transformers, continuous"]
    assert [r["engine"] for r in last["queue"]] == ways
    assert all(0 < r["tokens_per_s_spread"][0] <= r["tokens_per_s"] for r in last["queue"])
    assert last["queue"][0]["of_chunks"] == last["one_of"][0]["of_one_row"] == 1

    left = ["llama, a cache of 1 row", "llama, row 0 of 8", "llama of before, row 0 of 8"]
    left += ["llama, row 7 of 8", "llama of before, row 7 of 8"]
    assert [r["engine"] for r in last["one_of"]] == left
    assert [line.split(" | ")[0] for line in table if line.startswith("| llama")] == (
        [f"| {name}" for name in ways[:3]] + [f"| {name}" for name in left]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_weights_count_down(dtype):
    """After any ids the next is the last less one, by a wide margin, and the layers are computed all the same."""
    model = make_model(**ONE_LAYER | {"dtype": dtype}, longest=64, most=1)
    tokens = torch.randint(3, model.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = model(tokens).topk(2, dim=-1)
    assert best.indices[..., 0].equal(tokens - 1)
    assert (best.values[..., 0] - best.values[..., 1]).min() > 50
    assert model.layers[0].feed_forward.w1.weight.std() > 0.01


def test_answers_have_the_length_that_their_prompt_says():
    ours = Ours(make_model(**ONE_LAYER, longest=64, most=2), eos_id=EOS)
    answers = [3, 20, 1, 8, 5]
    prompts = queued.prompts_of([4, 2, 9, 1, 5], answers, 2560, turn=0)
    assert [len(prompt) for prompt in prompts] == [4, 2, 9, 1, 5]
    calls = []
    generate = ours.llama.generate
    ours.llama.generate = lambda given, *args, **options: calls.append(len(given)) or generate(given, *args, **options)
    for way, sizes in ((ours.rows_at_once, [5]), (ours.rows_in_chunks, [2, 2, 1])):
        calls.clear()
        spent, found = way(prompts)
        assert (found, calls) == (answers, sizes) and spent > 0


def test_lengths_are_long_tailed_and_turns_share_them():
    lengths = queued.long_tailed(1000, "prompts")
    assert min(lengths) == 8 and max(lengths) == 256 and lengths == queued.long_tailed(1000, "prompts")
    assert lengths != queued.long_tailed(1000, "answers")
    low, high = (sum(a <= length < b for length in lengths) for a, b in ((8, 16), (128, 257)))
    assert abs(low - high) < 100

    one, other = (queued.prompts_of(lengths[:64], lengths[:64], 2560, turn) for turn in (0, 1))
    assert [prompt[-1] for prompt in one] == [prompt[-1] for prompt in other]
    assert not any(a[:-1] == b[:-1] for a, b in zip(one, other, strict=True))
    assert min(id for prompt in one for id in prompt[:-1]) > EOS + 1 + queued.LONGEST


def test_the_first_run_of_a_queue_is_not_counted_and_answers_are_checked():
    answers = queued.long_tailed(3, "answers")
    seconds = iter([100.0, 1.0, 4.0, 2.0])
    (result,) = queued.measure_queue({"a": lambda prompts: (next(seconds), answers)}, 3, 2560, 3)
    rates = [sum(answers) / spent for spent in (4.0, 2.0, 1.0)]
    assert (result["tokens_per_s"], result["tokens_per_s_spread"]) == (rates[1], [rates[0], rates[2]])
    with pytest.raises(RuntimeError, match="b gave answers of"):
        queued.measure_queue({"b": lambda prompts: (1.0, [*answers[:-1], 1])}, 3, 2560, 1)


@pytest.mark.parametrize("row", [0, 2])
def test_a_lone_row_is_timed_after_the_others_have_ended(row):
    ours = Ours(make_model(**ONE_LAYER, longest=64, most=3), eos_id=EOS)
    answers = [20 if index == row else 1 for index in range(3)]
    prompts = queued.prompts_of([4] * 3, answers, 2560, turn=0)
    times = ours.lone_steps(prompts, row, 5)
    assert len(times) == 5 and min(times) > 0
    assert ours.rows_at_once(prompts)[1] == answers  # the stream that was left does not disturb


# --- another checkout, other libraries ---------------------------------------------------------------------------


def test_another_checkout_computes_with_its_own_library(before):
    with (before / "llama" / "generation.py").open("a") as file:
        file.write("\nLlama.generate = lambda self, prompts, *args, **options: ([[7] * 3 for _ in prompts], None)\n")
    other = Elsewhere(before, ONE_LAYER | {"longest": 32, "most": 1}, EOS)
    try:
        assert other.rows_at_once([[5], [6]])[1] == [3, 3]
        with pytest.raises(RuntimeError, match="has ended"):
            other.ask("no such call")
    finally:
        other.close()


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python and gguf are not installed")
@pytest.mark.parametrize("form, bound", [("F32", 2e-3), ("Q8_0", 0.05), ("Q4_0", 0.2)])
def test_llama_cpp_computes_the_same_model(form, bound):
    """Prompts of different lengths, then steps: the same logits, up to a float16 cache and what 8 and 4 bits lose."""
    model = make_model("demo", 64, 3, "cpu", "float32")
    peer = LlamaCpp(model, form)
    rows = [[1, 300, 17, 401], [1], [1, 1260, 261, 262, 2263, 264, 265]]
    peer.prefill(rows[::-1])  # nothing may be left of it
    peer.prefill(rows)
    chosen = peer.ids
    for _ in range(12):
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in rows])
        if form == "F32":
            assert chosen.equal(expected.argmax(-1))
        rows = [[*ids, id] for ids, id in zip(rows, expected.argmax(-1).tolist(), strict=True)]
        found = peer.run([[ids[-1]] for ids in rows])
        with torch.no_grad():
            after = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in rows])
        assert (found - after).norm() < bound * after.norm()
        chosen = found.argmax(-1)


def test_loading_is_measured_of_checkpoints_that_are_made(tmp_path):
    """The script that writes them shares `llama.convert`'s sources, whose changes broke it unseen."""
    script = [sys.executable, str(ROOT / "benchmarks" / "loading.py")]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 240}
    subprocess.run([*script, "write", str(tmp_path), "--shape", "tiny", "--layouts", "hf,meta2"], check=True, **options)
    chosen = ["--ranks", "1", "--quantize", "int8", "--layouts", "meta2"]
    measured = subprocess.run([*script, "measure", str(tmp_path), *chosen], check=True, **options).stdout
    assert len([line for line in measured.splitlines() if line.startswith("| Meta, 2 files | 1 |")]) == 2
    assert not (tmp_path / "meta1").exists()
