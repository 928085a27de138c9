r"""How fast this machine runs a model, beside what the machine could do and, if asked, beside other libraries.

    python bench.py                                  # the demo checkpoint
    python bench.py --shape 110m --dtype float32 --peers
    python bench.py --shape 1.1b --formats plain,int8,int4 --ragged
    python bench.py --shape 15m --against ../before  # this checkout beside another one, each in its own process
    python bench.py --shape 110m --queue --peers     # more prompts than rows
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
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import date

import fire
import torch
import torch.distributed as dist

import flags
from benchmarks import queued
from benchmarks.clock import Clocked, seconds, spread
from benchmarks.ours import EOS, Elsewhere, Ours, make_model
from benchmarks.peers import TransformersQueue, check_peers, peer_engines
from llama import Transformer, parallel, quantize
from llama.device import dtype_name

COLLECTIVES = ("all_reduce", "all_gather", "broadcast")
FORMATS = ("plain", "compiled", *quantize.FORMATS)
QUEUED = 64  # prompts
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
    queue: bool | int = False,
):
    """Print one table and one JSON line.

    Args:
        shape: demo (the checkpoint in demo/), or random weights of 15m, 110m, 1.1b or 7b.
        ckpt_dir: measure this checkpoint instead.
        dtype: float32, bfloat16 or float16; what the device computes natively if not given.
        device: cuda, mps or cpu; the best of them if not given.
        prompts: prompt lengths in tokens; those beyond the context are left out.
        batches: rows decoded at once, with the prompt length that is nearest to 512.
        steps: tokens decoded in a turn.
        turns: how often each engine takes its turn; publish no figure of fewer than five.
        formats: any of plain, compiled, int8 and int4, one engine each, over the same weights.
        ragged: also a batch of prompts of 8, 64, 256 and 512 tokens.
        layers: so many layers only, for figures that do not depend on their number.
        peers: also run transformers' LlamaForCausalLM (static cache, sdpa) and, on a CPU, llama.cpp; same weights.
        against: also run another checkout of this library, the folder of which this is; same weights.
        queue: instead, 64 prompts (or so many) that wait for 8 rows, at random weights of the shape.
    """
    lengths = {"prompts": several(prompts), "batches": several(batches)}
    count = QUEUED if queue is True else queue
    check_numbers(lengths | {"steps": (steps,), "turns": (turns,), "queue": (count or 1,)})
    formats = several(formats)
    if not set(formats) <= set(FORMATS):
        raise ValueError(f"formats is {','.join(map(str, formats))}; it must be some of {', '.join(FORMATS)}.")
    check_together(peers, against, queue, ckpt_dir)

    where = {"shape": shape, "device": device, "dtype": dtype, "layers": layers}
    if queue:
        run_queue(where, count, steps, turns, peers, against)
    else:
        where["ckpt_dir"] = ckpt_dir
        run_cases(where, lengths | {"ragged": ragged}, steps, turns, formats, peers, against)


def several(values: object) -> tuple:
    """What a flag lists: fire reads one value as itself."""
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def check_numbers(options: dict[str, tuple]) -> None:
    for name, numbers in options.items():
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"{name} is {','.join(map(str, numbers))}; it must be positive integers.")


def check_together(peers: bool, against: str | None, queue: bool | int, ckpt_dir: str | None) -> None:
    """Raise `ValueError` for options that exclude each other, or the way bench.py was started."""
    if peers:
        check_peers()
    if (against or queue) and parallel.world()[1] > 1:
        raise ValueError("--against and --queue run in one process; start bench.py without torchrun.")
    if queue and ckpt_dir:
        raise ValueError("--queue plants how long its answers are in random weights; give --shape, not --ckpt_dir.")


def run_cases(
    where: dict, lengths: dict, steps: int, turns: int, formats: tuple[str, ...], peers: bool, against: str | None
) -> None:
    """Measure prefill and decode of every engine at every case, and print them."""
    ragged = [RAGGED] if lengths["ragged"] else []
    longest = max([*lengths["prompts"], *map(max, ragged)]) + steps + 1
    most = max([*lengths["batches"], *map(len, ragged)])
    model = make_model(**where, longest=longest, most=most)
    if any(isinstance(module, quantize.Quantized) for module in model.modules()):
        raise ValueError(f"{where['ckpt_dir']} is quantized; give the original, with --formats int8,int4.")
    model.own_cache().clear()  # writes to every page: what a prefill needs does not include them

    engines = {f"llama {name}".removesuffix(" plain"): Ours(model, name) for name in formats}
    with other_checkout(against, where, model) as other:
        if other is not None:
            engines[f"llama of {other.folder.name}"] = other
        if peers:
            engines |= peer_engines(model, steps)

        kind = (model.norm.weight.device, model.norm.weight.dtype)
        limits = machine_limits(*kind)
        fresh = fresh_ids(model.vocab_size)
        results = []
        room = model.params.max_seq_len - steps - 1
        for case in cases(lengths["prompts"], lengths["batches"], room) + ragged:
            results += measure(engines, model, case, steps, turns, fresh)
        after = machine_limits(*kind)
        limits = {name: max(value, after[name]) for name, value in limits.items()}

    if parallel.world()[0] == 0:
        about = versions(engines.values())
        print_machine(model, about)
        print_table(results, limits)
        name = where["ckpt_dir"] or where["shape"]
        print(json.dumps(summary(model, about, name) | {"limits": limits, "results": results}))


def run_queue(where: dict, count: int, steps: int, turns: int, peers: bool, against: str | None) -> None:
    """Measure what answers a queue, and a step of one row, and print them."""
    where = where | {"longest": queued.CONTEXT, "most": queued.ROWS, "counting": True}
    model = make_model(**where)
    ours = Ours(model, eos_id=EOS)
    peer = TransformersQueue(model, queued.ROWS, EOS) if peers else None
    with other_checkout(against, where, model, EOS) as other:
        ways = queued.queue_ways(ours, other, peer)
        queue = queued.measure_queue(ways, count, model.vocab_size, turns)
        one_of = queued.measure_one_of(ours, other, model, steps, turns)

    about = versions([engine for engine in (other, peer) if engine is not None])
    print_machine(model, about)
    queued.print_queue(queue, one_of, count)
    print(json.dumps(summary(model, about, where["shape"]) | {"queue": queue, "one_of": one_of}))


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


def cases(prompts: tuple[int, ...], batches: tuple[int, ...], longest: int) -> list[tuple[int, ...]]:
    """The prompt lengths of each case: every length with one row, and every batch at the length nearest to 512."""
    fitting = [length for length in prompts if length <= longest] or [longest]
    middle = min(fitting, key=lambda length: abs(length - 512))
    return [(length,) for length in fitting] + [(middle,) * rows for rows in batches if rows > 1]


def versions(engines) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for engine in engines:
        found |= getattr(engine, "version", {})
    return found


# --- measuring ---------------------------------------------------------------------------------------------------


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of the fastest of several reads of 2 GiB, operations a second of the best of ten products."""
    size = 2**31 if device.type != "cpu" or parallel.size() == 1 else 2**29
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    matrix = buffer.view(-1, 8192)
    ones = torch.ones(8192, device=device)
    reads = (buffer.sum, buffer.max, lambda: matrix @ ones)
    read = max(size / seconds(work, device) for work in reads for _ in range(3))

    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    a @ b
    return {"read": read, "matrix": max(2 * 2048**3 / seconds(lambda: a @ b, device) for _ in range(10))}


def fresh_ids(vocab_size: int) -> Iterator[int]:
    """First ids of which each is taken once in a long while, so that no cache knows how a prompt begins."""
    return itertools.cycle(range(3, vocab_size))


def measure(
    engines: dict[str, Clocked], model: Transformer, lengths: tuple[int, ...], steps: int, turns: int, fresh: Iterator
) -> list[dict]:
    """The median time of a prefill and of a step for each engine, taking turns; the first turn only warms up."""
    generator = torch.Generator().manual_seed(0)
    rest = [torch.randint(3, model.vocab_size, (length - 1,), generator=generator).tolist() for length in lengths]
    prefill = {name: [] for name in engines}
    decode = {name: [] for name in engines}
    peaks = {}
    for turn in range(turns + 1):
        for name, engine in engines.items():
            if not turn:
                peaks[name] = engine.peak([[next(fresh), *ids] for ids in rest])
            first, step = engine.turn([[next(fresh), *ids] for ids in rest], steps)
            if turn:
                prefill[name].append(first)
                decode[name].append(step)

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
        prompts = [[next(fresh), *ids] for ids in rest]
        results.append(result | work_of(engine, model, lengths) | collectives_of(name, engine, prompts, steps))
    return results


def work_of(engine, model: Transformer, lengths: tuple[int, ...]) -> dict[str, float]:
    """Operations of a prefill and bytes of a step at these lengths, of this rank: what any engine has to do."""
    args = model.params
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    pairs = sum(length * (length + 1) / 2 for length in lengths)  # of a query and a key it sees
    attention = 4 * args.n_layers * pairs * args.dim / parallel.size()
    operations = 2 * matrices * sum(lengths) + 2 * model.output.weight.numel() * len(lengths) + attention

    kv_heads = max(args.kv_heads // parallel.size(), 1)
    cache = 2 * args.n_layers * kv_heads * args.head_dim * sum(lengths)
    return {"operations": operations, "bytes": engine.weight_bytes + cache * engine.cache_itemsize}


def collectives_of(name: str, engine: Clocked, prompts: list[list[int]], steps: int) -> dict:
    """Calls a token of each collective and the share of a step inside them, in steps of their own after the timed.

    Waiting for a slower rank counts. Nothing with one rank, for a compiled step, which holds its collectives itself,
    nor on a GPU, where a call returns before its work is done.
    """
    if parallel.size() == 1 or engine.device.type != "cpu" or name.endswith("compiled"):
        return {}
    engine.prefill(prompts)
    with timed_collectives() as spent:
        whole = sum(seconds(engine.step, engine.device) for _ in range(steps))
    engine.end()
    calls = {kind: len(times) / steps for kind, times in spent.items()}
    return {"collectives": calls | {"share": sum(map(sum, spent.values())) / whole}}


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
    columns = (*COLUMNS, *["of step in collectives"] * shared)
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for result in results:
        print(f"| {' | '.join(cells(result, limits, shared))} |")
    print()


def cells(result: dict, limits: dict[str, float], shared: bool) -> list[str]:
    """The columns of one result; times and rates with the least and the most of the turns."""
    lengths = result["prompts"]
    first = result["first_token_s"]
    step = result["step_s"]
    soonest, latest = (1e3 * value for value in result["first_token_s_spread"])
    fastest, slowest = (len(lengths) / value for value in result["step_s_spread"])
    memory = result["prefill_bytes"]
    row = [
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
    return row + [collectives_cell(**result.get("collectives", {}))] * shared


def collectives_cell(share: float | None = None, **calls: float) -> str:
    return "" if share is None else f"{share:.0%}: {', '.join(f'{count:g} {kind}' for kind, count in calls.items())}"


def summary(model: Transformer, about: dict[str, str], name: str) -> dict:
    return {
        "date": date.today().isoformat(),
        "model": str(name),
        "device": str(model.norm.weight.device),
        "dtype": dtype_name(model.norm.weight.dtype),
        "ranks": parallel.size(),
        "threads": torch.get_num_threads(),
        "versions": about,
    }


if __name__ == "__main__":
    sys.tracebacklimit = 0  # a wrong argument ends in its one sentence
    fire.Fire(main, command=flags.check(sys.argv[1:], flags.defaults(main)))
