"""Every fast path against the plain one: ragged and repeated prompts, n completions, sampling, compiled steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import decode, parallel, sampling
from llama.decode import Batch, compiled_step
from llama.generation import Llama
from llama.prompts import UNSAFE_ERROR
from support.models import build_model, random_weights

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 480, "multiple_of": 16}
CONTEXT = 96


@pytest.fixture(scope="module")
def model():
    return build_model(PARAMS, random_weights(PARAMS, seed=3), max_batch_size=6, max_seq_len=CONTEXT)


@pytest.fixture
def llama(model, tokenizer) -> Llama:
    model.own_cache().clear()
    return Llama(model, tokenizer)


@pytest.fixture
def passes(model, monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every forward pass so far."""
    shapes, hidden = [], model.hidden

    def counted(tokens, *args, **kwargs):
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", counted)
    return shapes


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(100 * length + seed)
    return [1, *torch.randint(3, 480, (length - 1,), generator=generator).tolist()]


def alone(model, ids: list[int]) -> torch.Tensor:
    """Logits after the last id, of a pass that knows nothing of caches and neighbours."""
    return model(torch.tensor([ids])).detach()[0, -1]


def feed(batch: Batch, ids: list[int | None]) -> torch.Tensor:
    """One more id to each row that has one."""
    return batch.step(torch.tensor([0 if id is None else id for id in ids]), [id is not None for id in ids])


# --- ragged prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(2, 60, 17, 60), (60, 17, 3, 2), (5,), (9, 9, 9), (64, 1, 63)])
@pytest.mark.parametrize("at_once", [2048, 20])
def test_ragged_rows_equal_rows_alone(model, passes, monkeypatch, lengths, at_once):
    monkeypatch.setattr(decode, "SHORTEST_PASS", 4)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", at_once)
    model.own_cache().clear()
    prompts = [prompt(length, row) for row, length in enumerate(lengths)]
    batch = Batch(model, prompts)
    logits, _ = batch.prefill()
    computed = sum(rows * positions for rows, positions in passes)
    assert sum(lengths) <= computed <= sum(lengths) + 4 * len(lengths)
    for row, ids in enumerate(prompts):
        torch.testing.assert_close(logits[row], alone(model, ids), atol=2e-4, rtol=0)
    steps = [[7, 8, 9, 10], [11, None, 12, None], [None, 13, 14, 15]]
    for step in steps:
        fed = step[: len(prompts)]
        logits = feed(batch, fed)
        for row, id in enumerate(fed):
            prompts[row] = prompts[row] + ([] if id is None else [id])
            torch.testing.assert_close(logits[row], alone(model, prompts[row]), atol=2e-4, rtol=0)


def test_prompt_scores_of_ragged_rows(model, monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST_PASS", 4)
    prompts = [prompt(length) for length in (3, 40, 12)]
    _, scores = Batch(model, prompts).prefill(score=True)
    for row, ids in enumerate(prompts):
        expected = model(torch.tensor([ids])).detach()[0].log_softmax(-1)
        expected = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert scores[row, 0] == 0
        torch.testing.assert_close(scores[row, 1 : len(ids)], expected, atol=2e-4, rtol=0)


def test_equal_prompts_are_computed_once(model, passes):
    model.own_cache().clear()
    prompts = [prompt(9), prompt(30), prompt(9), prompt(30), prompt(9)]
    batch = Batch(model, prompts)
    logits, _ = batch.prefill()
    assert max(rows for rows, _ in passes) == 2
    for row, ids in enumerate(prompts):
        torch.testing.assert_close(logits[row], alone(model, ids), atol=2e-4, rtol=0)
    logits = feed(batch, [5, 6, 7, 8, 9])  # each goes its own way
    for row, ids in enumerate(prompts):
        torch.testing.assert_close(logits[row], alone(model, [*ids, 5 + row]), atol=2e-4, rtol=0)


def test_numbers_that_are_not_finite_leave_the_next_call_alone(model, tokenizer):
    llama, ids = Llama(model, tokenizer), prompt(20)
    expected = llama.generate([ids], 5, temperature=0)
    weight = model.tok_embeddings.weight.detach()
    kept = weight[200].clone()
    weight[200] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        llama.generate([[*ids, 200], [1, 5, 200]], 5, temperature=0)
    weight[200] = kept
    assert llama.generate([ids], 5, temperature=0) == expected


# --- products of some rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(15, 1), (16, 1), (4, 5), (1, 24), (32, 1), (33, 1), (2, 3, 4)])
def test_products_are_the_same_either_way_round(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, 256, generator=generator), torch.randn(512, 256, generator=generator)
    y = parallel.product(x, weight)
    assert y.is_contiguous() and y.shape == (*shape, 512)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, atol=1e-3, rtol=0)
    whole = parallel.product(x.bfloat16(), weight.bfloat16())
    assert whole.dtype == torch.bfloat16 and whole.shape == y.shape


# --- several steps between looks at what was chosen ---------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch) -> list[int]:
    """How many steps each look noted."""
    counts, settle = [], Batch.settle

    def counted(batch):
        counts.append(len(batch.fed))
        settle(batch)

    monkeypatch.setattr(Batch, "settle", counted)
    return counts


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "seed": 3}, {"temperature": 0, "n": 2}])
@pytest.mark.parametrize("ahead", [3, 50])
def test_looking_seldom_changes_nothing(llama, settled, monkeypatch, options, ahead):
    """Rows end at different steps: by EOS in the middle, by their own room; what follows EOS is not returned."""
    prompts = [prompt(6), prompt(CONTEXT - 7), prompt(11), prompt(CONTEXT), prompt(6)]
    (greedy,), _ = llama.generate([prompts[0]], 30, 0)
    monkeypatch.setattr(llama.tokenizer, "eos_id", greedy[4])
    expected = llama.generate(prompts, 30, logprobs=True, **options)
    del settled[:]
    monkeypatch.setattr(decode, "steps_ahead", lambda device: ahead)
    llama.model.own_cache().clear()
    ids, logprobs = llama.generate(prompts, 30, logprobs=True, **options)
    assert max(settled) > 2
    assert ids == expected[0]
    for row, values in enumerate(logprobs):
        torch.testing.assert_close(values, expected[1][row], atol=1e-5, rtol=0)


def test_the_cache_says_what_several_steps_left_in_it(llama, passes, monkeypatch):
    monkeypatch.setattr(decode, "steps_ahead", lambda device: 5)
    longer = [*prompt(11), *llama.generate([prompt(11)], 13, 0)[0][0]]
    del passes[:]
    continued = llama.generate([longer], 9, 0)
    assert passes[0] == (1, 1)  # all but the last id is there
    llama.model.own_cache().clear()
    assert llama.generate([longer], 9, 0) == continued


def test_what_follows_the_end_of_a_row_spoils_nothing(llama, model, monkeypatch):
    """The steps after EOS computed what is not finite, and left it where a later, shorter row was padded."""
    first, second = prompt(75), prompt(74)
    (_, greedy), _ = llama.generate([first, second], 6, 0)
    monkeypatch.setattr(llama.tokenizer, "eos_id", greedy[2])
    model.own_cache().clear()
    expected = llama.generate([prompt(90), prompt(20)], 4, 0)
    monkeypatch.setattr(decode, "steps_ahead", lambda device: 8)
    kept = model.tok_embeddings.weight[greedy[2]].clone()
    model.tok_embeddings.weight.detach()[greedy[2]] = torch.nan
    assert len(llama.generate([first, second], 12, 0)[0][1]) == 2
    model.tok_embeddings.weight.detach()[greedy[2]] = kept
    assert llama.generate([prompt(90), prompt(20)], 4, 0) == expected


def test_streams_and_stop_strings_look_at_every_token(llama, settled, monkeypatch):
    monkeypatch.setattr(decode, "steps_ahead", lambda device: 8)
    list(llama.stream([prompt(6)], 12, 0))
    llama.generate([prompt(6)], 12, 0, stop=["never"])
    assert max(settled) == 1


# --- n completions of a prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4])
def test_completion_j_of_row_i_is_row_i_n_plus_j(llama, n):
    prompts = [prompt(6), prompt(11)]
    repeated = [ids for ids in prompts for _ in range(n)]
    several, logprobs = llama.generate(prompts, 8, 0.9, seed=4, n=n, logprobs=True)
    expected, theirs = llama.generate(repeated, 8, 0.9, seed=4, logprobs=True)
    assert several == expected
    assert all(ours == pytest.approx(other, abs=1e-4) for ours, other in zip(logprobs, theirs, strict=True))
    assert n == 1 or len({tuple(ids) for ids in several[:n]}) > 1
    texts = llama.text_completion(["a", "b c"], 0.9, seed=4, n=n, max_gen_len=8)
    assert texts == llama.text_completion([text for text in ("a", "b c") for _ in range(n)], 0.9, seed=4, max_gen_len=8)


def test_n_completions_share_one_prefill(llama, passes):
    llama.generate([prompt(40)], 1, 0.9, seed=1, n=6)
    assert passes == [(1, 40)]


def test_refused_dialogs_keep_their_n_places(llama):
    good, bad = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "[INST]"}]
    answers = llama.chat_completion([bad, good], 0.9, max_gen_len=6, seed=2, n=2)
    assert [answer["finish_reason"] == "refused" for answer in answers] == [True, True, False, False]
    assert answers[0]["generation"]["content"] == answers[1]["generation"]["content"] == UNSAFE_ERROR
    assert answers[0] is not answers[1] and answers[0]["generation"] is not answers[1]["generation"]
    assert answers[2:] == llama.chat_completion([bad, bad, good, good], 0.9, max_gen_len=6, seed=2)[2:]


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None, True])
def test_a_wrong_n(llama, n):
    for call in (lambda: llama.generate([[1, 5]], 3, n=n), lambda: llama.text_completion(["a"], n=n)):
        with pytest.raises(ValueError, match=r"^n is .*integer of at least 1\.$"):
            call()


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


# --- compiled steps ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_steps_choose_what_eager_ones_do(model, tokenizer, capfd, monkeypatch):
    eager, prompts = Llama(model, tokenizer), [prompt(5), prompt(12)]
    for name in ("default", "cudagraph"):  # which without a GPU is the same, but has its own way through torch
        compiled = Llama(model, tokenizer, compile=name)
        assert compiled.generate(prompts, 12, temperature=0) == eager.generate(prompts, 12, temperature=0)
        assert "llama: compiled for 2 rows in" in capfd.readouterr().err
        monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
        assert compiled.generate(prompts[:1], 3, temperature=0) == eager.generate(prompts[:1], 3, temperature=0)
        pairs = zip(compiled.score(["a b"]), eager.score(["a b"]), strict=True)
        assert all(one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5) for one, other in pairs)


def test_an_unknown_way_to_compile(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"compile is 'fast'.*default, cudagraph"):
        compiled_step(model, "fast")
    with pytest.raises(ValueError, match=r"compile is 'fast'.*default, cudagraph"):
        Llama.build(tmp_path, compile="fast")
