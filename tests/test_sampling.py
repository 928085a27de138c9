"""Choosing the next token: exactly on four numbers, by inversion against the reference, and by frequency."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import sampling
from llama.sampling import Sampling, log_probs, sample, sample_top_p
from support import reference

FOUR = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))  # falling order: ids 1, 2, 3, 0
SPREAD = np.linspace(0, 1, 201)[:-1]  # uniform numbers from 0 to 0.995
JUST_UNDER_ONE = 1 - 2**-24  # the largest float32 below 1


def draw(logits, uniforms, temperature=1.0, top_p=1.0, top_k=None) -> list[int]:
    """Sample the same logits once for each uniform number."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    uniforms = torch.as_tensor(np.asarray(uniforms), dtype=torch.float32)
    ids = sample(logits.expand(len(uniforms), -1).contiguous(), uniforms, temperature, top_p, top_k)
    assert ids.shape == uniforms.shape and ids.dtype == torch.int64
    return ids.tolist()


def kept(logits, **options) -> set[int]:
    """The ids that some uniform number can draw."""
    return set(draw(logits, [*SPREAD, JUST_UNDER_ONE], **options))


# --- four numbers ------------------------------------------------------------------------------------------------


def test_inversion_walks_in_falling_order():
    assert draw(FOUR, [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, JUST_UNDER_ONE]) == [1, 1, 2, 2, 3, 3, 0, 0]


def test_a_uniform_on_the_boundary_draws_the_next():
    """Stretches are closed below and open above: of two equal tokens, one half belongs to the second."""
    first, second = draw([0.0, 0.0], [0.0, 0.75])
    assert draw([0.0, 0.0], [0.4999999, 0.5]) == [first, second] and first != second


def test_temperature_divides_the_logits():
    """At temperature 0.5 probabilities are squared: 16, 9, 4, 1 of 30."""
    assert draw(FOUR, [0.53, 0.54, 0.83, 0.84, 0.96, 0.97], temperature=0.5) == [1, 2, 2, 3, 3, 0]


@pytest.mark.parametrize(
    ("top_p", "ids"),
    [
        (0.01, {1}),
        (0.39, {1}),  # the second's preceding mass is 0.4
        (0.41, {1, 2}),
        (0.69, {1, 2}),
        (0.71, {1, 2, 3}),
        (0.89, {1, 2, 3}),
        (0.91, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_tokens_whose_preceding_mass_is_at_most_p(top_p, ids):
    assert kept(FOUR, top_p=top_p) == ids


@pytest.mark.parametrize(("top_p", "count"), [(0.5, 3), (0.25, 2), (0.75, 4), (0.49, 2), (0.24, 1)])
def test_a_preceding_mass_of_exactly_p_is_kept(top_p, count):
    """Four equal numbers are exact in float32: 0, 1/4, 1/2, 3/4 precede."""
    assert len(kept(torch.zeros(4), top_p=top_p)) == count


def test_ties_are_broken_the_same_way_every_time():
    equal = torch.zeros(4)
    assert draw(equal, SPREAD, top_p=0.5) == draw(equal, SPREAD, top_p=0.5)
    assert len(kept(equal, top_k=2)) == 2


def test_what_top_p_keeps_is_renormalised():
    """0.4 and 0.3 remain: the boundary is at 4/7."""
    assert draw(FOUR, [0.0, 0.57, 0.572, JUST_UNDER_ONE], top_p=0.5) == [1, 1, 2, 2]


def test_top_k_keeps_the_largest_and_renormalises():
    assert kept(FOUR, top_k=1) == {1}
    assert kept(FOUR, top_k=3) == {1, 2, 3}
    assert kept(FOUR, top_k=4) == kept(FOUR, top_k=100) == {0, 1, 2, 3}
    assert draw(FOUR, [0.57, 0.572], top_k=2) == [1, 2]


def test_top_k_comes_before_top_p():
    """Of the two largest the first has 4/7, so p = 0.5 leaves it alone; of all four it has 0.4, and two remain."""
    assert kept(FOUR, top_k=2, top_p=0.5) == {1}
    assert kept(FOUR, top_p=0.5) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30, 1e-4])
def test_a_small_temperature_is_argmax(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.9, -1e4], [5e3, -5e3, 4.9e3, 0.0]])
    for uniform in (0.0, 0.5, JUST_UNDER_ONE):
        assert sample(logits, torch.full((2,), uniform), temperature, 0.9).tolist() == [1, 0]


def test_a_huge_temperature_is_uniform():
    assert draw([1e4, 0.0, -1e4, 3.0], SPREAD, temperature=1e30).count(2) == 50
    assert kept([1e4, 0.0, -1e4, 3.0], temperature=1e38) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_p", [1e-45, 1e-10])
def test_a_tiny_top_p_keeps_the_best(top_p):
    assert kept(FOUR, top_p=top_p) == {1}


def test_at_least_one_survives_every_extreme():
    """The last stretch must end at one, whatever the float32 sums say: no uniform number falls off the end."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 30.0, 1e4):
        logits = torch.randn(64, 500, generator=generator) * scale
        for top_p in (1e-45, 0.5, 0.9, 1.0):
            for top_k in (None, 1, 7):
                for uniform in (0.0, JUST_UNDER_ONE):
                    ids = sample(logits, torch.full((64,), uniform), 0.8, top_p, top_k).tolist()
                    for row, i in enumerate(ids):
                        assert math.isfinite(logits[row, i]) and 0 <= i < 500
                    if uniform == 0.0 or top_k == 1 or top_p == 1e-45:
                        assert ids == logits.argmax(dim=-1).tolist()


def test_an_id_without_probability_is_never_drawn():
    """The largest uniform number may not slip past the kept tokens into one of probability zero."""
    logits = torch.full((300,), -1e4)
    logits[40:140] = torch.linspace(0, 1, 100)
    assert kept(logits) <= set(range(40, 140))
    assert set(draw(logits, [JUST_UNDER_ONE] * 3)) <= set(range(40, 140))


def test_half_precision_logits_are_sampled_in_float32():
    """A bfloat16 sum cannot tell a thousand equal stretches apart."""
    logits = torch.zeros(1000, 1000, dtype=torch.bfloat16)
    ids = sample(logits, (torch.arange(1000) + 0.5) / 1000, 1.0, 1.0)
    assert len(set(ids.tolist())) == 1000


def test_sampling_uses_no_randomness_and_changes_no_argument():
    state = torch.get_rng_state()
    logits, uniforms = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.5, 0.9])
    before = logits.clone(), uniforms.clone()
    first = sample(logits, uniforms, 0.7, 0.8, 5)
    assert torch.equal(first, sample(logits, uniforms, 0.7, 0.8, 5))
    assert torch.equal(logits, before[0]) and torch.equal(uniforms, before[1])
    assert torch.equal(torch.get_rng_state(), state)


# --- many numbers ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 200),
    temperature=st.floats(0.05, 5.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.none() | st.integers(1, 250),
)
def test_inversion_equals_the_reference(seed, size, temperature, top_p, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=generator) * 3
    uniforms = torch.rand(4, generator=generator)
    ids = sample(logits, uniforms, temperature, top_p, top_k).tolist()
    for row in range(4):
        distribution = reference.kept_distribution(logits[row].numpy(), temperature, top_p, top_k)
        uniform = float(uniforms[row])
        wider = reference.kept_distribution(logits[row].numpy(), temperature, top_p + 1e-5, top_k)
        narrower = reference.kept_distribution(logits[row].numpy(), temperature, top_p - 1e-5, top_k)
        if len(wider) == len(narrower) and reference.distance_to_edge(distribution, uniform) > 1e-5:
            assert ids[row] == reference.invert(distribution, uniform)
        else:  # float32 and float64 may differ by one neighbour
            assert ids[row] in {i for i, _ in wider}


def test_a_row_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(2)
    logits, uniforms = torch.randn(16, 333, generator=generator), torch.rand(16, generator=generator)
    together = sample(logits, uniforms, 0.9, 0.8, 40)
    alone = [sample(logits[i : i + 1], uniforms[i : i + 1], 0.9, 0.8, 40).item() for i in range(16)]
    assert together.tolist() == alone


def test_frequencies_follow_the_kept_distribution():
    """Chi-square of 20,000 draws; for the 5 to 8 degrees of freedom here, 30 is passed about once in ten thousand."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, generator=generator) * 1.5
    for options in ({}, {"top_p": 0.9}, {"top_k": 6}, {"temperature": 1.7, "top_k": 9, "top_p": 0.95}):
        options = {"temperature": 0.8, "top_p": 1.0, "top_k": None} | options
        expected = dict(reference.kept_distribution(logits.numpy(), **options))
        counts = np.bincount(draw(logits, torch.rand(20_000, generator=generator), **options), minlength=12)
        assert {i for i in range(12) if counts[i]} <= set(expected)
        assert sum((counts[i] - 20_000 * p) ** 2 / (20_000 * p) for i, p in expected.items()) < 30


def test_sample_top_p_draws_ids_from_the_nucleus():
    """The public helper of the Llama 2 release: probabilities (B, V) and p to ids (B, 1)."""
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).repeat_interleave(4000, dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        ids = sample_top_p(probs, 0.5)
    assert ids.shape == (8000, 1) and ids.dtype == torch.int64
    counts = np.bincount(ids[:4000, 0], minlength=4)
    assert counts[0] == counts[3] == 0
    assert counts[1] / 4000 == pytest.approx(4 / 7, abs=0.03)
    assert set(ids[4000:, 0].tolist()) == {0}


# --- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_log_probs_equal_the_definition(scale):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(8, 1000, generator=generator) * scale
    ids = torch.randint(1000, (8,), generator=generator)
    expected = reference.log_softmax(logits.double().numpy())[np.arange(8), ids]
    ours = log_probs(logits, ids)
    assert ours.shape == (8,) and ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=2e-5)


def test_log_probs_of_half_precision_logits_are_float32():
    logits = torch.zeros(1, 3000, dtype=torch.bfloat16)
    ours = log_probs(logits, torch.tensor([17]))
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(-math.log(3000), abs=1e-5)


def test_a_certain_token_has_log_probability_zero():
    assert log_probs(torch.tensor([[0.0, 200.0, 0.0]]), torch.tensor([1])).item() == 0.0


# --- sampling among the likeliest --------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([None, 1, 5, 15, 16, 40]),
    levels=st.sampled_from([None, 4, 30]),
)
def test_the_likeliest_draw_as_the_whole_vocabulary_does(seed, temperature, top_p, top_k, levels):
    """With few levels of logits nearly all are tied."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, 300, generator=generator)
    logits = logits if levels is None else (logits * levels / 10).round()
    uniforms = torch.rand(5, generator=generator)
    arguments = (logits, uniforms, temperature, top_p, top_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", 300)
        expected = sampling.sample(*arguments)
        patch.setattr(sampling, "CANDIDATES", 16)
        assert torch.equal(sampling.sample(*arguments), expected)


def test_a_sharp_distribution_is_not_sorted_whole(monkeypatch):
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1)) * 4
    sizes, sort = [], torch.Tensor.sort

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.shape[-1])
        return sort(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sort", counted)
    sampling.sample(logits, torch.tensor([0.2, 0.8]), 0.7, 0.9)
    assert sizes == [256, 256]
    sampling.sample(torch.zeros(2, 5000), torch.tensor([0.2, 0.8]), 0.7, 0.9)
    assert sizes[-1] == 5000


def test_candidates_are_enough_only_where_they_hold_the_whole_nucleus():
    """A nucleus of almost the whole vocabulary: half of it among the candidates is not enough."""
    logits = torch.linspace(0, 1, 400)[None]
    assert sampling.sample(logits, torch.tensor([0.95]), 1.0, 0.9).tolist() == [88]


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-30])
def test_a_temperature_that_is_nothing_in_float32_is_greedy(temperature):
    assert sampling.sample(FOUR[None], torch.tensor([0.99]), temperature).tolist() == [1]


def test_min_p_drops_what_is_unlikely_beside_the_likeliest():
    """Of 0.4, 0.3, 0.2 and 0.1 a share of 0.6 keeps the first two, 4/7 and 3/7."""
    kept = sampling.keep_min_p(torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.6)
    assert kept.tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    found = [sampling.sample(FOUR[None], torch.tensor([u]), 1.0, min_p=0.6).item() for u in (0.0, 0.57, 0.58, 0.99)]
    assert found == [1, 1, 2, 2]


def test_rows_of_other_options_are_chosen_each_by_its_own():
    options = [Sampling(temperature=0), Sampling(temperature=1, top_k=1), Sampling(temperature=1, top_p=1.0)]
    ids = sampling.choose(FOUR.expand(3, 4), options, [0.99, 0.99, 0.99])
    assert ids.tolist() == [1, 1, 0]


def test_adjusting_leaves_the_given_logits_alone():
    logits = torch.zeros(4)
    options = Sampling(logit_bias={2: 3.0}, presence_penalty=1.0, frequency_penalty=0.5)
    adjusted = sampling.adjust(logits, options, [3, 3, 1, 1, 0], [1, 1, 0])
    assert adjusted.tolist() == [-1.5, -2.0, 3.0, 0.0]
    assert logits.tolist() == [0.0] * 4


@pytest.mark.parametrize("returned", [None, torch.zeros(3), torch.zeros(1, 4), [0.0] * 4])
def test_a_processor_that_returns_something_else_is_named(returned):
    with pytest.raises(ValueError, match=r"^logits_processor returned .*; it must return logits of \(4,\)"):
        sampling.adjust(torch.zeros(4), Sampling(logits_processor=lambda ids, logits: returned), [1], [])


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
def test_a_processor_that_leaves_no_token_is_told_so(value):
    with pytest.raises(ValueError, match="left no token that can be chosen"):
        sampling.adjust(torch.zeros(4), Sampling(logits_processor=lambda ids, logits: logits + value), [1], [])
