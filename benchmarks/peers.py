"""Engines of other libraries for `bench.py`, over the same weights: transformers and llama.cpp.

llama.cpp takes part where `llama-cpp-python` and `gguf` are installed. Its default build crashes in its AMX path on
some virtual machines, so name the instruction sets that yours has; with AVX-512:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON" \
        pip install gguf llama-cpp-python==0.3.36
"""

import logging
import re
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.clock import Clocked, seconds
from benchmarks.ours import step_weights
from llama import Transformer, parallel

GGUF_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PAGE = 64  # positions of a page in transformers' continuous batching
NAMES = {  # ours: those of transformers and of llama.cpp
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output"),
    "layers": ("model.layers", "blk"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}


def check_peers() -> None:
    """Raise `ValueError` where peers cannot run."""
    if not find_spec("transformers"):
        install = "pip install -e '.[test]' -c constraints.txt"
        raise ValueError(f"--peers needs transformers, which the tests need too: {install}.")
    processes = parallel.world()[1]
    if processes > 1:
        raise ValueError(f"peers run in one process, not in {processes}; start bench.py without torchrun.")


def peer_engines(model: Transformer, steps: int) -> dict[str, Clocked]:
    """transformers and, where it is installed and the model on a CPU, llama.cpp; all weights are in memory at once."""
    check_peers()
    engines: dict[str, Clocked] = {"transformers": Transformers(model, steps)}
    if model.norm.weight.device.type == "cpu" and find_spec("llama_cpp") and find_spec("gguf"):
        for form in (GGUF_DTYPES[model.norm.weight.dtype], "Q8_0", "Q4_0"):
            engines[f"llama.cpp {form}"] = LlamaCpp(model, form)
    return engines


# --- transformers ------------------------------------------------------------------------------------------------


def transformers_model(model: Transformer):
    """LlamaForCausalLM over the same storage."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.params
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=args.ffn_hidden_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len,
        attn_implementation="sdpa",
        dtype=model.norm.weight.dtype,
    )
    with torch.device("meta"):
        peer = LlamaForCausalLM(config)
    peer.load_state_dict(peer_names(model, "transformers"), assign=True)
    rotary = type(peer.model.rotary_emb)
    peer.model.rotary_emb = rotary(config).to(model.norm.weight.device)
    return peer.eval()


def transformers_version() -> dict[str, str]:
    from transformers import __version__

    return {"transformers": __version__}


class Transformers(Clocked):
    """transformers' model, stepped by hand with a static cache.

    A cache for each number of rows and positions, no longer than they need, is made once, in the turn that warms up.
    """

    def __init__(self, model: Transformer, steps: int):
        self.version = transformers_version()
        self.model = transformers_model(model)
        self.device = self.model.device
        self.weight_bytes = step_weights(self.model, model)
        self.cache_itemsize = model.norm.weight.itemsize
        self.steps = steps
        self.caches = {}

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> None:
        """Shorter prompts are padded on the left, behind a mask."""
        from transformers import StaticCache

        longest = max(map(len, prompts))
        size = (len(prompts), longest + self.steps)
        if size not in self.caches:
            self.caches[size] = StaticCache(config=self.model.config, max_cache_len=size[1])
        self.cache = self.caches[size]
        self.cache.reset()

        tokens, seen = padded_left(prompts, self.device)
        ragged = len(set(map(len, prompts))) > 1
        self.seen = seen if ragged else None
        self.ids = self.run(tokens)

    @torch.no_grad()
    def step(self) -> None:
        if self.seen is not None:
            self.seen = torch.cat((self.seen, torch.ones_like(self.seen[:, :1])), dim=1)
        self.ids = self.run(self.ids[:, None])

    def run(self, tokens: Tensor) -> Tensor:
        """The likeliest token after the last of each row."""
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        if self.seen is not None:
            options["attention_mask"] = self.seen
            options["position_ids"] = (self.seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(input_ids=tokens, **options).logits[:, -1].argmax(-1)


def padded_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (B, T): zeros stand before a shorter prompt."""
    longest = max(map(len, prompts))
    tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(seen, device=device)


class TransformersQueue:
    """transformers' own ways to answer more prompts than it runs at once: padded chunks, and continuous batching."""

    def __init__(self, model: Transformer, rows: int, eos_id: int):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.version = transformers_version()
        self.rows = rows
        self.eos_id = eos_id
        self.config = GenerationConfig(do_sample=False, eos_token_id=eos_id, pad_token_id=0, max_new_tokens=1024)
        pages = -(-model.params.max_seq_len // PAGE)  # of a row
        self.cache = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=rows * pages,
            max_requests_per_batch=rows,
            max_batch_tokens=rows * PAGE,
        )
        self.padded = transformers_model(model)
        self.paged = transformers_model(model)  # `generate_batch` changes how its model attends
        self.device = self.padded.device

    @torch.no_grad()
    def rows_in_chunks(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        """Seconds, and the tokens of each answer; `generate` pads each chunk on the left."""
        answers: list[list[int]] = []

        def work() -> None:
            for first in range(0, len(prompts), self.rows):
                chunk = prompts[first : first + self.rows]
                tokens, seen = padded_left(chunk, self.device)
                found = self.padded.generate(tokens, attention_mask=seen, generation_config=self.config)
                answers.extend(found[:, tokens.shape[1] :].tolist())

        spent = seconds(work, self.device)
        return spent, [ids.index(self.eos_id) for ids in answers]

    @torch.no_grad()
    def rows_at_once(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        """The same with `generate_batch`, which lets rows come and go; its cache holds as many rows as ours."""
        found = {}

        def work() -> None:
            options = {"generation_config": self.config, "continuous_batching_config": self.cache}
            found.update(self.paged.generate_batch(prompts, **options))

        spent = seconds(work, self.device)
        return spent, [output.generated_tokens.index(self.eos_id) for output in found.values()]


# --- llama.cpp ---------------------------------------------------------------------------------------------------


class LlamaCpp(Clocked):
    """llama.cpp's model over a file of the same weights; a batch holds the new tokens of all rows, each a sequence.

    All is as it runs by default, its float16 cache too, but for the number of threads, which is torch's.
    """

    cache_itemsize = 2

    def __init__(self, model: Transformer, form: str):
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        llama_cpp.llama_backend_init()
        self.lib = llama_cpp
        system = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.version = {"llama-cpp-python": f"{llama_cpp.__version__} ({system})"}

        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            self.weight_bytes = write_gguf(path, model, form)
            weights = llama_cpp.llama_model_load_from_file(bytes(path), options)  # mapped: it outlives its name

        args = model.params
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = args.max_batch_size
        options.n_ctx = options.n_batch = args.max_seq_len * args.max_batch_size
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.vocab_size = args.vocab_size
        self.context = llama_cpp.llama_init_from_model(weights, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot run this shape as {form}; leave --peers out.")
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)

    def prefill(self, prompts: list[list[int]]) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.lengths = [0] * len(prompts)
        self.ids = self.run(prompts).argmax(-1)

    def step(self) -> None:
        self.ids = self.run([[id] for id in self.ids.tolist()]).argmax(-1)

    def run(self, rows: list[list[int]]) -> Tensor:
        """The logits after each row's last token, (B, V), until the next call."""
        from numpy.ctypeslib import as_array

        batch = self.batch
        at = 0
        for row, ids in enumerate(rows):
            for position, id in enumerate(ids, self.lengths[row]):
                batch.token[at] = id
                batch.pos[at] = position
                batch.logits[at] = False
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = row
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
    from gguf import GGUFWriter

    args = model.params
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)

    size = sum(add_tensors(writer, model, form))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def add_tensors(writer, model: Transformer, form: str) -> Iterator[int]:
    """Give the tensors to the writer, and yield the bytes of each that a step reads whole."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    forms = {"token_embd.weight": GGUF_DTYPES[model.norm.weight.dtype], "output.weight": form.replace("Q4", "Q8")}
    for name, weight in peer_names(model, "llama.cpp").items():
        kind = GGMLQuantizationType["F32" if weight.ndim == 1 else forms.get(name, form)]
        numbers = quantize(weight.float().numpy(), kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)
        if name != "token_embd.weight":
            yield numbers.nbytes


def peer_names(model: Transformer, peer: str) -> dict[str, Tensor]:
    """Our tensors under a peer's names, shared. Transformers wants q and k rows in another order: it costs nothing."""
    which = ("transformers", "llama.cpp").index(peer)
    renamed = {}
    for name, tensor in model.state_dict().items():
        layer, part = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups("")
        layer = layer.replace("layers", NAMES["layers"][which])
        renamed[f"{layer}{NAMES[part][which]}.weight"] = tensor
    return renamed
