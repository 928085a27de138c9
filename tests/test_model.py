"""The model, part by part and whole, against the float64 reference; its cache, chunks, rows, gradients and dtypes."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama.model import (
    KVCache,
    ModelArgs,
    RMSNorm,
    Transformer,
    apply_rotary_emb,
    paired,
    precompute_freqs_cis,
    repeat_kv,
    rotary_table,
    rotate,
)
from support import reference
from support.models import BASE_PARAMS, as_float64, build_model, random_weights, shape_of

VOCAB = BASE_PARAMS["vocab_size"]
GQA = BASE_PARAMS | {"n_kv_heads": 2}


@pytest.fixture
def weights(tiny_params):
    return random_weights(tiny_params, seed=1)


@pytest.fixture
def model(tiny_params, weights):
    return build_model(tiny_params, weights)


@pytest.fixture(scope="module")
def gqa_model():
    return build_model(GQA, random_weights(GQA, seed=2))


def some_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_cache(model_params, batch: int = 4, length: int = 64) -> KVCache:
    args = ModelArgs(**model_params, max_batch_size=batch, max_seq_len=length)
    return KVCache.allocate(args.cache_shape(), torch.float32, torch.device("cpu"))


def assert_close(ours: torch.Tensor, expected, tolerance: float) -> None:
    expected = torch.as_tensor(np.asarray(expected))
    assert ours.shape == expected.shape
    difference = (ours.detach().double() - expected.double()).abs().max().item()
    assert difference <= tolerance, f"off by {difference:.2e}, allowed {tolerance:.0e}"


# --- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_the_formula(scale):
    generator = torch.Generator().manual_seed(3)
    norm = RMSNorm(24, 1e-5)
    weight = torch.randn(24, generator=generator)
    norm.load_state_dict({"weight": weight})
    x = torch.randn(2, 5, 24, generator=generator) * scale
    assert_close(norm(x), reference.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5), 2e-6)


def test_rms_norm_squares_in_float32():
    """Squares of 1000 overflow float16; the norm of such a vector is still exactly plus or minus one."""
    norm = RMSNorm(16, 1e-5).half()
    x = torch.tensor([1000.0, -1000.0] * 8, dtype=torch.float16)
    assert norm(x).dtype == torch.float16
    assert_close(norm(x), [1.0, -1.0] * 8, 1e-3)


def test_rms_norm_on_three_numbers():
    norm = RMSNorm(3, 0.0)
    assert_close(norm(torch.tensor([1.0, 1.0, 5.0])), np.array([1.0, 1.0, 5.0]) / 3.0, 1e-6)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rotation_equals_the_complex_helper_and_the_definition(theta):
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(2, 9, 4, 8, generator=generator)
    keys = torch.randn(2, 9, 2, 8, generator=generator)
    cos, sin = rotary_table(8, 9, theta)
    assert cos.shape == sin.shape == (9, 4) and cos.dtype == sin.dtype == torch.float32
    by_complex = apply_rotary_emb(queries, keys, precompute_freqs_cis(8, 9, theta))
    for x, rotated in zip((queries, keys), by_complex, strict=True):
        expected = np.stack([reference.rotate_pairs(row.double().numpy(), range(9), theta) for row in x])
        assert_close(rotated, expected, 2e-6)
        assert_close(rotate(x, *paired(cos, sin)), expected, 2e-6)


def test_rotation_angles_are_accurate_at_the_end_of_a_long_context():
    cos, sin = rotary_table(128, 4096, 10000.0)
    freqs_cis = precompute_freqs_cis(128, 4096, 10000.0)
    angles = np.outer(np.arange(4096), 10000.0 ** (-np.arange(0, 128, 2) / 128))
    for ours in (cos, freqs_cis.real):
        assert_close(ours, np.cos(angles), 5e-4)
    for ours in (sin, freqs_cis.imag):
        assert_close(ours, np.sin(angles), 5e-4)


def test_precompute_freqs_cis_turns_by_position_times_frequency():
    freqs_cis = precompute_freqs_cis(4, 3, 100.0)
    assert freqs_cis.shape == (3, 2) and freqs_cis.dtype == torch.complex64
    assert_close(freqs_cis.angle(), [[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]], 1e-6)


def test_repeat_kv_repeats_each_head_in_place():
    x = torch.arange(2 * 3 * 2 * 1).reshape(2, 3, 2, 1)
    repeated = repeat_kv(x, 3)
    assert repeated.shape == (2, 3, 6, 1)
    assert repeated[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert repeated[1, 2, :, 0].tolist() == [10, 10, 10, 11, 11, 11]
    assert torch.equal(repeat_kv(x, 1), x)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "hidden"),
    [
        (4096, 256, None, 11008),  # Llama 2 7B
        (5120, 256, None, 13824),  # 13B
        (8192, 4096, 1.3, 28672),  # 70B
        (8192, 256, 1.0, 22016),  # Code Llama 34B
        (6656, 256, None, 17920),  # LLaMA 1 33B
        (64, 1, None, 170),  # 170.67 is cut, not rounded
        (64, 1, 2.0, 340),  # and cut before it is multiplied
        (32, 16, 1.3, 112),
    ],
)
def test_feed_forward_size_of_the_released_models(dim, multiple_of, multiplier, hidden):
    args = ModelArgs(dim=dim, n_heads=32, multiple_of=multiple_of, ffn_dim_multiplier=multiplier, vocab_size=8)
    assert args.ffn_hidden_dim == hidden
    assert args.head_dim == dim // 32


def test_default_args_are_the_7b_model():
    args = ModelArgs()
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size) == (
        4096,
        32,
        32,
        None,
        -1,
    )
    assert (args.multiple_of, args.ffn_dim_multiplier, args.norm_eps, args.rope_theta) == (
        256,
        None,
        1e-5,
        10000.0,
    )
    assert (args.max_batch_size, args.max_seq_len) == (32, 2048)


def watch(module: torch.nn.Module, seen: list) -> None:
    """Note what goes into and comes out of a part, whatever else it is called with."""
    module.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args[0] if args else kwargs["x"], out)),
        with_kwargs=True,
    )


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_each_part_equals_the_reference(tiny_params, weights, model, cached):
    """Every part of every layer is fed what the model feeds it, so that no error hides behind another."""
    arrays, shape = as_float64(weights), shape_of(tiny_params)
    seen = {}
    for n, layer in enumerate(model.layers):
        for name in ("", ".attention", ".feed_forward", ".attention_norm", ".ffn_norm"):
            watch(layer.get_submodule(name[1:]), seen.setdefault(f"layers.{n}{name}", []))
    watch(model.norm, seen.setdefault("norm", []))
    tokens = some_tokens(3, 17)
    with torch.no_grad():
        model(tokens, *([0] if cached else []))

    for name, calls in seen.items():
        ((x, out),) = calls
        for row in range(3):
            given_x = x[row].double().numpy()
            if name.endswith("norm"):
                expected = reference.rms_norm(given_x, arrays[f"{name}.weight"], shape.norm_eps)
            elif name.endswith("feed_forward"):
                expected = reference.feed_forward(given_x, arrays, name)
            elif name.endswith("attention"):
                expected = reference.attention(given_x, arrays, name, shape)[0]
            else:
                expected = reference.block(given_x, arrays, name, shape)[0]
            assert_close(out[row], expected, 2e-5)
    assert len(seen) == 11


# --- the whole model ---------------------------------------------------------------------------------------------


def test_logits_equal_the_reference(tiny_params, weights, model):
    tokens = some_tokens(3, 40)
    ours = model(tokens)
    assert ours.shape == (3, 40, VOCAB) and ours.dtype == torch.float32
    for row in range(3):
        expected = reference.logits(tokens[row].tolist(), as_float64(weights), shape_of(tiny_params))
        assert expected.std() > 1
        assert_close(ours[row], expected, 1e-4)


def test_one_key_value_head_equals_the_reference():
    params = BASE_PARAMS | {"n_kv_heads": 1, "n_layers": 3}
    weights = random_weights(params, seed=5)
    tokens = some_tokens(1, 12)
    ours = build_model(params, weights)(tokens, 0)
    assert_close(ours[0], reference.logits(tokens[0].tolist(), as_float64(weights), shape_of(params)), 1e-4)


def test_cache_holds_the_rotated_keys_and_the_values(tiny_params, weights, model):
    """(n_layers, B, K, S, D): each position's own key and value, and nothing beyond the last."""
    tokens = some_tokens(2, 11)
    cache = new_cache(tiny_params)
    shape = shape_of(tiny_params)
    assert cache.k.shape == cache.v.shape == (2, 4, shape.n_kv_heads, 64, 8)
    cache.k.zero_()
    cache.v.zero_()
    view = cache.window(0, 2, 32)
    assert len(view.keys) == len(view.values) == 2
    assert view.keys[0].shape == view.values[1].shape == (2, shape.n_kv_heads, 32, 8)
    model(tokens, positions=torch.zeros(2, dtype=torch.int64), cache=view)
    for row in range(2):
        _, keys, values = reference.run(tokens[row].tolist(), as_float64(weights), shape)
        assert_close(cache.k[:, row, :, :11].transpose(1, 2), keys, 2e-5)
        assert_close(cache.v[:, row, :, :11].transpose(1, 2), values, 2e-5)
    for tensor in (cache.k, cache.v):
        assert tensor[:, :, :, 11:].count_nonzero() == 0
        assert tensor[:, 2:].count_nonzero() == 0


def test_without_a_cache_equals_through_the_cache(model):
    tokens = some_tokens(4, 23)
    assert_close(model(tokens, 0), model(tokens).detach(), 1e-5)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_any_split_into_chunks_gives_the_same_logits(gqa_model, lengths, batch):
    tokens = some_tokens(batch, sum(lengths), seed=sum(lengths))
    whole = gqa_model(tokens).detach()
    start = 0
    for length in lengths:
        part = gqa_model(tokens[:, start : start + length], start)
        assert_close(part, whole[:, start : start + length], 2e-5)
        start += length


def test_rewinding_is_safe(model):
    """A second thought: positions after the rewind are overwritten, and stale ones beyond are never looked at."""
    first, second = some_tokens(2, 30, seed=1), some_tokens(2, 12, seed=2)
    model(first, 0)
    joined = torch.cat([first[:, :7], second], dim=1)
    assert_close(model(second, 7), model(joined)[:, 7:].detach(), 2e-5)
    assert_close(model(second[:1], 0), model(second[:1]).detach(), 2e-5)


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1000)), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_rows_at_their_own_positions_equal_one_by_one(gqa_model, rows, length):
    """Row b's new tokens go to positions[b] and after; the row alone, in one pass, gives the same logits."""
    sequences = [some_tokens(1, position + length, seed)[0] for position, seed in rows]
    longest = max(position for position, _ in rows)
    cache = new_cache(GQA).window(0, len(rows), 32)
    if longest:
        before = torch.zeros(len(rows), longest, dtype=torch.int64)
        for b, (position, _) in enumerate(rows):
            before[b, :position] = sequences[b][:position]
        gqa_model(before, positions=torch.zeros(len(rows), dtype=torch.int64), cache=cache)
    new = torch.stack([sequence[-length:] for sequence in sequences])
    positions = torch.tensor([position for position, _ in rows])
    together = gqa_model(new, positions=positions, cache=cache)
    for b, sequence in enumerate(sequences):
        assert_close(together[b], gqa_model(sequence[None])[0, -length:].detach(), 2e-5)


def test_logits_at_picks_one_position_a_row(model):
    tokens = some_tokens(3, 9)
    every = model(tokens).detach()
    at = torch.tensor([8, 0, 4])
    assert_close(model(tokens, logits_at=at), every[torch.arange(3), at], 1e-5)
    assert_close(model(tokens, 0, logits_at=at), every[torch.arange(3), at], 1e-5)


def test_the_output_layer_reads_the_normed_hidden_states(model):
    tokens = some_tokens(2, 6)
    seen = []
    handle = model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(tokens).detach()
    handle.remove()
    (hidden,) = seen
    assert hidden.shape == (2, 6, BASE_PARAMS["dim"])
    assert_close(model.output(hidden), logits, 1e-6)


def test_the_last_position_of_the_context_can_be_used(model):
    tokens = some_tokens(4, 64)
    whole = model(tokens).detach()
    model(tokens[:, :63], 0)
    assert_close(model(tokens[:, 63:], 63), whole[:, 63:], 2e-5)


# --- training ----------------------------------------------------------------------------------------------------


def test_gradients_equal_the_slope_of_the_reference(tiny_params, weights):
    """One weight of each kind, nudged in the float64 reference, moves the loss as the gradient says."""
    model = build_model(tiny_params, weights).train()
    tokens = some_tokens(1, 9)[0].tolist()
    loss = torch.nn.functional.cross_entropy(model(torch.tensor([tokens]))[0, :-1], torch.tensor(tokens[1:]))
    loss.backward()
    arrays, shape = as_float64(weights), shape_of(tiny_params)

    def reference_loss() -> float:
        return -sum(reference.token_log_probs(tokens, arrays, shape)) / (len(tokens) - 1)

    rng = random.Random(0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        assert parameter.grad.count_nonzero() > 0, name
        if ".1." in name or not name.startswith("layers"):
            index = tuple(int(i) for i in rng.choice(parameter.grad.nonzero().tolist()))
            value = arrays[name][index]
            arrays[name][index] = value + 1e-4
            up = reference_loss()
            arrays[name][index] = value - 1e-4
            slope = (up - reference_loss()) / 2e-4
            arrays[name][index] = value
            assert parameter.grad[index].item() == pytest.approx(slope, rel=1e-3, abs=2e-6), name


def test_the_cached_pass_keeps_no_graph(model):
    assert model(some_tokens(1, 4)).requires_grad
    assert not model(some_tokens(1, 4), 0).requires_grad


def test_new_models_start_small_and_normed():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**BASE_PARAMS | {"dim": 64}, max_batch_size=1, max_seq_len=8))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002, name


# --- dtypes and state --------------------------------------------------------------------------------------------


class DtypeWatch(TorchDispatchMode):
    """Collects the dtype of every tensor that goes into or comes out of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs or {}, out)):
            if isinstance(leaf, torch.Tensor):
                self.seen.add(leaf.dtype)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_complex_and_no_float64_in_the_forward_pass(tiny_params, weights, dtype):
    model = build_model(tiny_params, weights).to(dtype)
    tokens = some_tokens(2, 5)
    with DtypeWatch() as watching:
        assert model(tokens).dtype == torch.float32
        model(tokens, 0)
        assert model(tokens[:, :1], 5).dtype == torch.float32
    assert torch.float32 in watching.seen
    assert not watching.seen & {torch.complex32, torch.complex64, torch.complex128, torch.float64}


def test_bfloat16_weights_stay_near_the_reference(tiny_params, weights):
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    model = build_model(tiny_params, weights).bfloat16()
    tokens = some_tokens(1, 12)
    expected = reference.logits(tokens[0].tolist(), as_float64(rounded), shape_of(tiny_params))
    error = model(tokens)[0].detach().double().numpy() - expected
    assert np.sqrt((error**2).mean()) < 0.03 * expected.std()


def test_rotary_and_norm_stay_float32_precise_in_half_precision():
    """Position 2047 turns by 2047 radians: in bfloat16 that number is off by several full turns."""
    cos, sin = rotary_table(8, 2048, 10000.0)
    x = torch.randn(1, 2048, 1, 8, generator=torch.Generator().manual_seed(6)).bfloat16()
    expected = reference.rotate_pairs(x[0].double().numpy(), range(2048), 10000.0)
    assert rotate(x, *paired(cos, sin)).dtype == torch.bfloat16
    assert_close(rotate(x, *paired(cos, sin))[0], expected, 2**-6)


def test_the_meta_device_builds_a_model_without_memory():
    with torch.device("meta"):
        model = Transformer(ModelArgs(vocab_size=32000, max_batch_size=1, max_seq_len=16))
    parameters = dict(model.named_parameters())
    assert all(p.is_meta for p in parameters.values())
    assert sum(p.numel() for p in parameters.values()) == 6_738_415_616  # Llama 2 7B
    assert parameters["layers.31.feed_forward.w2.weight"].shape == (4096, 11008)


def test_parameter_names_are_the_checkpoint_keys(tiny_params, weights, model):
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def test_global_state_is_untouched(tiny_params, weights):
    """Construction may draw its weights from the global generator; nothing else moves, and a forward pass nothing."""
    defaults = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
    model = build_model(tiny_params, weights)
    state = torch.get_rng_state()
    model(some_tokens(2, 5))
    model(some_tokens(2, 5), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert defaults == (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
    )
    assert all(p.requires_grad for p in model.parameters())


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [np.int64(3), torch.tensor(3), True])
def test_start_pos_may_be_any_integer(model, start):
    tokens = some_tokens(1, 6)
    model(tokens, 0)
    assert_close(model(tokens[:, int(start) :], start), model(tokens).detach()[:, int(start) :], 2e-5)


@pytest.mark.parametrize("start", [1.0, "3", torch.tensor([1, 2]), np.array(1.5)])
def test_a_start_pos_that_is_no_integer_is_named(model, start):
    with pytest.raises(ValueError, match=r"^start_pos is .*; it must be an integer"):
        model(some_tokens(2, 3), start)


@pytest.mark.parametrize("start", [-1, 62, 1000])
def test_a_start_pos_outside_the_context_is_named(model, start):
    with pytest.raises(ValueError, match=rf"^Positions {start} to {start + 2} exceed max_seq_len 64\.$"):
        model(some_tokens(2, 3), start)


@pytest.mark.parametrize(
    "positions",
    [
        3,
        [0, 1],
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0]),
        torch.tensor([[0], [1]]),
        torch.ones(2),
    ],
    ids=str,
)
def test_positions_of_another_kind_are_named(model, positions):
    with pytest.raises(ValueError, match=r"^positions are .*; they must be an int64 tensor of shape \(2,\)"):
        model(some_tokens(2, 3), positions=positions)


@pytest.mark.parametrize("positions", [[-1, 0], [0, 62], [64, 3]])
def test_positions_outside_the_context_are_named(model, positions):
    with pytest.raises(ValueError, match=r"^Positions -?\d+ to \d+ exceed max_seq_len 64\.$"):
        model(some_tokens(2, 3), positions=torch.tensor(positions))


def test_start_pos_and_positions_exclude_each_other(model):
    with pytest.raises(ValueError, match="Both start_pos and positions"):
        model(some_tokens(2, 3), 0, positions=torch.tensor([0, 1]))


def test_a_cache_needs_a_position(model, tiny_params):
    with pytest.raises(ValueError, match="give start_pos or positions"):
        model(some_tokens(2, 3), cache=new_cache(tiny_params))


# --- inference mode ----------------------------------------------------------------------------------------------


def test_what_is_made_in_inference_mode_serves_outside_of_it(tiny_params, weights):
    """The rotary table and the cache, first made there, broke each later call outside: they were inference tensors."""
    model = build_model(tiny_params, weights)
    tokens = some_tokens(2, 5)
    with torch.inference_mode():
        expected = model(tokens, 0).clone()

    assert torch.equal(model(tokens, 0), expected)
    loss = model(tokens).square().mean()
    loss.backward()
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0
