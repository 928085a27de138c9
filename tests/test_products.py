"""Packed copies of matrices: the same products, whoever changes the weights; where the rule packs; what it tells."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from llama import ModelArgs, Transformer, loading, packing
from llama.packing import Packing, Processor, processor
from llama.parallel import ColumnParallelLinear
from support.checkpoints import write_checkpoint
from support.folders import PARAMS, PROMPTS, build, weights
from support.launching import launch, succeeded
from support.models import build_model, random_weights
from support.refusals import refusal

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
AMD = Processor("AuthenticAMD", avx512=True, bfloat16=True)
INTEL = Processor("GenuineIntel", avx512=True, bfloat16=True)
GB = 10**9

needs_packing = pytest.mark.skipif(not packing.can_pack(processor(), F32), reason="this torch has no oneDNN")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_layer(which: Packing | None = None, columns: int = 256, rows: int = 512) -> ColumnParallelLinear:
    """A layer with a packed copy of its weight, ready to compute without gradients."""
    layer = ColumnParallelLinear(columns, rows)
    layer.weight.data = numbers(rows, columns)
    layer.requires_grad_(False)
    packing.pack_matrices(layer, which or Packing())
    return layer


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """The rows of every product that a packed copy computed."""
    rows = []

    def suits(self, x, weight, suits=packing.Packed.suits):
        found = suits(self, x, weight)
        if found:
            rows.append(x.shape[:-1].numel())
        return found

    monkeypatch.setattr(packing.Packed, "suits", suits)
    return rows


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.fixture
def folder(tmp_path, tokenizer_path):
    return write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path)


# --- products ----------------------------------------------------------------------------------------------------


@needs_packing
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (4, 1), (16, 1), (3, 7), (64, 1), (0, 4)])
@pytest.mark.parametrize("columns, rows", [(256, 512), (96, 50), (33, 7)])
def test_packed_products_are_the_plain_ones(used, shape, columns, rows):
    layer = packed_layer(columns=columns, rows=rows)
    x = numbers(*shape, columns, seed=1)
    y = layer(x)
    assert y.shape == (*shape, rows) and y.is_contiguous()
    assert near(y, F.linear(x, layer.weight)) and len(used) == (x.numel() > 0)
    across = numbers(*shape[:-1], columns, 5, seed=2).transpose(-1, -2)
    assert near(layer(across), F.linear(across, layer.weight)), "of an x that is not contiguous"


@pytest.mark.skipif(not packing.can_pack(processor(), BF16), reason="this processor has no bfloat16")
def test_packed_products_in_bfloat16_are_within_its_rounding():
    """Both ways add up in float32 and round once: they differ by at most the last of bfloat16's 8 bits."""
    layer = packed_layer().bfloat16()
    for rows in (1, 4, 16, 64):
        x = numbers(rows, 256, seed=1).bfloat16()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=2**-7, atol=2**-7)


@needs_packing
def test_packed_copies_compute_the_rows_for_which_they_are_faster(used):
    layer = packed_layer(Packing(least_rows=4, most_rows=64))
    for rows in (1, 3, 4, 64, 65):
        layer(numbers(rows, 256))
    layer(numbers(4, 16, 256))
    layer(numbers(5, 13, 256))
    assert used == [4, 64, 64]


@needs_packing
def test_packed_copies_are_of_large_matrices_alone():
    model = Transformer(ModelArgs(**PARAMS))
    packing.pack_matrices(model, Packing(numbers=480 * 32))
    assert isinstance(model.output.multiply, packing.Packed)
    assert model.layers[0].attention.wq.multiply is F.linear


# --- weights that change -----------------------------------------------------------------------------------------


def assign(layer):
    layer.weight = torch.nn.Parameter(numbers(512, 256, seed=3), requires_grad=False)


def replace_data(layer):
    layer.weight.data = numbers(512, 256, seed=3)


def add(layer):
    layer.weight.add_(1)


def load(layer):
    layer.load_state_dict({"weight": numbers(512, 256, seed=3)})


def load_assigned(layer):
    layer.load_state_dict({"weight": numbers(512, 256, seed=3)}, assign=True)


def train(layer):
    layer.requires_grad_(True)
    layer(numbers(4, 256)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.requires_grad_(False)


def narrow_and_widen(layer):
    layer.double().float().bfloat16().float()


@needs_packing
@pytest.mark.parametrize("change", [assign, replace_data, add, load, load_assigned, train, narrow_and_widen])
def test_packed_weights_that_change_are_packed_again(used, change):
    layer = packed_layer()
    x = numbers(4, 256, seed=1)
    before = layer(x)
    change(layer)
    after = layer(x)
    assert near(after, F.linear(x, layer.weight)) and not after.equal(before)
    assert used == [4, 4]


@needs_packing
def test_packed_weights_that_do_not_change_are_packed_once(monkeypatch):
    layer = packed_layer()
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    for _ in range(3):
        layer(numbers(4, 256))


@needs_packing
def test_packed_weights_written_behind_torchs_back_can_be_packed_by_hand():
    layer = packed_layer()
    layer.weight.data.mul_(2)
    packing.pack_matrices(layer, Packing())
    x = numbers(4, 256, seed=1)
    assert near(layer(x), F.linear(x, layer.weight))


@needs_packing
def test_packed_layers_are_differentiable(used):
    layer = packed_layer()
    plain = numbers(512, 256).requires_grad_()
    x = numbers(4, 256, seed=1).requires_grad_()
    layer(x).square().sum().backward()
    of_input = x.grad.clone()
    layer.requires_grad_(True)
    layer(x.detach()).square().sum().backward()
    F.linear(x.detach(), plain).square().sum().backward()
    assert near(layer.weight.grad, plain.grad)
    assert near(of_input, 2 * (x @ plain.T @ plain).detach()) and not used
    with torch.no_grad():
        layer(x)
    assert used == [4]


@needs_packing
def test_packed_layers_can_be_copied_saved_and_made_inferences_own(used):
    layer = packed_layer()
    x = numbers(4, 256, seed=1)
    twin = copy.deepcopy(layer)
    twin.weight.mul_(2)
    assert near(twin(x), 2 * layer(x)) and used == [4, 4]
    assert list(layer.state_dict()) == ["weight"]
    with torch.inference_mode():
        layer.weight = torch.nn.Parameter(numbers(512, 256, seed=3), requires_grad=False)
    with torch.no_grad():  # torch does not count the changes of such a weight
        assert near(layer(x), F.linear(x, layer.weight)) and used == [4, 4]


# --- whole models ------------------------------------------------------------------------------------------------


@needs_packing
def test_packed_models_answer_as_plain_ones(folder, used):
    plain = build(folder, pack=False)
    found = build(folder, pack=True)
    assert near(found.model(torch.tensor([[5, 6, 7]])), plain.model(torch.tensor([[5, 6, 7]])))
    assert used and len(used) == 2 * 7 + 1, "every matrix of both layers, and the output layer"
    ids, logprobs = found.generate(PROMPTS, 8, 0, logprobs=True)
    expected_ids, expected = plain.generate(PROMPTS, 8, 0, logprobs=True)
    assert ids == expected_ids
    for row, expected_row in zip(logprobs, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-4)

    state = found.model.state_dict()
    assert state.keys() == plain.model.state_dict().keys()
    assert all(state[name].equal(tensor) for name, tensor in weights().items())


@needs_packing
def test_packed_models_are_trained_as_plain_ones(folder):
    tokens = torch.tensor([[5, 6, 7, 8]])
    gradients = []
    for pack in (True, False):
        model = build(folder, pack=pack).model.requires_grad_(True)
        model(tokens).square().mean().backward()
        gradients.append(dict(model.named_parameters()))
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        model.requires_grad_(False)
        gradients[-1]["after"] = model(tokens)
    found, expected = gradients
    assert near(found.pop("after"), expected.pop("after"))
    assert all(near(found[name].grad, weight.grad) for name, weight in expected.items())


@needs_packing
def test_packed_ranks_compute_what_one_does(tmp_path, tokenizer_path):
    """Four ranks hold two key-value heads in two copies each, and a vocabulary that they do not divide."""
    params = PARAMS | {"vocab_size": 481}
    write_checkpoint(tmp_path / "packed", params, random_weights(params), tokenizer_path)
    tokens = [[list(range(1, 30))] * 3, [[1, 7]]]
    requests = {"quantized": {"packed": {"pack": True}}, "tokens": tokens}
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    job = succeeded(launch(tmp_path, "quantized", 4), 4)
    assert "packed copies 0 MB" in job.err

    model = build_model(params, random_weights(params))
    for found, ids in zip(job.ranks[0]["packed"], tokens, strict=True):
        with torch.no_grad():
            assert near(torch.tensor(found), model(torch.tensor(ids)))


@needs_packing
def test_packed_models_compile_whole_with_the_plain_weights(folder, used):
    """torch's compiler knows no packed matrices."""
    model = build(folder, pack=True).model
    step = torch.compile(model, fullgraph=True, backend="eager")
    tokens = torch.tensor([[1, 400, 7]])
    with torch.inference_mode():
        compiled = step(tokens)
        assert not used
        assert near(compiled, model(tokens)) and used


# --- the rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts, dtype, rows",
    [
        (AMD, F32, [1, 4, 64, 2048]),
        (AMD, BF16, [1, 4, 64, 2048]),
        (INTEL, F32, [4, 64]),
        (INTEL, BF16, [1, 4, 64, 2048]),
        (AMD, F16, []),
        (INTEL, F16, []),
        (INTEL._replace(bfloat16=False), F32, [4, 64]),
        (INTEL._replace(bfloat16=False), BF16, []),
        (AMD._replace(avx512=False), F32, []),
        (Processor("", avx512=True, bfloat16=True), F32, []),
        (Processor("CentaurHauls", avx512=True, bfloat16=True), BF16, []),
    ],
    ids=str,
)
def test_packing_that_pays_is_what_was_measured(facts, dtype, rows):
    found = packing.packing_that_pays(facts, dtype)
    if found is None:
        assert not rows
    else:
        assert rows == [n for n in (1, 4, 64, 2048) if found.least_rows <= n <= found.most_rows]
        assert found.numbers <= 2048 * 2048


def rule(monkeypatch, facts=AMD, dtype=F32, device=CPU, total=64 * GB, kind=None, pack=None, **sizes):
    monkeypatch.setattr(packing, "processor", lambda: facts)
    monkeypatch.setattr(packing, "total_memory", lambda: total)
    args = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 32000} | sizes
    with torch.device("meta"):
        model = Transformer(ModelArgs(**args, max_seq_len=512))
    besides = sum(loading.needed(model.params, dtype.itemsize))
    return packing.choose_packing(model, dtype, device, kind, pack, model.params.max_batch_size, besides)


def test_rule_packs_where_half_of_the_memory_holds_the_model_twice(monkeypatch):
    """1.23 billion numbers, 1.16 billion of them in matrices that are packed: 9.6 GB in float32 with the cache."""
    assert rule(monkeypatch) == packing.MEASURED["AuthenticAMD", F32]
    assert rule(monkeypatch, total=22 * GB)
    assert not rule(monkeypatch, total=17 * GB)
    assert not rule(monkeypatch, total=None)
    assert rule(monkeypatch, total=11 * GB, dtype=BF16)
    monkeypatch.setattr(packing.parallel, "local_world", lambda: (0, 2))
    assert not rule(monkeypatch, total=22 * GB)


def test_rule_packs_for_a_processor_and_rows_that_gain(monkeypatch):
    assert not rule(monkeypatch, device=torch.device("cuda"))
    assert not rule(monkeypatch, kind="int8")
    assert not rule(monkeypatch, pack=False)
    assert rule(monkeypatch, INTEL, max_batch_size=4)
    assert not rule(monkeypatch, INTEL, max_batch_size=3)
    assert not rule(monkeypatch, dim=256, n_layers=2, n_heads=4, vocab_size=512)


def test_rule_knows_the_processor_and_the_memory_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(packing, "CGROUP", tmp_path)
    assert packing.processor().maker == ""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n")
    assert packing.processor().maker == "AuthenticAMD"

    monkeypatch.setattr(packing, "physical_memory", lambda: 8 * GB)
    for limit, total in (("max", 8 * GB), (str(2 * GB), 2 * GB), (str(99 * GB), 8 * GB)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert packing.total_memory() == total


def test_rule_does_not_look_at_free_memory(monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    assert rule(monkeypatch)


def test_packing_that_is_asked_for_and_impossible_is_refused(monkeypatch):
    refusal(lambda: rule(monkeypatch, pack="yes"), "'yes'", "True, False or None")
    refusal(lambda: rule(monkeypatch, pack=True, kind="int4"), "int4", "leave pack=True out")
    refusal(lambda: rule(monkeypatch, pack=True, device=torch.device("cuda")), "cuda")
    refusal(lambda: rule(monkeypatch, pack=True, dtype=F16), "float16")
    refusal(lambda: rule(monkeypatch, AMD._replace(bfloat16=False), pack=True, dtype=BF16), "bfloat16")


# --- what is told ------------------------------------------------------------------------------------------------


@needs_packing
def test_line_says_what_packing_costs(folder, capfd):
    build(folder, pack=True)
    assert "MB, packed copies 0 MB and cache 0 MB, ready in" in (line := capfd.readouterr().err)
    assert line.endswith("of them to pack\n")
    build(folder, pack=False)
    assert "pack" not in capfd.readouterr().err


@needs_packing
def test_memory_that_does_not_suffice_for_copies_names_the_argument(folder, monkeypatch):
    model = build(folder, pack=True, max_batch_size=1).model
    layers = packing.to_pack(model, Packing())
    copies = sum(layer.weight.nbytes for layer in layers)
    needed = sum(loading.needed(model.params, 4))
    for free, words in [
        (needed + copies - 1, ["packed copies", "fits: pack=False, or"]),
        (needed - 1, ["pack=False with dtype='bfloat16'"]),
    ]:
        monkeypatch.setattr(loading, "free_memory", lambda device, free=free: free)
        refusal(lambda: build(folder, pack=True, max_batch_size=1), *words, error=RuntimeError)
    monkeypatch.setattr(loading, "free_memory", lambda device: needed + copies)
    build(folder, pack=True, max_batch_size=1)
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    build(folder, pack=False, max_batch_size=1)
