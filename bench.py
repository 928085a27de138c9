r"""How fast this machine runs a model, beside what the machine could do and, with --peers, beside other libraries.

    python bench.py                                  # the demo checkpoint
    python bench.py --shape 110m --dtype float32 --peers
    python bench.py --shape 1.1b --formats plain,int8,int4 --ragged
    torchrun --standalone --nproc_per_node 2 bench.py --shape 15m

Decoding reads every weight once for each token, so memory bandwidth bounds it; a prompt is bound by matrix products.
Both limits are measured in the same run, and each figure stands beside its share of the limit. Engines take turns,
and every figure is the median of its turns. Ranks that share a model also count the collectives of a step, and the
share of it that they take. Every step is waited for, so what a GPU gains where steps are queued does not show, and
llama.cpp's batches are filled within the clock, about a microsecond a token. The last line printed is the whole result
as JSON.

llama.cpp takes part where `llama-cpp-python` and `gguf` are installed. Its default build crashes in its AMX path on
some virtual machines, so name the instruction sets that yours has; with AVX-512:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON" \
        pip install gguf llama-cpp-python==0.3.36
"""

import contextlib
import functools
import json
import logging
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama import Llama, ModelArgs, Transformer, cli, parallel, quantize
from llama.decode import Batch, compiled_step, eager_step
from llama.device import choose_device, choose_dtype, collective_backend, dtype_name, use_device
from llama.loading import place

DEMO = Path(__file__).parent / "demo"
COLLECTIVES = ("all_reduce", "all_gather", "broadcast")
FORMATS = ("plain", "compiled", *quantize.FORMATS)
GGUF_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
RAGGED = (8, 64, 256, 512)  # tokens of each prompt
SHAPES = {
    "15m": dict(dim=288, n_layers=6, n_heads=6, vocab_size=32000, multiple_of=32),
    "110m": dict(dim=768, n_layers=12, n_heads=12, vocab_size=32000, multiple_of=32),
    "1.1b": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, multiple_of=256),
    "7b": dict(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256),
}


def main(
    shape: str = "demo",
    ckpt_dir: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    prompts: tuple[int, ...] = (32, 512, 2048),
    batches: tuple[int, ...] = (1, 4, 16),
    steps: int = 32,
    turns: int = 3,
    formats: tuple[str, ...] = ("plain",),
    ragged: bool = False,
    layers: int | None = None,
    peers: bool = False,
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
        turns: how often each engine takes its turn.
        formats: any of plain, compiled, int8 and int4, one engine each, over the same weights.
        ragged: also a batch of prompts of 8, 64, 256 and 512 tokens.
        layers: so many layers only, for figures that do not depend on their number.
        peers: also run transformers' LlamaForCausalLM (static cache, sdpa) and, on a CPU, llama.cpp; same weights.
    """
    prompts, batches, formats = (tuple(x) if isinstance(x, tuple | list) else (x,) for x in (prompts, batches, formats))
    for name, numbers in {"prompts": prompts, "batches": batches, "steps": [steps], "turns": [turns]}.items():
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"{name} is {','.join(map(str, numbers))}; it must be positive integers.")
    if not set(formats) <= set(FORMATS):
        raise ValueError(f"formats is {','.join(map(str, formats))}; it must be some of {', '.join(FORMATS)}.")
    longest, most = max(*prompts, RAGGED[-1] * ragged) + steps, max(*batches, len(RAGGED) * ragged)
    model = load_checkpoint(ckpt_dir or DEMO, longest, most, device, dtype) if ckpt_dir or shape == "demo" \
        else random_model(shape, longest, most, device, dtype, layers)  # fmt: skip
    if any(isinstance(module, quantize.Quantized) for module in model.modules()):
        raise ValueError(f"{ckpt_dir} is quantized; give the original, with --formats int8,int4.")
    model.own_cache().clear()  # writes to every page: what a prefill needs does not include them
    where, kind = model.norm.weight.device, model.norm.weight.dtype
    engines = {f"llama {name}".removesuffix(" plain"): Ours(model, name) for name in formats}
    if peers:
        engines |= peer_engines(model, steps)
    limits = machine_limits(where, kind)
    uniform = cases(prompts, batches, model.params.max_seq_len - steps)
    lengths = [(length,) * rows for rows, length in uniform] + [RAGGED] * ragged
    results = [result for each in lengths for result in measure(engines, model, each, steps, turns)]
    after = machine_limits(where, kind)
    limits = {name: max(value, after[name]) for name, value in limits.items()}
    if parallel.world()[0] == 0:
        about = versions(engines)
        print_table(results, limits, model, about)
        print(json.dumps(summary(results, limits, model, about, ckpt_dir or shape)))


def cases(prompts: tuple[int, ...], batches: tuple[int, ...], longest: int) -> list[tuple[int, int]]:
    """(rows, prompt length): every length with one row, and every batch at the length nearest to 512."""
    fitting = [length for length in prompts if length <= longest] or [longest]
    middle = min(fitting, key=lambda length: abs(length - 512))
    return [(1, length) for length in fitting] + [(rows, middle) for rows in batches if rows > 1]


def load_checkpoint(folder, longest, most, device, dtype) -> Transformer:
    return Llama.build(folder, max_seq_len=longest, max_batch_size=most, device=device, dtype=dtype).model


def random_model(shape, longest, most, device, dtype, layers) -> Transformer:
    """Weights of the shape, made in place; the same on no two ranks, which changes no speed."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be demo or one of {', '.join(SHAPES)}.")
    device = choose_device(device, parallel.local_world()[0])
    use_device(device)
    parallel.initialize(None, collective_backend(device), device)
    dtype = choose_dtype(dtype, torch.bfloat16, device)
    args = ModelArgs(**SHAPES[shape], max_seq_len=longest, max_batch_size=most)
    args.n_layers = layers or args.n_layers
    with torch.device("meta"):
        model = Transformer(args)
    state = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
    for name, weight in state.items():
        weight.fill_(1.0) if "norm" in name else weight.normal_(std=0.02)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


class Ours:
    """This library: prefill, then steps, the likeliest token each time."""

    def __init__(self, model: Transformer, form: str = "plain"):
        self.model = quantized_copy(model, form) if form in quantize.FORMATS else model
        self.advance = compiled_step(model, "cudagraph") if form == "compiled" else eager_step(self.model)
        self.weight_bytes, self.cache_itemsize = step_weights(self.model, model), model.norm.weight.itemsize

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.model.own_cache().ids = []  # nothing is reused
        self.batch = Batch(self.model, prompts, self.advance)
        return parallel.broadcast(self.batch.prefill()[0].argmax(-1))

    def step(self, ids: Tensor) -> Tensor:
        ids = self.batch.step(ids, [True] * len(ids)).argmax(-1)
        return parallel.broadcast(ids)  # as a generator's ranks agree on a token


def quantized_copy(model: Transformer, kind: str) -> Transformer:
    """The same model with quantized matrices; embedding, norms and cache are shared."""
    with torch.device("meta"):
        copy = Transformer(model.params)
    for name, weight in model.state_dict().items():
        place(copy, name, weight, weight.dtype, kind)
    quantize.pack(copy)
    copy.cache = model.own_cache()
    return copy.requires_grad_(False).eval()


def step_weights(engine: nn.Module, model: Transformer) -> int:
    """Bytes of the weights that a step reads: of the embedding it takes some rows only."""
    return sum(t.nbytes for t in (*engine.parameters(), *engine.buffers())) - model.tok_embeddings.weight.nbytes


def peer_engines(model: Transformer, steps: int) -> dict:
    """transformers and, where it is installed and the model on a CPU, llama.cpp; all weights are in memory at once."""
    if not find_spec("transformers"):
        raise ValueError(
            "--peers needs transformers, which the tests need too: pip install -e '.[test]' -c constraints.txt."
        )
    if parallel.size() > 1:
        raise ValueError(f"peers run in one process, not in {parallel.size()}; start bench.py without torchrun.")
    engines = {"transformers": Transformers(model, steps)}
    if model.norm.weight.device.type == "cpu" and find_spec("llama_cpp") and find_spec("gguf"):
        forms = (GGUF_DTYPES[model.norm.weight.dtype], "Q8_0", "Q4_0")
        engines |= {f"llama.cpp {form}": LlamaCpp(model, form) for form in forms}
    return engines


def versions(engines: dict) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for engine in engines.values():
        found |= getattr(engine, "version", {})
    return found


class Transformers:
    """transformers' model over the same storage: scaled dot product attention and a static cache, stepped by hand.

    A cache for each number of rows and positions, no longer than they need, is made once, in the turn that warms up.
    """

    def __init__(self, model: Transformer, steps: int):
        from transformers import LlamaConfig, LlamaForCausalLM, __version__

        args, self.version = model.params, {"transformers": __version__}
        self.config = LlamaConfig(
            hidden_size=args.dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.kv_heads,
            intermediate_size=args.ffn_hidden_dim,
            vocab_size=args.vocab_size,
            rms_norm_eps=args.norm_eps,
            max_position_embeddings=args.max_seq_len,
            attn_implementation="sdpa",
        )
        weight = model.norm.weight
        with torch.device("meta"):
            self.model = LlamaForCausalLM(self.config)
        self.model.load_state_dict(peer_names(model, "transformers"), assign=True)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.config).to(weight.device)
        self.model.eval()
        self.weight_bytes, self.cache_itemsize = step_weights(self.model, model), model.norm.weight.itemsize
        self.steps, self.caches = steps, {}

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Shorter prompts are padded on the left, behind a mask."""
        from transformers import StaticCache

        longest, device = max(map(len, prompts)), self.model.device
        case = (len(prompts), longest + self.steps)
        self.cache = self.caches.setdefault(case, StaticCache(config=self.config, max_cache_len=case[1]))
        self.cache.reset()
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = [[0] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
        seen = [[0] * count + [1] * len(prompt) for count, prompt in zip(padding, prompts, strict=True)]
        self.seen = torch.tensor(seen, device=device) if any(padding) else None
        return self.run(torch.tensor(tokens, device=device))

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen = torch.cat((self.seen, torch.ones_like(self.seen[:, :1])), dim=1)
        return self.run(ids[:, None])

    def run(self, tokens: Tensor) -> Tensor:
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        if self.seen is not None:
            positions = (self.seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            options |= {"attention_mask": self.seen, "position_ids": positions}
        return self.model(input_ids=tokens, **options).logits[:, -1].argmax(-1)


class LlamaCpp:
    """llama.cpp's model over a file of the same weights; a batch holds the new tokens of all rows, each a sequence.

    All is as it runs by default, its float16 cache too, but for the number of threads, which is torch's.
    """

    cache_itemsize = 2

    def __init__(self, model: Transformer, form: str):
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        llama_cpp.llama_backend_init()
        self.lib, args, options = llama_cpp, model.params, llama_cpp.llama_model_default_params()
        flags = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.version = {"llama-cpp-python": f"{llama_cpp.__version__} ({flags})"}
        options.n_gpu_layers = 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            self.weight_bytes = write_gguf(path, model, form)
            weights = llama_cpp.llama_model_load_from_file(bytes(path), options)  # mapped: it outlives its name
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max, self.vocab_size = args.max_batch_size, args.vocab_size
        options.n_ctx = options.n_batch = args.max_seq_len * args.max_batch_size
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(weights, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot run this shape as {form}; leave --peers out.")
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.lengths = [0] * len(prompts)
        return self.run(prompts).argmax(-1)

    def step(self, ids: Tensor) -> Tensor:
        return self.run([[id] for id in ids.tolist()]).argmax(-1)

    def run(self, rows: list[list[int]]) -> Tensor:
        """The logits after each row's last token, (B, V), until the next call."""
        from numpy.ctypeslib import as_array

        batch, at = self.batch, 0
        for row, ids in enumerate(rows):
            for position, id in enumerate(ids, self.lengths[row]):
                batch.token[at], batch.pos[at], batch.logits[at] = id, position, False
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                at += 1
            batch.logits[at - 1] = True
            self.lengths[row] += len(ids)
        batch.n_tokens = at
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp could not run a batch of {at} tokens; use fewer rows or shorter prompts.")
        return torch.from_numpy(as_array(self.lib.llama_get_logits(self.context), (len(rows), self.vocab_size)))


def write_gguf(path: Path, model: Transformer, form: str) -> int:
    """Write the weights for llama.cpp, which has our order of q and k rows; return the bytes of those a step reads.

    `form` is that of the layers' matrices, as in our formats: the output layer has 8 bits at least, the embedding stays
    as it is. Norms have to be float32.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    args, size = model.params, 0
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_tokenizer_model("none")
    sizes = {
        "vocab_size": args.vocab_size, "context_length": args.max_seq_len, "embedding_length": args.dim,
        "block_count": args.n_layers, "feed_forward_length": args.ffn_hidden_dim, "head_count": args.n_heads,
        "head_count_kv": args.kv_heads, "layer_norm_rms_eps": args.norm_eps, "rope_freq_base": args.rope_theta,
        "rope_dimension_count": args.head_dim,
    }  # fmt: skip
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    kinds = {"token_embd.weight": GGUF_DTYPES[model.norm.weight.dtype], "output.weight": form.replace("Q4", "Q8")}
    for name, weight in peer_names(model, "llama.cpp").items():
        kind = GGMLQuantizationType["F32" if weight.ndim == 1 else kinds.get(name, form)]
        numbers = quantize(weight.float().numpy(), kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)
        size += numbers.nbytes * (name != "token_embd.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def peer_names(model: Transformer, peer: str) -> dict[str, Tensor]:
    """Our tensors under a peer's names, shared. Transformers wants q and k rows in another order: it costs nothing."""
    parts = {
        "tok_embeddings": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"),
        "output": ("lm_head", "output"), "layers": ("model.layers", "blk"),
        "attention.wq": ("self_attn.q_proj", "attn_q"), "attention.wk": ("self_attn.k_proj", "attn_k"),
        "attention.wv": ("self_attn.v_proj", "attn_v"), "attention.wo": ("self_attn.o_proj", "attn_output"),
        "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"), "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
        "feed_forward.w3": ("mlp.up_proj", "ffn_up"), "attention_norm": ("input_layernorm", "attn_norm"),
        "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    }  # fmt: skip
    theirs, renamed = {ours: names[peer == "llama.cpp"] for ours, names in parts.items()}, {}
    for name, tensor in model.state_dict().items():
        layer, part = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups("")
        renamed[f"{layer.replace('layers', theirs['layers'])}{theirs[part]}.weight"] = tensor
    return renamed


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of the fastest of several reads of 2 GiB, operations a second of the best of ten products."""
    size = 2**31 if device.type != "cpu" or parallel.size() == 1 else 2**29
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    matrix, ones = buffer.view(-1, 8192), torch.ones(8192, device=device)
    reads = (buffer.sum, buffer.max, lambda: matrix @ ones)
    read = max(size / seconds(work, device) for work in reads for _ in range(3))
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    a @ b
    return {"read": read, "matrix": max(2 * 2048**3 / seconds(lambda: a @ b, device) for _ in range(10))}


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held at most while `work` runs, above what was held before; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear.exists():
        work()
        return None
    clear.write_text("5")  # the peak begins anew

    def resident(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) * 1024

    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def measure(engines: dict, model: Transformer, lengths: tuple[int, ...], steps: int, turns: int) -> list[dict]:
    """The median time of a prefill and of a step for each engine, taking turns; the first turn only warms up."""
    device, generator = model.norm.weight.device, torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, model.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    times, peaks = {name: ([], []) for name in engines}, {}
    for turn in range(turns + 1):
        for name, engine in engines.items():
            box = []
            work = lambda engine=engine, box=box: box.append(engine.prefill(prompts))  # noqa: E731
            if not turn:
                peaks[name] = peak_memory(work, device)
                engine.step(box.pop())
                continue
            prefill = seconds(work, device)
            decode = []
            for _ in range(steps):
                decode.append(seconds(lambda engine=engine, box=box: box.append(engine.step(box.pop())), device))
            times[name][0].append(prefill)
            times[name][1].append(statistics.median(decode))
    return [
        {"engine": name, "prompts": lengths, "first_token_s": statistics.median(prefill),
         "step_s": statistics.median(decode), "prefill_bytes": peaks[name]}
        | work_of(engines[name], model, lengths)
        | collectives_of(name, engines[name], prompts, steps, device)
        for name, (prefill, decode) in times.items()
    ]  # fmt: skip


def collectives_of(name: str, engine, prompts: list[list[int]], steps: int, device: torch.device) -> dict:
    """Calls a token of each collective and the share of a step inside them, in steps of their own after the timed.

    Waiting for a slower rank counts. Nothing with one rank, for a compiled step, which holds its collectives itself,
    nor on a GPU, where a call returns before its work is done.
    """
    if parallel.size() == 1 or device.type != "cpu" or name.endswith("compiled"):
        return {}
    box = [engine.prefill(prompts)]
    with timed_collectives() as spent:
        whole = sum(seconds(lambda: box.append(engine.step(box.pop())), device) for _ in range(steps))
    calls = {kind: len(times) / steps for kind, times in spent.items()}
    return {"collectives": calls | {"share": sum(map(sum, spent.values())) / whole}}


@contextlib.contextmanager
def timed_collectives() -> Iterator[dict[str, list[float]]]:
    """The seconds of each call of torch's collectives, by kind, for as long as this lasts."""
    plain, spent = {kind: getattr(dist, kind) for kind in COLLECTIVES}, {kind: [] for kind in COLLECTIVES}

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


def work_of(engine, model: Transformer, lengths: tuple[int, ...]) -> dict[str, float]:
    """Operations of a prefill and bytes of a step at these lengths, of this rank: what any engine has to do."""
    args = model.params
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    pairs = sum(length * (length + 1) / 2 for length in lengths)  # of a query and a key it sees
    attention = 4 * args.n_layers * pairs * args.dim / parallel.size()
    operations = 2 * matrices * sum(lengths) + 2 * model.output.weight.numel() * len(lengths) + attention
    cache = 2 * args.n_layers * max(args.kv_heads // parallel.size(), 1) * args.head_dim * sum(lengths)
    return {"operations": operations, "bytes": engine.weight_bytes + cache * engine.cache_itemsize}


def print_table(results: list[dict], limits: dict[str, float], model: Transformer, about: dict[str, str]) -> None:
    args, shared = model.params, any("collectives" in r for r in results)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads x {parallel.size()} ranks, "
        f"{model.norm.weight.device}, {dtype_name(model.norm.weight.dtype)}, "
        f"dim {args.dim}, {args.n_layers} layers, vocabulary {args.vocab_size}\n"
        f"{', '.join(f'{name} {version}' for name, version in about.items())}\n"
        f"limits: read {limits['read'] / 1e9:.1f} GB/s, matrix {limits['matrix'] / 1e12:.3f} TFLOP/s\n"
    )
    columns = ("engine", "rows", "prompt", "first token, ms", "prefill, tokens/s", "of matrix", "prefill memory, MB",
               "decode, tokens/s", "of read", *["of step in collectives"] * shared)  # fmt: skip
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for r in results:
        lengths, first, step = r["prompts"], r["first_token_s"], r["step_s"]
        cells = (
            r["engine"],
            f"{len(lengths)}",
            "/".join(map(str, dict.fromkeys(lengths))),
            f"{first * 1e3:.1f}",
            f"{sum(lengths) / first:,.0f}",
            f"{r['operations'] / first / limits['matrix']:.0%}",
            "" if r["prefill_bytes"] is None else f"{r['prefill_bytes'] / 1e6:,.0f}",
            f"{len(lengths) / step:,.1f}",
            f"{r['bytes'] / step / limits['read']:.0%}",
            *[collectives_cell(**r.get("collectives", {}))] * shared,
        )
        print(f"| {' | '.join(cells)} |")
    print()


def collectives_cell(share: float | None = None, **calls: float) -> str:
    return "" if share is None else f"{share:.0%}: {', '.join(f'{count:g} {kind}' for kind, count in calls.items())}"


def summary(results: list[dict], limits: dict, model: Transformer, about: dict[str, str], name: str) -> dict:
    return {
        "date": date.today().isoformat(),
        "model": str(name),
        "device": str(model.norm.weight.device),
        "dtype": dtype_name(model.norm.weight.dtype),
        "ranks": parallel.size(),
        "threads": torch.get_num_threads(),
        "versions": about,
        "limits": limits,
        "results": results,
    }


if __name__ == "__main__":
    cli.run(main)
