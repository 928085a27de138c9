"""Weight-only quantization: numbers, products in every kernel, whole models, loading, ranks, stored checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F

from llama import Llama, kernels, loading
from llama.convert import convert
from llama.kernels import FORMATS, GROUP, Int4, Int8
from llama.model import ModelArgs
from support.checkpoints import write_checkpoint
from support.launching import launch
from support.models import build_model, random_weights

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 480, "multiple_of": 64}
SHAPES = [(64, 64), (128, 32), (192, 96), (480, 64), (50, 64)]  # the last two have no whole blocks of 64 rows
PROMPTS = [[1, 400, 7, 33], [1, 5], [1, *range(40, 60)]]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def packed(kind: str, weight: torch.Tensor) -> kernels.Quantized:
    """Quantized, and in the layout of this processor's kernel."""
    result = FORMATS[kind](*weight.shape)
    result.quantize(weight)
    result.pack()
    return result


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape):
    weight = matrix(*shape)
    found = Int8(*shape)
    found.quantize(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert found.int8.dtype == torch.int8 and found.int8.abs().max() <= 127
    assert ((found.dequantized() - weight).abs() <= 1.01 * step).all()  # bfloat16 scales may clip the largest
    assert (found.dequantized() - weight).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_better_than_rounding_between_the_extremes(shape):
    weight = matrix(*shape)
    found = Int4(*shape)
    found.quantize(weight)
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    error = (found.dequantized() - weight).norm()
    assert error < 0.95 * (plain.flatten(1) - weight).norm()
    assert error < 0.1 * weight.norm()


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_of_one_value_and_of_nothing(kind):
    for value in (0.0, 0.5, -2.0):
        weight = torch.full((64, 64), value)
        torch.testing.assert_close(packed(kind, weight).dequantized(), weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_beside_an_outlier_suffer_in_its_row_or_group_alone(kind):
    weight = matrix(64, 128)
    weight[3, 5] = 50.0
    error = (packed(kind, weight).dequantized() - weight).abs()
    hurt = error > 0.02
    assert hurt[3].any()
    hurt[3, : 128 if kind == "int8" else GROUP] = False
    assert not hurt.any()


def test_numbers_of_large_matrices_are_taken_some_rows_at_a_time(monkeypatch):
    weight = matrix(192, 64)
    for kind in FORMATS:
        whole = packed(kind, weight).dequantized()
        monkeypatch.setattr(kernels, "ROWS_AT_ONCE", 50)
        assert torch.equal(packed(kind, weight).dequantized(), whole)


def test_int4_needs_whole_groups():
    with pytest.raises(ValueError, match="a multiple of 32 columns, not 40"):
        Int4(64, 40)


def test_int4_bytes_hold_the_even_column_in_their_lower_half():
    """Writing and reading must not change together: what was stored once has to stay readable.

    A row of 0 1 2 ... 15, twice, is exact at the scale 1 and the zero 8.
    """
    row = [*range(16), *range(16)]
    found = Int4(1, GROUP)
    found.quantize(torch.tensor([row], dtype=torch.float32))
    assert found.int4.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert (found.scale.item(), found.zero.item()) == (1.0, 8.0)
    found.int4 = torch.tensor([[0x21, 0x43, *[0x88] * 14]], dtype=torch.uint8)
    assert found.dequantized()[0].tolist() == [1.0, 2.0, 3.0, 4.0, *[8.0] * 28]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(64, 64), (50, 64)])
def test_state_dict_has_the_parts_of_a_packed_matrix(kind, shape):
    """A packed int4 matrix was missing from it, and a checkpoint of such a model lacked all of its layers."""
    plain = FORMATS[kind](*shape)
    plain.quantize(matrix(*shape))
    held = packed(kind, matrix(*shape))
    saved = held.state_dict()
    assert list(saved) == list(plain.parts)
    for name, tensor in plain.state_dict().items():
        assert saved[name].equal(tensor) and saved[name].is_contiguous(), name

    other = packed(kind, matrix(*shape, seed=1))
    was_packed = getattr(other, "packed", None) is not None
    other.load_state_dict(saved)
    assert other.dequantized().equal(plain.dequantized())
    assert (getattr(other, "packed", None) is not None) == was_packed
    x = matrix(2, shape[1], seed=2)
    assert other(x).equal(held(x))


# --- products ----------------------------------------------------------------------------------------------------


def test_int4_layout_of_this_processor_is_understood():
    """Otherwise the next tests would compare one path with itself."""
    assert kernels.block_width() in (16, 32)
    assert packed("int4", matrix(64, 64)).packed is not None
    assert packed("int4", matrix(50, 64)).packed is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 96)])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_the_dequantized_matrix(kind, shape, dtype, monkeypatch):
    """Few rows go through bfloat16, whose relative rounding is 2^-9, many are as exact as their number format.

    However many of the matrix's rows are written out at once.
    """
    weight, most = packed(kind, matrix(*shape)), FORMATS[kind].packed_rows
    for rows in ((1,), (1, 1), (2, 3), (most,), (most + 1,), (4, 30)):
        x = matrix(max(rows), shape[1], seed=1).expand(*rows, -1).contiguous().to(dtype)
        found, expected = weight(x), F.linear(x.float(), weight.dequantized())
        assert found.dtype == dtype and found.shape == expected.shape
        few = torch.Size(rows).numel() <= most
        tolerance = 6e-3 if few or dtype == torch.bfloat16 else 1e-5
        assert (found.float() - expected).norm() <= tolerance * expected.norm(), rows
    monkeypatch.setattr(kernels, "WRITTEN_OUT", 1)
    torch.testing.assert_close(weight(x), found)


@pytest.mark.parametrize("kind", FORMATS)
def test_products_in_float16_stay_finite(kind):
    """Sums of x and q alone, before the scale, would exceed 65504."""
    weight, x = packed(kind, matrix(64, 4096)), 40 * matrix(80, 4096, seed=1).sign()
    expected = F.linear(x, weight.dequantized())
    for rows in (4, 80):
        assert (weight(x[:rows].half()).float() - expected[:rows]).norm() < 6e-3 * expected[:rows].norm()


def test_products_of_an_inner_size_that_torch_gets_wrong():
    """torch's int8 kernel needs multiples of 16 and does not say so."""
    weight, x = packed("int8", matrix(64, 24)), matrix(1, 24, seed=1)
    torch.testing.assert_close(weight(x), F.linear(x, weight.dequantized()))


# --- whole models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path):
    weights = random_weights(PARAMS, seed=5)
    return write_checkpoint(tmp_path_factory.mktemp("plain"), PARAMS, weights, tokenizer_path)


def build(folder, **options) -> Llama:
    return Llama.build(folder, max_seq_len=48, max_batch_size=4, device="cpu", **options)


def dequantized_weights(kind: str) -> dict[str, torch.Tensor]:
    """What a model quantized to `kind` should compute with: layers in it, the output in int8, the rest untouched."""
    weights = random_weights(PARAMS, seed=5)
    for name, weight in weights.items():
        if "layers" in name and "norm" not in name:
            weights[name] = packed(kind, weight).dequantized()
        if name == "output.weight":
            weights[name] = packed("int8", weight).dequantized()
    return weights


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_model_is_that_of_the_dequantized_weights(folder, kind, capfd):
    llama = build(folder, quantize=kind)
    assert f"float32 with {kind} matrices" in capfd.readouterr().err
    plain = build_model(PARAMS, dequantized_weights(kind), max_seq_len=48)
    tokens = torch.tensor([PROMPTS[2]] * 4)
    with torch.no_grad():
        torch.testing.assert_close(llama.model(tokens), plain(tokens), atol=2e-4, rtol=0)  # many rows: exact
        few = llama.model(tokens[:1, :4])
        assert (few - plain(tokens[:1, :4])).norm() < 0.02 * few.norm()
    assert torch.equal(llama.model.tok_embeddings.weight, random_weights(PARAMS, seed=5)["tok_embeddings.weight"])
    assert llama.generate(PROMPTS, 6, temperature=0) == llama.generate(PROMPTS, 6, temperature=0)


def test_quantized_logits_stay_near_the_original(folder):
    """The relative error of all logits. Random weights are the worst case: there is nothing to be robust for."""
    tokens = torch.tensor([PROMPTS[2]])
    original = build(folder).model(tokens).detach()
    errors = {kind: build(folder, quantize=kind).model(tokens).detach() - original for kind in FORMATS}
    assert errors["int8"].norm() < 0.06 * original.norm()
    assert errors["int8"].norm() < errors["int4"].norm() < 0.6 * original.norm()


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_model_holds_what_is_said(folder, kind):
    model = build(folder, quantize=kind).model
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    said = loading.held(model.params, 4, kind, 1)[0]
    assert said <= held <= 1.05 * said


# --- stored quantized --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_checkpoint_is_the_state_of_the_model(folder, tmp_path, kind):
    """`state_dict()` of a model that was quantized here is, tensor for tensor, what `convert` writes."""
    convert(folder, tmp_path / "small", quantize=kind)
    stored = torch.load(tmp_path / "small" / "consolidated.00.pth", weights_only=True)
    state = build(folder, quantize=kind).model.state_dict()
    assert stored.keys() == state.keys()
    assert not [name for name in stored if not stored[name].equal(state[name])]


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_checkpoint_loads_without_the_original(folder, tmp_path, kind):
    convert(folder, tmp_path / "small", quantize=kind)
    stored, fresh = build(tmp_path / "small"), build(folder, quantize=kind)
    tokens = torch.tensor([PROMPTS[2]])
    assert torch.equal(stored.model(tokens), fresh.model(tokens))
    assert stored.generate(PROMPTS, 6, temperature=0) == fresh.generate(PROMPTS, 6, temperature=0)
    names = torch.load(tmp_path / "small" / "consolidated.00.pth", weights_only=True).keys()
    assert f"layers.0.attention.wq.weight.{kind}" in names and "output.weight.int8" in names
    assert "tok_embeddings.weight" in names and "layers.1.ffn_norm.weight" in names
    size = (tmp_path / "small" / "consolidated.00.pth").stat().st_size
    assert size < 0.7 * (folder / "consolidated.00.pth").stat().st_size
    build(tmp_path / "small", quantize=kind)  # saying what it is anyway is fine
    other = next(name for name in FORMATS if name != kind)
    for options in ({"quantize": other}, {"lora": tmp_path}):
        with pytest.raises(ValueError, match=f"quantized to {kind}; start from the original"):
            build(tmp_path / "small", **options)


def test_quantized_checkpoint_without_a_part_is_named(folder, tmp_path):
    convert(folder, tmp_path / "small", quantize="int8")
    path = tmp_path / "small" / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    del state["layers.1.feed_forward.w2.weight.scale"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"lacks layers\.1\.feed_forward\.w2\.weight\.scale"):
        build(tmp_path / "small")


def test_quantized_format_that_is_unknown_is_named(folder):
    with pytest.raises(ValueError, match=r"quantize is 'fp8'.*int8, int4"):
        build(folder, quantize="fp8")


def test_quantized_formats_that_fit_the_memory_are_named(monkeypatch):
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, max_batch_size=1, max_seq_len=128)
    monkeypatch.setattr(loading, "free_memory", lambda device: 8 * 10**9)
    with pytest.raises(RuntimeError, match="quantize='int8', or quantize='int4'"):
        loading.check_memory(args, torch.bfloat16, torch.device("cpu"))
    loading.check_memory(args, torch.bfloat16, torch.device("cpu"), "int8")
    monkeypatch.setattr(loading, "free_memory", lambda device: 5 * 10**9)
    with pytest.raises(RuntimeError, match=r"in int8 exceed"):
        loading.check_memory(args, torch.bfloat16, torch.device("cpu"), "int8")


# --- several ranks -----------------------------------------------------------------------------------------------


def test_quantized_ranks_compute_what_one_does(folder, tmp_path, tokenizer_path):
    """Scales of int8 cover whole rows: cut on columns and quantized apart, the ranks' numbers differ a little."""
    write_checkpoint(tmp_path / "int8 now", PARAMS, random_weights(PARAMS, seed=5), tokenizer_path)
    cases = {"int8 now": {"quantize": "int8"}}
    for kind in FORMATS:
        convert(folder, tmp_path / kind, quantize=kind)
        cases[kind] = {}
    tokens = [[list(range(1, 30))] * 3, [[1, 7]]]
    (tmp_path / "requests.json").write_text(json.dumps({"quantized": cases, "tokens": tokens}))
    one, two = (launch(tmp_path, "quantized", ranks) for ranks in (1, 2))
    assert one.code == two.code == 0, one.err + two.err
    for name in cases:
        for few, (theirs, ours) in enumerate(zip(one.ranks[0][name], two.ranks[0][name], strict=True)):
            theirs, ours = torch.tensor(theirs), torch.tensor(ours)
            tolerance = 0.02 if few or name == "int8 now" else 1e-5
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), name
        assert two.ranks[0][name] == two.ranks[1][name]
