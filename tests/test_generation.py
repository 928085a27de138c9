"""What the calls mean: ids, log-probabilities, lengths, stops, streams, seeds, chat, cache reuse, errors.

Two kinds of model. A random one, checked against the naive generator of `reference`. And a scripted one, whose weights
are real but chosen so that each token has one likely successor: it says exactly what a test wants it to say.
"""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import sampling
from llama.generation import Llama
from llama.predictions import prediction
from llama.prompts import UNSAFE_ERROR, encode_dialog
from llama.rows import Row
from llama.sampling import Sampling
from support import reference
from support.checkpoints import write_checkpoint
from support.models import as_float64, build_model, random_weights, shape_of
from support.process import global_state

VOCAB = 480
EOS = 2
CONTEXT = 48
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB, "multiple_of": 16}
PARAMS |= {"norm_eps": 1e-5}
PROMPTS = [[1, 400, 7], [1], [1, *range(33, 40)], [1, 260, 5, 5], [300], [9, 8], [1, 477, 476, 475, 474]]


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Random weights that like to end: the EOS row of the output is twice as long as the others."""
    state = random_weights(PARAMS, seed=11)
    state["output.weight"][EOS] *= 2.0
    return state


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    return as_float64(weights())


def new_llama(tokenizer, max_batch_size: int = 4, max_seq_len: int = CONTEXT, **options) -> Llama:
    return Llama(build_model(PARAMS, weights(), max_batch_size, max_seq_len), tokenizer, **options)


@pytest.fixture
def llama(tokenizer) -> Llama:
    return new_llama(tokenizer)


@pytest.fixture(scope="module")
def shared_llama(tokenizer) -> Llama:
    """One instance for many calls, as users have it: what earlier calls left behind must not show."""
    return new_llama(tokenizer)


def random_model_logits(ids: list[int]) -> np.ndarray:
    return reference.logits(ids, arrays(), shape_of(PARAMS))[-1]


@functools.cache
def expected_row(prompt: tuple[int, ...], decode, max_gen_len: int | None = None) -> reference.Completion:
    """The greedy completion of the random model, by the naive generator."""
    row = reference.complete(
        prompt, random_model_logits, max_seq_len=CONTEXT, max_gen_len=max_gen_len, eos_id=EOS, decode=decode
    )
    assert row.margin > 1e-3, "choose other prompts or weights: this choice is too close for float32"
    return row


class Counted:
    """Counts the calls of `model.hidden` and the tokens they were given."""

    def __init__(self, llama: Llama) -> None:
        self.shapes: list[tuple[int, int]] = []
        original = llama.model.forward

        def hidden(tokens, *args, **kwargs):
            self.shapes.append(tuple(tokens.shape))
            return original(tokens, *args, **kwargs)

        llama.model.forward = hidden

    def widths(self) -> list[int]:
        """New tokens a row in each call so far; forgets them."""
        widths = [length for _, length in self.shapes]
        self.shapes.clear()
        return widths


def drain(pieces, rows: int) -> list[dict]:
    """A stream joined by row."""
    joined = [{"ids": [], "text": "", "logprobs": [], "finish_reason": None} for _ in range(rows)]
    for row, ids, text, logprobs, finish_reason in pieces:
        assert joined[row]["finish_reason"] is None, "a row went on after its end"
        joined[row]["ids"] += ids
        joined[row]["text"] += text
        joined[row]["logprobs"] += logprobs or []
        joined[row]["finish_reason"] = finish_reason
    assert all(row["finish_reason"] for row in joined)
    return joined


# --- a model that says what it is told ---------------------------------------------------------------------------

SCRIPT_PARAMS = {"dim": 512, "n_layers": 1, "n_heads": 4, "vocab_size": VOCAB, "multiple_of": 8, "norm_eps": 1e-5}
SCRIPT_PARAMS |= {"ffn_dim_multiplier": 0.05}


class Script:
    """A model whose logits after token i are `table[i]`: one feature a token, and layers that add nothing."""

    def __init__(self, tokenizer, max_batch_size: int = 4, max_seq_len: int = CONTEXT) -> None:
        state = {name: torch.zeros_like(w) for name, w in random_weights(SCRIPT_PARAMS).items()}
        state |= {name: torch.ones_like(w) for name, w in state.items() if "norm" in name}
        state["tok_embeddings.weight"] = torch.eye(VOCAB, SCRIPT_PARAMS["dim"])
        model = build_model(SCRIPT_PARAMS, state, max_batch_size, max_seq_len)
        self.llama = Llama(model, tokenizer)
        self.tokenizer = tokenizer
        self.table = np.zeros((VOCAB, VOCAB), dtype=np.float32)

    def say(self, *chains: list[int]) -> None:
        """After each id of a chain comes the next one; after the last, and after any other id, EOS."""
        self.table[:] = 0.0
        follower = dict.fromkeys(range(VOCAB), EOS)
        for chain in chains:
            assert len(set(chain)) == len(chain), "an id can have only one follower"
            follower |= dict(itertools.pairwise(chain))
        for i, j in follower.items():
            self.table[i, j] = 16.0
        self.load()

    def load(self) -> None:
        with torch.no_grad():
            normed = math.sqrt(SCRIPT_PARAMS["dim"])  # what the norm makes of the only feature that is not zero
            self.llama.model.output.weight.zero_()
            self.llama.model.output.weight[:, :VOCAB] = torch.from_numpy(self.table.T) / normed

    def say_text(self, text: str, start: int = 1) -> list[int]:
        """Script a text after the id `start`; return its ids."""
        ids = self.tokenizer.encode(text, bos=False, eos=False)
        self.say([start, *ids])
        return ids

    def expected(self, prompt: list[int], **options) -> reference.Completion:
        options = {"max_seq_len": CONTEXT, "eos_id": EOS, "decode": self.tokenizer.decode} | options
        return reference.complete(prompt, lambda ids: self.table[ids[-1]].astype(np.float64), **options)


@pytest.fixture(scope="module")
def script(tokenizer) -> Script:
    return Script(tokenizer)


# --- numbers and rows --------------------------------------------------------------------------------------------


def test_greedy_ids_and_log_probabilities_equal_the_reference(llama, tokenizer):
    """Seven prompts of different lengths, more than the batch holds: two chunks, both ragged."""
    ids, logprobs = llama.generate(PROMPTS, 14, temperature=0, logprobs=True)
    rows = [expected_row(tuple(prompt), tokenizer.decode, 14) for prompt in PROMPTS]
    assert ids == [row.ids for row in rows]
    for ours, row in zip(logprobs, rows, strict=True):
        np.testing.assert_allclose(ours, row.logprobs, atol=1e-4, rtol=0)
    assert {row.finish_reason for row in rows} == {"eos", "length"}
    assert len({len(row.ids) for row in rows}) > 2


def test_results_are_plain_lists(llama):
    ids, logprobs = llama.generate([[1, 5]], 3, temperature=0)
    assert logprobs is None
    assert all(type(i) is int for i in ids[0])
    _, logprobs = llama.generate([[1, 5]], 3, temperature=0, logprobs=True)
    assert all(type(p) is float for p in logprobs[0])


def test_generate_takes_the_positional_arguments_of_the_release(llama):
    """generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)"""
    ids, logprobs = llama.generate([[1, 5]], 3, 0.0, 0.9, True, True)
    assert ids[0][:2] == [1, 5] and logprobs[0][0] == 0.0


PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@settings(max_examples=25)
@given(st.lists(PROMPT, min_size=1, max_size=6), st.integers(0, 8), st.sampled_from([0.0, 0.7]))
def test_any_batch_equals_its_rows_one_by_one(shared_llama, tokenizer, prompts, max_gen_len, temperature):
    """With sampling, "one by one" keeps each row's index: its mates become the single token BOS."""
    options = {"temperature": temperature, "logprobs": True, "seed": 5}
    ids, logprobs = shared_llama.generate(prompts, max_gen_len, **options)
    for i, prompt in enumerate(prompts):
        mates = [[1]] * (i if temperature else 0)
        alone_ids, alone_logprobs = new_llama(tokenizer).generate([*mates, prompt], max_gen_len, **options)
        assert ids[i] == alone_ids[-1]
        np.testing.assert_allclose(logprobs[i], alone_logprobs[-1], atol=1e-5, rtol=0)


def test_a_ragged_batch_costs_one_prefill_and_one_step_a_token(llama):
    """A prompt of 8 beside one of 30: one pass over both, then at most one step for each of 5 tokens."""
    counted = Counted(llama)
    ids, _ = llama.generate([[1, *range(40, 47)], [1, *range(100, 129)]], 5, temperature=0)
    first, *steps = counted.widths()
    assert first == 30
    assert max(len(row) for row in ids) - 1 <= len(steps) <= 5 and set(steps) == {1}


def test_rows_that_have_ended_do_not_keep_the_others_running(script):
    """Computation stops with the last row, not at the limit."""
    counted = Counted(script.llama)
    script.say([20, 21, 22], [30, 31, 32, 33, 34])
    ids, _ = script.llama.generate([[20], [30]], 40, temperature=0)
    del script.llama.model.forward
    assert ids == [[21, 22], [31, 32, 33, 34]]
    assert len(counted.shapes) <= 6


def test_the_batch_size_does_not_show(tokenizer):
    prompts = PROMPTS * 2
    for temperature in (0.0, 0.8):
        results = [
            new_llama(tokenizer, max_batch_size=size).generate(prompts, 6, temperature=temperature, seed=3)[0]
            for size in (1, 3, 4)
        ]
        assert results[0] == results[1] == results[2]


# --- lengths -----------------------------------------------------------------------------------------------------

LOOP = list(range(300, 360))  # a script that outlasts the context


def test_max_gen_len_is_exact_for_every_row(script):
    script.say(LOOP)
    ids, _ = script.llama.generate([[300], [9] * 20 + [310]], 7, temperature=0)
    assert ids == [list(range(301, 308)), list(range(311, 318))]


def test_without_max_gen_len_the_context_is_filled(script):
    script.say(LOOP)
    prompts = [[300], [9] * 40 + [300], [9] * (CONTEXT - 2) + [300]]
    for ids in (script.llama.generate(prompts, None, temperature=0)[0], script.llama.generate(prompts, 99, 0)[0]):
        assert [len(row) for row in ids] == [CONTEXT - 1, CONTEXT - 41, 1]
        assert all(row == LOOP[1 : len(row) + 1] for row in ids)


def test_a_prompt_that_fills_the_context_gives_an_empty_completion(script):
    script.say(LOOP)
    full = [9] * CONTEXT
    rows = drain(script.llama.stream([full, [300]], 3, temperature=0), 2)
    assert rows[0] == {"ids": [], "text": "", "logprobs": [], "finish_reason": "length"}
    assert rows[1]["ids"] == [301, 302, 303]


def test_max_gen_len_zero_generates_nothing(llama):
    assert llama.generate([[1, 5], [1]], 0, logprobs=True) == ([[], []], [[], []])
    (result,) = llama.text_completion(["Anna"], max_gen_len=0)
    assert result == {"generation": "", "finish_reason": "length"}


@pytest.mark.parametrize("extra", [1, 30])
def test_a_longer_prompt_names_row_count_and_limit(llama, extra):
    counted = Counted(llama)
    with pytest.raises(ValueError, match=rf"\b2\b.*\b{CONTEXT + extra}\b.*\b{CONTEXT}\b") as caught:
        llama.generate([[1], [1, 2], [1] * (CONTEXT + extra)], 5)
    assert "\n" not in str(caught.value)
    assert not counted.shapes


def test_no_prompts_give_no_results(llama):
    assert llama.generate([], 5) == ([], None)
    assert llama.generate([], 5, logprobs=True) == ([], [])
    assert llama.text_completion([]) == llama.chat_completion([]) == llama.score([]) == list(llama.stream([], 5)) == []


def test_an_empty_text_is_the_bos_token(llama, tokenizer):
    (result,) = llama.text_completion([""], temperature=0, max_gen_len=6)
    assert result["generation"] == expected_row((1,), tokenizer.decode, 6).text


# --- text completion ---------------------------------------------------------------------------------------------


def test_text_completions_equal_the_reference(llama, tokenizer):
    texts = ["Anna took", "the red", "", "日本", "  two", "Where"]
    results = llama.text_completion(texts, temperature=0, max_gen_len=10, logprobs=True)
    for text, result in zip(texts, results, strict=True):
        row = expected_row(tuple(tokenizer.encode(text, bos=True, eos=False)), tokenizer.decode, 10)
        assert (result["generation"], result["finish_reason"]) == (row.text, row.finish_reason)
        assert result["tokens"] == [tokenizer.decode(i) for i in row.ids]
        np.testing.assert_allclose(result["logprobs"], row.logprobs, atol=1e-4, rtol=0)
        assert set(result) == {"generation", "finish_reason", "tokens", "logprobs"}


def test_without_logprobs_a_completion_has_two_keys(llama):
    (result,) = llama.text_completion(["Anna"], max_gen_len=3)
    assert set(result) == {"generation", "finish_reason"}


@pytest.mark.parametrize(
    ("chain_end", "max_gen_len", "reason"), [("eos", 10, "eos"), ("eos", 4, "eos"), ("eos", 3, "length")]
)
def test_finish_reasons(script, chain_end, max_gen_len, reason):
    """Three tokens, then EOS: with room for four it ends by itself, with room for three by length."""
    script.say([1, 301, 302, 303])
    (result,) = script.llama.text_completion([""], temperature=0, max_gen_len=max_gen_len)
    assert result["finish_reason"] == reason
    assert script.llama.generate([[1]], max_gen_len, temperature=0)[0] == [[301, 302, 303]]


# --- stopping ----------------------------------------------------------------------------------------------------

SAID = "two took the red cup, naïve☃!"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("red", "two took the "),
        ("the red", "two took "),
        ("ook th", "two t"),
        (" cup", "two took the red"),
        ("two", ""),
        ("t", ""),
        ("☃", "two took the red cup, naïve"),
        ("ï", "two took the red cup, na"),
        ("ïve☃", "two took the red cup, na"),
        ("!", SAID[:-1]),
        (SAID, ""),
        ("!!", SAID),
        ("red cap", SAID),
        ("☃!?", SAID),
        ("Red", SAID),
    ],
)
def test_a_stop_string_cuts_the_text_by_character(script, stop, text):
    script.say_text(SAID)
    reason = "eos" if text == SAID else "stop"
    (result,) = script.llama.text_completion([""], temperature=0, stop=[stop], logprobs=True)
    row = script.expected([1], stop=[stop])
    assert (result["generation"], result["finish_reason"]) == (text, reason) == (row.text, row.finish_reason)
    assert script.llama.generate([[1]], None, temperature=0, stop=[stop])[0] == [row.ids]
    assert len(result["tokens"]) == len(result["logprobs"]) == len(row.ids)
    (streamed,) = drain(script.llama.stream([[1]], None, temperature=0, stop=[stop]), 1)
    assert (streamed["ids"], streamed["text"], streamed["finish_reason"]) == (row.ids, text, reason)


def test_ids_end_before_the_first_token_that_touches_the_match(script, tokenizer):
    """ "ook th" begins inside " took": that token goes, though its first letter stays in the text."""
    ids = script.say_text(SAID)
    pieces = [tokenizer.sp_model.id_to_piece(i) for i in ids]
    got = script.llama.generate([[1]], None, temperature=0, stop=["ook th"])[0][0]
    assert got == ids[: pieces.index("▁took")]
    got = script.llama.generate([[1]], None, temperature=0, stop=["☃"])[0][0]
    assert got == ids[: pieces.index("<0xE2>")]


def test_the_first_of_several_stops_wins(script):
    script.say_text(SAID)
    for stop in (["cup", "red", "zzz"], ["red", "the red cup", "cup"]):
        (result,) = script.llama.text_completion([""], temperature=0, stop=stop)
        assert result["generation"] == script.expected([1], stop=stop).text


@pytest.mark.parametrize("kind", [int, np.int64])
def test_a_stop_id_ends_a_row_and_eos_still_does(script, kind):
    """Also as numpy's integer, which once passed the check and then stopped nothing."""
    script.say([1, 301, 302, 303], [20, 311, 312])
    rows = drain(script.llama.stream([[1], [20]], None, temperature=0, stop=[kind(303), "zzz"]), 2)
    assert [(row["ids"], row["finish_reason"]) for row in rows] == [([301, 302], "stop"), ([311, 312], "eos")]


def test_the_prompt_never_stops_anything(script, tokenizer):
    """Stop ids and stop strings that the prompt holds, and one that begins in the prompt and would end after it."""
    prompt = tokenizer.encode("the red cu", bos=True, eos=False)
    said = tokenizer.encode("Tom", bos=False, eos=False)
    script.say([prompt[-1], *said])
    for stop in ([prompt[1]], ["red"], ["uTom", "cu Tom", "u T"]):
        for echo in (False, True):
            ids, _ = script.llama.generate([prompt], None, temperature=0, echo=echo, stop=stop)
            assert ids == [prompt * echo + said]


def test_eos_in_an_echoed_prompt_does_not_end_it(script):
    script.say([301, 302, 303])
    prompt = [1, 400, EOS, 1, 301]
    ids, logprobs = script.llama.generate([prompt], None, temperature=0, echo=True, logprobs=True)
    assert ids == [[*prompt, 302, 303]]
    assert len(logprobs[0]) == 7


def test_echoed_text_comes_first_and_stops_count_after_it(script, tokenizer):
    prompt = tokenizer.encode("the red cup", bos=True, eos=False)
    said = tokenizer.encode("Tom took the book", bos=False, eos=False)
    script.say([prompt[-1], *said])
    plain, cut = (
        script.llama.text_completion(["the red cup"], temperature=0, echo=True, stop=stop, logprobs=True)[0]
        for stop in (None, ["ook"])
    )
    assert plain["generation"] == tokenizer.decode([*prompt, *said]) == "the red cup Tom took the book"
    assert plain["tokens"] == [tokenizer.decode(i) for i in [*prompt, *said]]
    assert (cut["generation"], cut["finish_reason"]) == ("the red cup Tom t", "stop")
    assert cut["tokens"] == plain["tokens"][: len(cut["tokens"])] and len(cut["tokens"]) == len(cut["logprobs"])


@settings(max_examples=15)
@given(
    PROMPT, st.lists(st.one_of(st.sampled_from(["a", "re", "e", "!", "k t"]), st.integers(3, VOCAB - 1)), max_size=4)
)
def test_echo_changes_nothing_about_what_is_generated(shared_llama, prompt, stop):
    options = {"temperature": 1.2, "seed": 8, "stop": stop, "logprobs": True}
    ids, logprobs = shared_llama.generate([prompt], 9, **options)
    echoed_ids, echoed_logprobs = shared_llama.generate([prompt], 9, echo=True, **options)
    assert echoed_ids == [prompt + ids[0]]
    np.testing.assert_allclose(echoed_logprobs[0][len(prompt) :], logprobs[0], atol=1e-5, rtol=0)


def test_a_stop_string_held_back_is_given_at_the_end(script):
    """The text ends in what might have been the beginning of a stop: it belongs to the text after all."""
    script.say_text("Tom took the red")
    for max_gen_len in (None, 4):
        (row,) = drain(script.llama.stream([[1]], max_gen_len, temperature=0, stop=["the red cup"]), 1)
        full = script.expected([1], max_gen_len=max_gen_len)
        assert (row["text"], row["ids"], row["finish_reason"]) == (full.text, full.ids, full.finish_reason)


def test_a_stream_holds_back_what_may_begin_a_stop(script):
    script.say_text(SAID)
    so_far = ""
    for piece in script.llama.stream([[1]], None, temperature=0, stop=["red cup in a"]):
        so_far += piece.text
        assert so_far == SAID or not so_far.endswith(("r", "red", "red cup", "red cup in"))
    assert so_far == SAID


SCRIPTED_ID = st.one_of(
    st.integers(3, VOCAB - 1), st.sampled_from([0, 1, 419, 287, 264, 272, 3 + 0xE2, 3 + 0x98, 3 + 0x83])
)


@settings(max_examples=150)
@given(st.data())
def test_stops_in_any_text_equal_the_reference(script, data):
    """Arbitrary ids, invalid bytes and control ids among them; stops cut out of the text they make, or near it."""
    ids = data.draw(st.lists(SCRIPTED_ID, min_size=1, max_size=14, unique=True))
    text = script.tokenizer.decode(ids).replace("\ufffd", "")
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, max(0, len(text) - 1)))
        end = data.draw(st.integers(begin + 1, len(text) + 1))
        stops.append((text[begin:end] + data.draw(st.sampled_from(["", "", "", "x", " "]))) or "a")
    stops += data.draw(st.lists(st.integers(3, VOCAB - 1), max_size=1))
    max_gen_len = data.draw(st.none() | st.integers(0, 14))
    script.say([10, *(i for i in ids if i != 10)])
    row = script.expected([10], stop=stops, max_gen_len=max_gen_len)
    options = {"temperature": 0, "stop": stops}
    assert script.llama.generate([[10]], max_gen_len, **options)[0] == [row.ids]
    (streamed,) = drain(script.llama.stream([[10]], max_gen_len, **options), 1)
    assert (streamed["ids"], streamed["text"], streamed["finish_reason"]) == (row.ids, row.text, row.finish_reason)


# --- streams -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.lists(PROMPT, min_size=1, max_size=6),
    st.sampled_from([0.0, 1.2]),
    st.booleans(),
    st.lists(st.one_of(st.sampled_from(["a", "re", "e", " t"]), st.integers(3, VOCAB - 1)), max_size=4),
)
def test_a_drained_stream_is_the_blocking_result(shared_llama, tokenizer, prompts, temperature, echo, stop):
    options = {"temperature": temperature, "seed": 8, "echo": echo, "stop": stop, "logprobs": True}
    ids, logprobs = shared_llama.generate(prompts, 9, **options)
    rows = drain(shared_llama.stream(prompts, 9, **options), len(prompts))
    assert [row["ids"] for row in rows] == ids
    for row, expected in zip(rows, logprobs, strict=True):
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-5, rtol=0)
        assert len(row["logprobs"]) == len(row["ids"])
        if row["finish_reason"] != "stop":
            assert row["text"] == tokenizer.decode(row["ids"])


def test_a_stream_gives_whole_characters_as_soon_as_they_are_there(script, tokenizer):
    ids = script.say_text("naïve日😀!")
    arrived, so_far = [], ""
    for piece in script.llama.stream([[1]], None, temperature=0):
        assert "\ufffd" not in piece.text
        arrived += piece.ids
        so_far += piece.text
        assert so_far == tokenizer.decode(arrived).rstrip("\ufffd")
    assert (arrived, so_far) == (ids, "naïve日😀!")


def test_a_stream_yields_while_it_computes(script):
    """After each pass of the model comes what that pass made certain, before the next pass."""
    ids = script.say_text("Anna took the red cup")
    counted = Counted(script.llama)
    arrived = []
    for piece in script.llama.stream([[1]], None, temperature=0):
        arrived += piece.ids
        assert len(counted.shapes) <= len(arrived) + 1
    del script.llama.model.forward
    assert arrived == ids and len(counted.shapes) >= len(ids)


def test_pieces_have_the_documented_fields(llama):
    row, ids, text, _, _ = piece = next(iter(llama.stream([[1, 5]], 4, temperature=0, logprobs=True)))
    assert (row, ids, text) == (piece.row, piece.ids, piece.text)
    assert len(piece.logprobs) == len(piece.ids)


def test_an_interrupted_stream_leaves_nothing_behind(llama, tokenizer):
    for pieces in (0, 1, 3):
        stream = llama.stream(PROMPTS[:4], 14, temperature=0)
        for _ in range(pieces):
            next(stream)
        stream.close()
        ids, _ = llama.generate(PROMPTS[2:5], 14, temperature=0)
        assert ids == [expected_row(tuple(p), tokenizer.decode, 14).ids for p in PROMPTS[2:5]]


def test_two_streams_at_once_never_mix(script):
    """One cache serves one call: the first stream may end with an error, but neither may give a wrong id."""
    script.say(LOOP)
    first = script.llama.stream([[300]], 6, temperature=0)
    begun = next(first)
    second = list(script.llama.stream([[9, 9, 330]], 6, temperature=0))
    assert [i for piece in second for i in piece.ids] == list(range(331, 337))
    try:
        rest = [i for piece in first for i in piece.ids]
    except RuntimeError as error:
        assert "stream" in str(error) or "call" in str(error)
    else:
        assert begun.ids + rest == list(range(301, 307))


# --- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_gen_len", [0, 1, 6, None])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_the_models_own(llama, max_gen_len, temperature):
    """With echo: every token of prompt and completion, under the whole model, whatever temperature and top_p did."""
    prompts = [*PROMPTS[:5], list(range(50, 50 + CONTEXT)), list(range(49, 49 + CONTEXT - 1))]
    options = {"temperature": temperature, "top_p": 0.5, "logprobs": True, "seed": 4}
    ids, logprobs = llama.generate(prompts, max_gen_len, echo=True, **options)
    short_ids, short_logprobs = llama.generate(prompts, max_gen_len, **options)
    for row, prompt in enumerate(prompts):
        assert ids[row] == prompt + short_ids[row]
        expected = reference.token_log_probs(ids[row], arrays(), shape_of(PARAMS))
        assert logprobs[row][0] == 0.0
        np.testing.assert_allclose(logprobs[row], expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(short_logprobs[row], expected[len(prompt) :], atol=1e-4, rtol=0)
    assert any(short_ids) or max_gen_len == 0


def test_score_gives_every_tokens_log_probability(llama, tokenizer):
    texts = ["Anna took the red cup", "", "日本の本", "  two spaces ", "Where is it?", "a"]
    counted = Counted(llama)
    results = llama.score(texts)
    assert len(counted.shapes) == 2  # chunks of four and two, nothing generated
    for text, result in zip(texts, results, strict=True):
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert result["tokens"] == [tokenizer.decode(i) for i in ids]
        expected = reference.token_log_probs(ids, arrays(), shape_of(PARAMS))
        np.testing.assert_allclose(result["logprobs"], expected, atol=1e-4, rtol=0)
        assert set(result) == {"tokens", "logprobs"}


def test_score_of_a_text_that_fills_the_context(tokenizer):
    ids = tokenizer.encode("Anna took the red cup", bos=True, eos=False)
    (result,) = new_llama(tokenizer, max_seq_len=len(ids)).score(["Anna took the red cup"])
    expected = reference.token_log_probs(ids, arrays(), shape_of(PARAMS))
    np.testing.assert_allclose(result["logprobs"], expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=rf"\b1\b.*\b{len(ids)}\b"):
        new_llama(tokenizer, max_seq_len=len(ids) - 1).score(["a", "Anna took the red cup"])


class WidestLogits(TorchDispatchMode):
    """The largest number of vocabulary-wide rows in any one tensor that an operation makes, weights aside."""

    def __init__(self, model) -> None:
        super().__init__()
        self.rows = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            wide = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == VOCAB
            if wide and leaf.untyped_storage().data_ptr() not in self.weights:
                self.rows = max(self.rows, leaf.numel() // VOCAB)
        return out


def test_logits_of_a_long_prompt_are_never_held_at_once(tokenizer):
    """Prompts of 1,500 and 700: padded they would be 3,000 rows of logits; without echo, only the last of each."""
    llama = new_llama(tokenizer, max_batch_size=2, max_seq_len=1536)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (1500, 700)]
    with WidestLogits(llama.model) as without:
        ids, _ = llama.generate(prompts, 1, temperature=0, logprobs=True)
    with WidestLogits(llama.model) as with_echo:
        _, logprobs = llama.generate(prompts, 0, temperature=0, logprobs=True, echo=True)
    assert 0 < without.rows <= 2
    assert 0 < with_echo.rows < 2 * 1500
    for row, prompt in enumerate(prompts):
        table = llama.model(torch.tensor([prompt])).detach()[0].log_softmax(-1)
        assert ids[row] == [i for i in [int(table[-1].argmax())] if i != EOS]
        expected = table[range(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(logprobs[row], [0.0, *expected.tolist()], atol=1e-4, rtol=0)


# --- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "top_p": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 5, "top_p": 1.0},
        {"top_p": 0.3},
        {},
    ],
    ids=str,
)
def test_each_token_inverts_the_kept_distribution_at_the_next_uniform(llama, tokenizer, monkeypatch, options):
    """The uniform numbers are taken from the call of `sample`; everything after them is the naive generator's."""
    uniforms = []
    original = sampling.sample

    def recorded(logits, given_uniforms, *args, **kwargs):
        uniforms.append(given_uniforms.tolist())
        return original(logits, given_uniforms, *args, **kwargs)

    monkeypatch.setattr(sampling, "sample", recorded)
    full = {"temperature": 0.6, "top_p": 0.9, "top_k": None} | options
    prompt = [1, 400, 7]
    ids, logprobs = llama.generate([prompt], 12, seed=21, logprobs=True, **options)
    assert all(len(u) == 1 and 0 <= u[0] < 1 for u in uniforms) and len({u[0] for u in uniforms}) == len(uniforms)

    def pick(last: np.ndarray, t: int) -> int:
        kept = reference.kept_distribution(last, **full)
        assert reference.distance_to_edge(kept, uniforms[t][0]) > 2e-5, "too close for float32: choose another seed"
        return reference.invert(kept, uniforms[t][0])

    row = reference.complete(
        prompt,
        random_model_logits,
        max_seq_len=CONTEXT,
        max_gen_len=12,
        eos_id=EOS,
        decode=tokenizer.decode,
        pick=pick,
    )
    assert ids == [row.ids] and len(row.ids) > 2
    np.testing.assert_allclose(logprobs[0], row.logprobs, atol=1e-4, rtol=0)


def flat_script(tokenizer, **options) -> Llama:
    """A model that finds all tokens but EOS about equally likely: what it says is all the seed's."""
    script = Script(tokenizer, **options)
    script.table[:] = np.random.default_rng(0).normal(size=script.table.shape) * 0.1
    script.table[:, :3] = -30.0
    script.load()
    return script.llama


def test_a_seed_repeats_exactly_and_another_differs(tokenizer):
    llama = flat_script(tokenizer)
    options = {"temperature": 1.0, "top_p": 1.0}
    first = llama.generate([[5], [6]], 12, seed=3, **options)
    llama.generate([[7]], 5, **options)
    assert llama.generate([[5], [6]], 12, seed=3, **options) == first
    assert llama.generate([[5], [6]], 12, seed=4, **options) != first
    assert flat_script(tokenizer).generate([[5], [6]], 12, seed=3, **options) == first


def test_rows_with_the_same_prompt_sample_differently(tokenizer):
    ids, _ = flat_script(tokenizer, max_batch_size=2).generate([[5]] * 6, 12, temperature=1.0, top_p=1.0, seed=3)
    assert len({tuple(row) for row in ids}) == 6


def test_neighbouring_seeds_share_no_rows(tokenizer):
    """Row 1 of seed 3 is not row 0 of seed 4: seed and index are not simply added."""
    llama = flat_script(tokenizer)
    options = {"temperature": 1.0, "top_p": 1.0}
    rows = [tuple(row) for seed in (3, 4, 5) for row in llama.generate([[5]] * 3, 12, seed=seed, **options)[0]]
    assert len(set(rows)) == 9


def test_a_sample_depends_on_its_index_and_not_on_its_mates(tokenizer):
    """Row 2 keeps its ids whoever sits beside it, whichever chunk it falls into, however long others run."""
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 9}
    expected = flat_script(tokenizer).generate([[5], [6], [7, 8]], 10, **options)[0][2]
    for size in (1, 2, 3, 4):
        llama = flat_script(tokenizer, max_batch_size=size)
        for mates in ([[5], [6]], [[9] * 30, [10]], [[11] * CONTEXT, [1, 2]]):
            assert llama.generate([*mates, [7, 8], [12]], 10, **options)[0][2] == expected


def test_a_longer_limit_continues_the_same_sample(tokenizer):
    llama = flat_script(tokenizer)
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 9}
    short, long = (llama.generate([[5]], n, **options)[0][0] for n in (4, 20))
    assert long[:4] == short


def test_without_a_seed_calls_differ_but_instances_agree(tokenizer):
    """The sequence begins at the seed given to the instance."""
    options = {"temperature": 1.0, "top_p": 1.0}
    first, second, other = (flat_script(tokenizer) for _ in range(3))
    calls = [first.generate([[5]], 12, **options) for _ in range(3)]
    assert len({tuple(ids[0]) for ids, _ in calls}) == 3
    assert calls == [second.generate([[5]], 12, **options) for _ in range(3)]
    reseeded = Llama(other.model, tokenizer, seed=77)
    assert reseeded.generate([[5]], 12, **options) != calls[0]


def test_temperature_zero_is_argmax_whatever_the_seed(llama, tokenizer):
    expected = expected_row((1, 400, 7), tokenizer.decode, 14).ids
    for options in ({"seed": 1}, {"seed": 2}, {"top_p": 0.1}, {"top_k": 3}, {}):
        assert llama.generate([[1, 400, 7]], 14, temperature=0, **options)[0] == [expected]
    assert llama.generate([[1, 400, 7]], 14, temperature=1e-4, seed=1)[0] == [expected]
    assert llama.generate([[1, 400, 7]], 14, temperature=5.0, top_k=1)[0] == [expected]


# --- chat --------------------------------------------------------------------------------------------------------


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


LONG_DIALOG = [
    {"role": "system", "content": "Answer in one word."},
    *user("Where is it?"),
    {"role": "assistant", "content": "Here."},
    *user("Who?"),
]


@pytest.fixture(scope="module")
def chat_llama(tokenizer) -> Llama:
    return new_llama(tokenizer, max_seq_len=96)


def test_chat_is_generate_on_the_encoded_dialogs(chat_llama, tokenizer):
    dialogs = [user("Where is the red cup?"), LONG_DIALOG, user("hi"), user("two"), user("日本")]
    for options in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.8, "top_k": 50, "seed": 6}):
        ids, logprobs = chat_llama.generate(
            [encode_dialog(tokenizer, d) for d in dialogs], 12, logprobs=True, **options
        )
        results = chat_llama.chat_completion(dialogs, max_gen_len=12, logprobs=True, **options)
        for row, result in enumerate(results):
            assert result["generation"] == {"role": "assistant", "content": tokenizer.decode(ids[row])}
            assert result["finish_reason"] in ("eos", "length")
            assert result["tokens"] == [tokenizer.decode(i) for i in ids[row]]
            np.testing.assert_allclose(result["logprobs"], logprobs[row], atol=1e-5, rtol=0)
    assert "tokens" not in chat_llama.chat_completion([user("hi")], max_gen_len=2)[0]


REFUSED = [
    user("what is [INST] for?"),
    user("[/INST]"),
    user("a<<SYS>>b"),
    [{"role": "system", "content": "be <</SYS>> kind"}, *user("hi")],
    [*user("hi"), {"role": "assistant", "content": "[/INST] there"}, *user("bye")],
]


@pytest.mark.parametrize("refused", REFUSED, ids=range(len(REFUSED)))
def test_a_special_tag_is_refused_without_compute(chat_llama, monkeypatch, refused):
    monkeypatch.setattr(chat_llama.model, "forward", lambda *args, **kwargs: pytest.fail("something was computed"))
    (result,) = chat_llama.chat_completion([refused], logprobs=True)
    assert result["generation"] == {"role": "assistant", "content": UNSAFE_ERROR}
    assert result["finish_reason"] == "refused"
    assert result["tokens"] == result["logprobs"] == []


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 2}], ids=str)
def test_a_refusal_leaves_the_other_rows_alone(chat_llama, options):
    """Same place, same ids, same random numbers as if the refused dialog had been an ordinary one."""
    counted = Counted(chat_llama)
    mixed = [user("hi"), REFUSED[0], user("where?"), REFUSED[3], user("Tom"), user("Anna")]
    plain = [d if d not in REFUSED else user("ok") for d in mixed]
    got = chat_llama.chat_completion(mixed, max_gen_len=8, logprobs=True, **options)
    assert max(rows for rows, _ in counted.shapes) <= 4
    del chat_llama.model.forward
    expected = chat_llama.chat_completion(plain, max_gen_len=8, logprobs=True, **options)
    for row, dialog in enumerate(mixed):
        if dialog in REFUSED:
            assert got[row]["finish_reason"] == "refused"
        else:
            assert got[row]["tokens"] == expected[row]["tokens"]
            assert got[row]["generation"] == expected[row]["generation"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], ["1", "empty"]),
        ([{"role": "assistant", "content": "hi"}], ["1", "0", "'assistant'", "'user'"]),
        ([*user("a"), *user("b")], ["1", "'assistant'", "'user'"]),
        ([*user("a"), {"role": "assistant", "content": "b"}], ["1", "user"]),
        ([{"role": "user", "content": 5}], ["1", "0", "int"]),
    ],
    ids=["empty", "assistant_first", "user_twice", "assistant_last", "content_int"],
)
def test_a_wrong_dialog_is_named_before_anything_is_computed(chat_llama, monkeypatch, bad, words):
    monkeypatch.setattr(chat_llama.model, "forward", lambda *args, **kwargs: pytest.fail("something was computed"))
    with pytest.raises(ValueError) as caught:
        chat_llama.chat_completion([user("hi"), bad, REFUSED[0]])
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_a_dialog_too_long_is_named_by_its_place_among_all_dialogs(chat_llama):
    with pytest.raises(ValueError, match=r"\b2\b.*\b96\b"):
        chat_llama.chat_completion([REFUSED[0], user("hi"), user("word " * 100)])


# --- cache reuse -------------------------------------------------------------------------------------------------


def test_a_conversation_computes_only_what_is_new(llama, tokenizer):
    counted = Counted(llama)
    prompt = [1, 400, 7, 55, 66, 77, 88, 99]
    (reply,), _ = llama.generate([prompt], 5, temperature=0)
    assert counted.widths()[0] == len(prompt)
    longer = [*prompt, *reply, 120, 121, 122]
    ids, _ = llama.generate([longer], 5, temperature=0)
    assert counted.widths()[0] <= 4  # the new tokens, and perhaps the reply's last, which was never fed back
    assert ids == new_llama(tokenizer).generate([longer], 5, temperature=0)[0]


def test_the_same_prompt_again_computes_one_token(llama):
    counted = Counted(llama)
    prompts = [[1, 400, 7, 9], [1, 260, 5, 5]]
    first = llama.generate(prompts, 6, temperature=0)
    counted.shapes.clear()
    assert llama.generate(prompts, 6, temperature=0) == first
    assert counted.widths()[0] == 1


def test_a_changed_beginning_is_computed_again(llama, tokenizer):
    counted = Counted(llama)
    llama.generate([[1, 50, 51, 52, 53, 54]], 4, temperature=0)
    counted.shapes.clear()
    ids, _ = llama.generate([[1, 50, 51, 99, 53, 54]], 4, temperature=0)
    assert counted.widths()[0] == 3
    assert ids == new_llama(tokenizer).generate([[1, 50, 51, 99, 53, 54]], 4, temperature=0)[0]


def test_prompt_log_probabilities_need_the_whole_prompt(llama):
    counted = Counted(llama)
    prompt = [1, 50, 51, 52, 53, 54]
    llama.generate([prompt], 4, temperature=0)
    counted.shapes.clear()
    _, logprobs = llama.generate([prompt], 0, echo=True, logprobs=True)
    assert counted.widths() == [len(prompt)]
    expected = reference.token_log_probs(prompt, arrays(), shape_of(PARAMS))
    np.testing.assert_allclose(logprobs[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", ["forward", "forward"])
@pytest.mark.parametrize("given", [False, True])
def test_a_direct_call_of_the_model_makes_the_cache_forgotten(llama, tokenizer, step, given):
    """Also where the caller hands in the model's own cache, which once kept the note and gave wrong ids."""
    prompt = [1, 50, 51, 52, 53, 54]
    llama.generate([prompt], 4, temperature=0)
    options = {"cache": llama.model.own_cache()} if given else {}
    getattr(llama.model, step)(torch.tensor([[9, 9, 9, 9, 9, 9, 9, 9]]), 0, **options)
    counted = Counted(llama)
    ids, _ = llama.generate([prompt], 4, temperature=0)
    assert counted.widths()[0] == len(prompt)
    assert ids == new_llama(tokenizer).generate([prompt], 4, temperature=0)[0]


STEM = [1, 400, 7, 55, 66, 77, 88, 99, 111, 123]
STEMMED = st.builds(lambda n, tail: STEM[:n] + tail, st.integers(1, 10), st.lists(st.integers(60, 68), max_size=3))


@settings(max_examples=15)
@given(st.lists(st.tuples(st.lists(STEMMED, min_size=1, max_size=5), st.integers(0, 5), st.booleans()), max_size=5))
def test_any_sequence_of_calls_equals_fresh_runs(tokenizer, calls):
    """Shared beginnings of every length, rows that change places, several chunks, echoes and streams cut short."""
    llama = new_llama(tokenizer, max_batch_size=2)
    for prompts, max_gen_len, echo in calls:
        options = {"temperature": 0, "logprobs": True, "echo": echo}
        got_ids, got_logprobs = llama.generate(prompts, max_gen_len, **options)
        ids, logprobs = new_llama(tokenizer).generate(prompts, max_gen_len, **options)
        assert got_ids == ids
        for got, expected in zip(got_logprobs, logprobs, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
        if len(prompts) > 2:
            next(iter(llama.stream(prompts[::-1], 3, temperature=0)))


# --- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.fixture(params=[math.nan, math.inf], ids=str)
def poisoned(request, tokenizer) -> Llama:
    """After token 200, some logits are not finite."""
    llama = new_llama(tokenizer)
    with torch.no_grad():
        llama.model.tok_embeddings.weight[200, 3] = request.param
    return llama


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("row", [1, 5])
def test_logits_that_are_not_finite_name_row_position_and_dtype(poisoned, tokenizer, temperature, row):
    prompts = [[1, 50 + n] for n in range(6)]
    prompts[row] = [1, 50, 60, 200]
    with pytest.raises(RuntimeError, match=rf"(?i)row {row}\b.*position \d+.*float32") as caught:
        poisoned.generate(prompts, 5, temperature=temperature, seed=1)
    assert "\n" not in str(caught.value)
    ids, _ = poisoned.generate([[1, 400, 7]], 14, temperature=0)
    assert ids == [expected_row((1, 400, 7), tokenizer.decode, 14).ids]


def test_a_token_generated_before_the_fault_is_not_followed_by_text_made_from_it(tokenizer):
    script = Script(tokenizer)
    script.say([300, 301, 302, 303])
    with torch.no_grad():
        script.llama.model.tok_embeddings.weight[302] = math.nan
    seen = []
    with pytest.raises(RuntimeError, match=r"(?i)row 0"):
        for piece in script.llama.stream([[9, 300]], 8, temperature=0):
            seen += piece.ids
    assert seen in ([301], [301, 302])


def test_prompt_log_probabilities_that_are_not_finite_raise(poisoned):
    prompt = [1, 200, 60, 70]
    with pytest.raises(RuntimeError, match=r"(?i)row 1"):
        poisoned.generate([[1, 5], prompt], 0, echo=True, logprobs=True)


# --- a vocabulary that is not the tokenizer's --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2.0, "top_p": 1.0, "seed": 3}], ids=str)
def test_rows_beyond_the_tokenizer_are_never_chosen(tokenizer, options):
    """A padded embedding: ids without text are likely here, but only those with text come out."""
    params = PARAMS | {"vocab_size": VOCAB + 20}
    state = random_weights(params, seed=12)
    state["output.weight"][VOCAB:] *= 6.0
    prompts = [[1, 50, 51], [1], [1, 60, 61, 62]]
    llama = Llama(build_model(params, state, max_seq_len=CONTEXT), tokenizer)
    ids, logprobs = llama.generate(prompts, 12, logprobs=True, **options)
    for prompt, row, row_logprobs in zip(prompts, ids, logprobs, strict=True):
        assert row and max(row) < VOCAB
        sequence = [*prompt, *row]
        table = reference.logits(sequence, as_float64(state), shape_of(params))
        assert table.argmax(axis=-1).max() >= VOCAB
        if options["temperature"] == 0:
            assert row == table[len(prompt) - 1 : -1, :VOCAB].argmax(axis=-1).tolist()
        expected = reference.token_log_probs(sequence, as_float64(state), shape_of(params))
        np.testing.assert_allclose(row_logprobs, expected[len(prompt) :], atol=1e-4, rtol=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    params = PARAMS | {"vocab_size": VOCAB - 1}
    with pytest.raises(ValueError, match=rf"\b{VOCAB}\b.*\b{VOCAB - 1}\b"):
        Llama(build_model(params, random_weights(params)), tokenizer)


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": 1.0001}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -3}, "top_k"),
        ({"max_gen_len": -1}, "max_gen_len"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["generate", "stream", "text_completion", "chat_completion"])
def test_options_out_of_range_are_named_before_anything_is_computed(llama, call, options, word):
    counted = Counted(llama)
    prompts = {"text_completion": ["hi"], "chat_completion": [user("hi")]}.get(call, [[1, 5]])
    options = {"max_gen_len": 2} | options
    with pytest.raises(ValueError, match=word) as caught:
        list(getattr(llama, call)(prompts, **options))
    value = next(iter(options.keys() & {word}))
    assert str(options[value]) in str(caught.value) and "\n" not in str(caught.value)
    assert not counted.shapes


@pytest.mark.parametrize("bad", [-1, VOCAB, VOCAB + 1000])
def test_ids_out_of_range_are_named(llama, bad):
    counted = Counted(llama)
    with pytest.raises(ValueError, match=rf"\b1\b.*{bad}\b") as caught:
        llama.generate([[1, 5], [1, 6, bad]], 2)
    assert "\n" not in str(caught.value) and not counted.shapes


def test_a_prompt_without_ids_is_refused(llama):
    with pytest.raises(ValueError, match=r"\b1\b"):
        llama.generate([[1], []], 2)


def test_an_error_leaves_the_instance_usable(llama, tokenizer):
    for bad in ([[1, -1]], [[1] * 100], [[]]):
        with pytest.raises(ValueError):
            llama.generate(bad, 2)
    assert llama.generate([[1, 400, 7]], 14, 0)[0] == [expected_row((1, 400, 7), tokenizer.decode, 14).ids]


# --- state -------------------------------------------------------------------------------------------------------


def test_calls_leave_global_state_alone(llama):
    before = global_state()
    llama.generate(PROMPTS, 5, temperature=0.9)
    llama.text_completion(["Anna", "Tom"], max_gen_len=4, logprobs=True, echo=True)
    llama.chat_completion([user("hi"), REFUSED[0]], max_gen_len=3)
    llama.score(["Anna"])
    stream = llama.stream(PROMPTS, 5)
    next(stream)
    assert global_state() == before, "state differs while a stream is open"
    stream.close()
    with pytest.raises(ValueError):
        llama.generate([[-1]], 5)
    assert global_state() == before


# --- from files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_build_gives_the_same_as_by_hand(tmp_path, tokenizer, tokenizer_path, capsys, shards):
    folder = write_checkpoint(tmp_path / "model", PARAMS | {"vocab_size": -1}, weights(), tokenizer_path, shards)
    before = global_state()
    llama = Llama.build(str(folder), None, CONTEXT, 4, device="cpu")
    assert global_state() == before
    ids, _ = llama.generate(PROMPTS, 14, temperature=0)
    assert ids == [expected_row(tuple(prompt), tokenizer.decode, 14).ids for prompt in PROMPTS]
    assert (llama.model.params.max_seq_len, llama.model.params.max_batch_size) == (CONTEXT, 4)
    assert capsys.readouterr().out == ""


def test_build_finds_the_tokenizer_one_level_up_and_takes_the_seed(tmp_path, tokenizer, tokenizer_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights())
    options = {"max_seq_len": CONTEXT, "device": "cpu"}
    calls = [Llama.build(folder, seed=seed, **options).generate([[1]], 20, 1.5, 1.0) for seed in (5, 5, 6)]
    assert calls[0] == calls[1] != calls[2]


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(100 * length + seed)
    return [1, *torch.randint(3, VOCAB, (length - 1,), generator=generator).tolist()]


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


def test_n_completions_share_one_prefill(llama):
    counted = Counted(llama)
    llama.generate([prompt(40)], 1, 0.9, seed=1, n=6)
    assert counted.shapes == [(1, 40), (2, 1)]  # the last two wait for slots, and go on from their keys


def test_n_completions_in_as_many_slots_share_one_prefill(llama):
    counted = Counted(llama)
    llama.generate([prompt(40)], 1, 0.9, seed=1, n=4)
    assert counted.shapes == [(1, 40)]


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


@pytest.mark.parametrize("bias", [{10**6: 1.0}, {5: math.inf}, {5: math.nan}])
def test_a_bias_that_cannot_be_added_is_refused_before_anything_is_computed(llama, monkeypatch, bias):
    monkeypatch.setattr(llama.engine, "submit", None)
    with pytest.raises(ValueError, match="logit_bias holds"):
        llama.generate([[1, 5]], 3, logit_bias=bias)


def test_a_bias_of_the_last_id(llama):
    last = llama.tokenizer.n_words - 1
    (ids,), _ = llama.generate([[1, 5]], 3, temperature=0, logit_bias={last: 1000.0})
    assert ids == [last] * 3
    with pytest.raises(ValueError, match=f"logit_bias holds {last + 1}"):
        llama.generate([[1, 5]], 3, logit_bias={0: 1.0, last + 1: 1.0})


def test_an_echo_of_ids_that_only_the_model_knows(tokenizer):
    params = PARAMS | {"vocab_size": tokenizer.n_words + 20}
    llama = Llama(build_model(params, random_weights(params)), tokenizer)
    ids = [1, tokenizer.n_words + 9, tokenizer.n_words]
    (found,), _ = llama.generate([ids], 0, echo=True)
    assert found == ids
    pieces = list(llama.stream([ids], 2, 0, logprobs=True, echo=True, top_logprobs=2))
    assert pieces[0].text == "\ufffd\ufffd" and pieces[0].ids == ids

    row = Row(ids, Sampling(max_gen_len=0, logprobs=True, echo=True).checked(), tokenizer, room=5)
    llama.finish([row])
    assert prediction(tokenizer, row, row.text)["tokens"] == ["", "\ufffd", "\ufffd"]


def test_prompts_of_numpy_integers(llama):
    """What comes back are plain integers, which can be written as JSON."""
    ids = [1, 40, 41, 42]
    expected = llama.generate([ids], 4, 0, logprobs=True, echo=True)
    found = llama.generate([[np.int64(id) for id in ids]], 4, 0, logprobs=True, echo=True)
    assert found == expected
    assert {type(id) for id in found[0][0]} == {int}
