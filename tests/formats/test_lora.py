"""LoRA adapters: logits equal those of PEFT's own merged model, on any base and at any number of ranks."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama
from llama.formats import slicing
from llama.formats.lora import Adapter
from support.checkpoints import write_checkpoint
from support.models import hidden_size
from support.refusals import refusal
from support.transformers_names import renamed

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 480, "multiple_of": 16, "norm_eps": 1e-5}
BASES = {"mha": PARAMS, "gqa": PARAMS | {"n_kv_heads": 2}}
TOKENS = torch.randint(0, 480, (2, 24), generator=torch.Generator().manual_seed(4))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "attention": {"target_modules": ATTENTION},
    "all": {"target_modules": ALL, "lora_alpha": 5},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"k_proj": 2, r"layers\.0\..*": 11},
    },
    "rslora_patterns": {"target_modules": ["k_proj"], "use_rslora": True, "rank_pattern": {".*1.self_attn.k_proj": 3}},
    "embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "one_layer": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
}


def new_base(params: dict) -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=hidden_size(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rms_norm_eps=params["norm_eps"],
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def meta_weights(model: LlamaForCausalLM, params: dict) -> dict[str, torch.Tensor]:
    return renamed(model.state_dict(), params["n_heads"], params.get("n_kv_heads") or params["n_heads"])


def write_adapter(folder: Path, params: dict, settings: dict, safetensors: bool = True) -> LlamaForCausalLM:
    """Save a random adapter as PEFT does; return the model as PEFT merges it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(new_base(params), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.2)
    model.save_pretrained(str(folder), safe_serialization=safetensors)
    return model.merge_and_unload().eval()


def logits(folder: Path, **options) -> torch.Tensor:
    return Llama.build(folder, device="cpu", max_seq_len=64, **options).model(TOKENS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer_path) -> dict[str, tuple[Path, Path]]:
    """Each base in Meta's layout and in Hugging Face's."""
    folders = {}
    for name, params in BASES.items():
        meta, hugging_face = tmp_path_factory.mktemp(f"{name}-meta"), tmp_path_factory.mktemp(f"{name}-hf")
        write_checkpoint(meta, params, meta_weights(new_base(params), params), tokenizer_path, shards=2)
        new_base(params).save_pretrained(str(hugging_face))
        (hugging_face / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        folders[name] = meta, hugging_face
    return folders


@pytest.fixture(scope="module")
def simple(tmp_path_factory) -> Path:
    """An adapter of all matrices for the "gqa" base, for tests to copy and spoil."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, BASES["gqa"], SETTINGS["all"])
    return folder


# --- parity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_adapter_gives_the_logits_of_pefts_merged_model(tmp_path, bases, base, settings):
    merged = write_adapter(tmp_path, BASES[base], SETTINGS[settings])
    with torch.no_grad():
        expected, plain = merged(TOKENS).logits, new_base(BASES[base])(TOKENS).logits
    assert (expected - plain).abs().max() > 0.1, "an adapter that changes nothing would prove nothing"
    for folder in bases[base]:
        assert (logits(folder, lora=tmp_path) - expected).abs().max() < 1e-4


def test_adapter_in_a_pickle_gives_the_same(tmp_path, bases):
    merged = write_adapter(tmp_path, BASES["gqa"], SETTINGS["all"], safetensors=False)
    assert not list(tmp_path.glob("*.safetensors"))
    with torch.no_grad():
        expected = merged(TOKENS).logits
    assert (logits(bases["gqa"][0], lora=str(tmp_path)) - expected).abs().max() < 1e-4


def test_adapter_that_is_not_given_changes_nothing(bases):
    with torch.no_grad():
        expected = new_base(BASES["gqa"])(TOKENS).logits
    assert (logits(bases["gqa"][0]) - expected).abs().max() < 1e-4


def local_shape(name: str, whole: torch.Size, size: int, head_dim: int) -> tuple[int, ...]:
    """The shape of one of `size` ranks' share; of wk and wv at least one head, of the output layer rounded up."""
    part, shape = name.split(".")[-2], list(whole)
    if part in ("wk", "wv"):
        shape[0] = max(shape[0] // size, head_dim)
    elif part in slicing.CUT:
        dim = slicing.CUT[part]
        shape[dim] = -(-shape[dim] // size)
    return tuple(shape)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adapter_is_cut_for_every_rank(tmp_path, size):
    """Also where ranks outnumber key-value heads (2), and where they do not divide the vocabulary (481)."""
    params = BASES["gqa"] | {"vocab_size": 481}
    settings = SETTINGS["all"] | {"modules_to_save": ["embed_tokens", "lm_head"]}
    merged = meta_weights(write_adapter(tmp_path, params, settings), params)
    base = meta_weights(new_base(params), params)
    shapes = {name: local_shape(name, weight.shape, size, 8) for name, weight in base.items()}
    for rank in range(size):
        cut = functools.partial(slicing.cut_for_rank, rank=rank, size=size, vocab_size=481, kv_rows=16, head_dim=8)
        expected = dict(cut(merged, shapes))
        ours = dict(cut(Adapter(tmp_path, 2, 8).apply(base), shapes))
        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


def test_adapter_sum_is_rounded_once(tmp_path, bases, simple, tokenizer_path):
    """In bfloat16, rounding the product before the sum as well would change some of the last bits."""
    state = {name: weight.bfloat16() for name, weight in meta_weights(new_base(BASES["gqa"]), BASES["gqa"]).items()}
    write_checkpoint(tmp_path, BASES["gqa"], state, tokenizer_path)
    model = Llama.build(tmp_path, device="cpu", dtype="bfloat16", lora=simple).model
    tensors = load_file(simple / "adapter_model.safetensors")
    for ours, theirs in (("attention.wv", "self_attn.v_proj"), ("feed_forward.w2", "mlp.down_proj")):
        a, b = (tensors[f"base_model.model.model.layers.1.{theirs}.lora_{factor}.weight"] for factor in "AB")
        base = state[f"layers.1.{ours}.weight"]
        once = (base.float() + 5 / 4 * (b @ a)).bfloat16()
        twice = base + (5 / 4 * (b @ a)).bfloat16()
        assert torch.equal(model.state_dict()[f"layers.1.{ours}.weight"], once) and not torch.equal(once, twice)
        assert model.state_dict()[f"layers.1.{ours}.weight"].dtype == torch.bfloat16


# --- refusals ----------------------------------------------------------------------------------------------------


def spoiled(tmp_path: Path, simple: Path, config: dict | None = None, change=None) -> Path:
    """A copy of the adapter with entries of its config replaced (by None: removed) and `change` made to its tensors."""
    entries = json.loads((simple / "adapter_config.json").read_text()) | (config or {})
    entries = {key: value for key, value in entries.items() if value is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    tensors = load_file(simple / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [3]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("something_new", 3),
    ],
)
def test_adapter_settings_that_are_not_merged_are_refused_by_name(tmp_path, bases, simple, key, value):
    folder = spoiled(tmp_path, simple, {key: value})
    with pytest.raises(
        ValueError, match=rf"asks for {key} {value!r}, which this library does not merge".replace("[", r"\[")
    ):
        logits(bases["gqa"][0], lora=folder)


PREFIX = "base_model.model.model"
OTHER_TENSORS = {
    f"{PREFIX}.layers.0.self_attn.q_proj.lora_magnitude_vector": (32,),
    f"{PREFIX}.layers.0.self_attn.q_proj.lora_B.bias": (32,),
    f"{PREFIX}.layers.0.self_attn.q_proj.weight": (32, 32),
    f"{PREFIX}.layers.0.input_layernorm.weight": (32,),
    f"{PREFIX}.layers.2.self_attn.q_proj.lora_A.weight": (4, 32),
    f"{PREFIX}.embed_tokens.lora_embedding_A": (4, 480),
    f"{PREFIX}.norm.weight": (32,),
    f"{PREFIX}.norm.lora_A.weight": (4, 32),
    "base_model.model.lm_head.lora_A.weight": (4, 32),
    "base_model.model.lm_head.bias": (480,),
    "model.layers.0.self_attn.v_proj.lora_A.weight": (4, 32),
    "base_model.model.score.weight": (2, 32),
    "layers": (1,),
}


@pytest.mark.parametrize("name", OTHER_TENSORS)
def test_adapter_tensors_that_are_not_merged_are_refused_by_name(tmp_path, bases, simple, name):
    folder = spoiled(tmp_path, simple, change=lambda tensors: tensors.update({name: torch.ones(OTHER_TENSORS[name])}))
    with pytest.raises(ValueError, match=f"changes {name}, which this library cannot merge into 2 layers"):
        logits(bases["gqa"][0], lora=folder)


V0 = f"{PREFIX}.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{V0}.lora_B.weight"), r"lora_A \(4, 32\), lora_B None of model.layers.0.self_attn.v_proj"),
        (lambda t: t.pop(f"{V0}.lora_A.weight"), r"lora_A None, lora_B \(16, 4\) of model.layers.0.self_attn.v_proj"),
        (lambda t: t.update({f"{V0}.lora_A.weight": torch.ones(3, 32)}), r"lora_A \(3, 32\).* need rank 4"),
        (lambda t: t.update({f"{V0}.lora_B.weight": torch.ones(16, 5)}), r"lora_B \(16, 5\).* need rank 4"),
        (lambda t: t.update({f"{V0}.lora_A.weight": torch.ones(0)}), r"lora_A \(0,\).* need rank 4"),
        (lambda t: t.update({f"{V0}.lora_B.weight": torch.ones(4)}), r"lora_B \(4,\).* need rank 4"),
    ],
)
def test_adapter_factors_that_do_not_fit_are_refused(tmp_path, bases, simple, change, message):
    with pytest.raises(ValueError, match=message):
        logits(bases["gqa"][0], lora=spoiled(tmp_path, simple, change=change))


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        (
            PARAMS | {"n_kv_heads": 2, "dim": 64},
            {"target_modules": ["q_proj"]},
            r"its layers.0.attention.wq.weight has the shape \(64, 64\), but the base describes \(32, 32\)",
        ),
        (
            PARAMS,  # multi-head, for a base of two key-value heads
            {"target_modules": ATTENTION},
            r"its layers.0.attention.wk.weight has the shape \(32, 32\), but the base describes \(16, 32\)",
        ),
        (
            BASES["gqa"] | {"vocab_size": 490},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            r"its tok_embeddings.weight has the shape \(490, 32\), but the base describes \(480, 32\)",
        ),
    ],
)
def test_adapter_for_another_base_is_named_by_layer(tmp_path, bases, params, settings, message):
    write_adapter(tmp_path, params, settings)
    for folder in bases["gqa"]:
        with pytest.raises(ValueError, match=r"fits another base: " + message):
            logits(folder, lora=tmp_path)


def test_adapter_files_that_are_missing_or_damaged_are_named(tmp_path, bases, simple):
    with pytest.raises(FileNotFoundError, match=r"No adapter_config\.json"):
        logits(bases["gqa"][0], lora=tmp_path)
    folder = spoiled(tmp_path, simple)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is cut short"):
        logits(bases["gqa"][0], lora=folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"No adapter_model\.safetensors or adapter_model\.bin in"):
        logits(bases["gqa"][0], lora=folder)


@pytest.mark.parametrize("value", [True, 7, ["adapter"]], ids=repr)
def test_adapter_that_is_no_path_is_refused(bases, value):
    refusal(lambda: logits(bases["gqa"][0], lora=value), f"lora is {value!r}", "the folder that holds the adapter")


def test_adapter_pickle_with_code_is_not_run(tmp_path, bases, simple):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    spoiled(tmp_path, simple)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Code()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="which was not run"):
        logits(bases["gqa"][0], lora=tmp_path)


def test_adapter_without_safetensors_names_the_extra(bases, simple, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        logits(bases["gqa"][0], lora=simple)


def test_adapter_scaling_is_by_the_rank_or_its_root(tmp_path):
    """alpha / r and alpha / sqrt(r), read off a product of ones."""
    for rslora, scale in ((False, 6 / 4), (True, 6 / math.sqrt(4))):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": rslora}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        name = f"{PREFIX}.layers.0.mlp.up_proj.lora_"
        save_file(
            {f"{name}A.weight": torch.ones(4, 3), f"{name}B.weight": torch.ones(5, 4)},
            tmp_path / "adapter_model.safetensors",
        )
        product = Adapter(tmp_path, 1, 2).changes["layers.0.feed_forward.w3.weight"]
        assert torch.equal(product.narrow(0, 1, 2), torch.full((2, 3), 4 * scale))
        assert torch.equal(product.narrow(1, 1, 2), torch.full((5, 2), 4 * scale))
