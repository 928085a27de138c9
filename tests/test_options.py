"""Keywords that all calls share: shown by help and type hints, checked, refused where they do not exist."""

import inspect
import typing

import pytest
import torch

from llama.generation import Llama
from llama.options import ELSEWHERE
from llama.sampling import Sampling
from support.models import build_model, random_weights

PARAMS = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 480, "multiple_of": 16}
CALLS = ["generate", "text_completion", "chat_completion", "text_infilling", "stream", "stream_chat"]
SHARED = [
    *["top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "logits_processor"],
    *["stop", "seed", "n", "top_logprobs"],
]


@pytest.fixture(scope="module")
def llama(tokenizer) -> Llama:
    return Llama(build_model(PARAMS, random_weights(PARAMS)), tokenizer)


@pytest.mark.parametrize("call", CALLS)
def test_every_keyword_is_shown(call, capsys):
    function = getattr(Llama, call)
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    help(function)
    shown = capsys.readouterr().out
    for name in SHARED:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == getattr(Sampling(), name)
        assert name in hints and f"{name}:" in shown
    assert "options" not in parameters and "options" not in hints and "**" not in shown


@pytest.mark.parametrize("call", CALLS)
def test_a_misspelled_keyword_is_named_as_the_calls_own(llama, call):
    with pytest.raises(TypeError, match=rf"^{call}\(\) has no argument 'temprature'; did you mean 'temperature'\.$"):
        getattr(llama, call)(temprature=0)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length", "num_return_sequences", "do_sample", *ELSEWHERE])
def test_words_of_other_libraries_are_answered_with_ours(llama, name):
    with pytest.raises(TypeError, match=rf"^text_completion\(\) has no argument '{name}'; here it is ") as told:
        llama.text_completion(["a"], **{name: 5})
    assert any(word in str(told.value) for word in (*SHARED, "max_gen_len", "temperature", "stream"))


def test_repetition_penalty_is_answered_with_the_two_penalties(llama):
    with pytest.raises(TypeError, match="presence_penalty or frequency_penalty"):
        llama.generate([[1]], 3, repetition_penalty=1.2)


def test_a_word_like_no_other_gets_the_list(llama):
    with pytest.raises(TypeError, match=r"has no argument 'xyzzy'; it takes prompts, temperature, .*top_logprobs\.$"):
        llama.text_completion(["a"], xyzzy=1)


@pytest.mark.parametrize("call", ["chat_completion", "text_infilling", "stream_chat"])
def test_echo_is_no_argument_of_calls_that_have_none(llama, call):
    with pytest.raises(TypeError, match=r"has no argument 'echo'"):
        getattr(llama, call)([], echo=True)


WRONG = {
    "temperature": [-1, float("nan"), float("inf"), "hot", None, True],
    "top_p": [0, 1.5, "0.9", None, float("nan")],
    "top_k": [0, 1.5, "3", True],
    "min_p": [-0.1, 1.1, "0.1", True],
    "presence_penalty": [float("inf"), "1", None],
    "frequency_penalty": [float("nan"), "1", None, True],
    "logit_bias": [[5], {"5": 1.0}, {5: "1"}, {-1: 1.0}, {5: float("nan")}, "5"],
    "logits_processor": [5, "f"],
    "stop": [5, "END", [""], [1.5], [None], {"a": b"b"}.values()],
    "seed": [1.5, "1", True],
    "n": [0, 1.5, None, "2"],
    "top_logprobs": [-1, 1.5, None, "2"],
    "max_gen_len": [-1, 1.5, "9", True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=str
)
def test_an_option_out_of_its_range_is_named(llama, monkeypatch, name, value):
    monkeypatch.setattr(llama.model, "forward", lambda *args, **kwargs: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=rf"^{name} (is|holds) .*; it must be "):
        llama.text_completion(["a"], **{name: value})


@pytest.mark.parametrize("given", [iter(["e", "a"]), (word for word in ("e", "a")), ("e", "a"), {"e": 1, "a": 2}])
def test_stop_may_be_any_iterable(llama, given):
    """An iterator was consumed by the check, and then stopped nothing."""
    expected = llama.text_completion(["Anna took"], 0, stop=["e", "a"], max_gen_len=30)
    assert expected[0]["finish_reason"] == "stop"
    assert llama.text_completion(["Anna took"], 0, stop=given, max_gen_len=30) == expected


def test_a_bias_beyond_the_vocabulary_fails_the_call_alone(llama):
    with pytest.raises((ValueError, IndexError)):
        llama.text_completion(["Anna"], logit_bias={10**6: 1.0}, max_gen_len=3)
    assert llama.text_completion(["Anna"], 0, max_gen_len=3)


@pytest.mark.parametrize("given", [None, "Anna", 5])
def test_texts_that_are_no_list_are_refused(llama, given):
    with pytest.raises(ValueError, match=r"^Texts must come as a list of strings, not as "):
        llama.text_completion(given)


@pytest.mark.parametrize("given", [None, "Anna", 5])
def test_prompts_that_are_no_list_are_refused(llama, given):
    with pytest.raises(ValueError, match=r"^Prompts must come as a list of lists of token ids, not as "):
        llama.generate(given, 5)


def test_a_seed_of_the_instance_is_checked_before_files_are_read():
    with pytest.raises(ValueError, match=r"^seed is 'a'; it must be an integer"):
        Llama.build("nowhere", seed="a")


# --- what the options do, in whole calls -------------------------------------------------------------------------


def test_a_processor_admits_only_digits(llama):
    """The example of the documentation."""
    pieces = [llama.tokenizer.decode([id]) for id in range(llama.tokenizer.n_words)]
    allowed = torch.tensor([piece.isdigit() and piece.isascii() for piece in pieces])
    seen = []

    def digits_only(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(ids))
        return logits.masked_fill(~allowed, -torch.inf)

    (answer,) = llama.text_completion(["There are"], 0.8, max_gen_len=8, seed=2, logits_processor=digits_only)
    assert answer["generation"].replace(" ", "").isdigit() and len(answer["generation"].replace(" ", "")) >= 4
    prompt = llama.tokenizer.encode("There are", bos=True, eos=False)
    assert seen[0] == prompt and [len(ids) for ids in seen] == list(range(len(prompt), len(prompt) + len(seen)))


def test_log_probabilities_stay_the_models_own(llama):
    """Neither bias nor penalties nor a processor show in them."""
    options = {"logit_bias": {77: 100.0}, "frequency_penalty": 0.5, "logits_processor": lambda ids, logits: logits / 2}
    ids, logprobs = llama.generate([[1, 5, 9]], 3, 0, logprobs=True, **options)
    assert ids == [[77, 77, 77]]
    whole = llama.model(torch.tensor([[1, 5, 9, 77, 77]])).detach()[0].log_softmax(-1)
    assert logprobs[0] == pytest.approx(whole[2:, 77].tolist(), abs=1e-4)


def test_penalties_count_what_was_generated_and_not_the_prompt(llama):
    """A bias of 50 chooses id 77 until the penalty for its earlier uses exceeds it."""
    bias = {77: 50.0}
    prompt = [1, 77, 77, 77, 77]
    (plain,), _ = llama.generate([prompt], 6, 0, logit_bias=bias)
    assert plain == [77] * 6
    (frequent,), _ = llama.generate([prompt], 6, 0, logit_bias=bias, frequency_penalty=30.0)
    assert frequent[:2] == [77, 77] and 77 not in frequent[2:]  # 50 - 60 is less than any other
    (present,), _ = llama.generate([prompt], 6, 0, logit_bias=bias, presence_penalty=80.0)
    assert present[0] == 77 and 77 not in present[1:]


def test_rows_of_one_batch_have_their_own_options(llama):
    """Two streams with other options share each step, and each gets what it gets alone."""
    wishes = [{"temperature": 0.9, "top_k": 5, "seed": 3}, {"temperature": 1.4, "min_p": 0.2, "seed": 4}]
    wishes.append({"temperature": 0, "frequency_penalty": 2.0})
    alone = [llama.generate([[1, 5, 9]], 12, **wish)[0][0] for wish in wishes]
    streams = [llama.stream([[1, 5, 9]], 12, **wish) for wish in wishes]
    found: list[list[int]] = [[], [], []]
    for _ in range(12):
        for ids, stream in zip(found, streams, strict=True):
            ids += [id for piece in [next(stream, None)] if piece for id in piece.ids]
    for ids, stream in zip(found, streams, strict=True):
        ids += [id for piece in stream for id in piece.ids]
    assert found == alone


def test_a_temperature_below_float32_is_greedy(llama):
    """1e-46 is 0 in float32: dividing by it gave NaN, and then token 0 for ever."""
    expected = llama.generate([[1, 5, 9]], 6, 0)
    assert llama.generate([[1, 5, 9]], 6, 1e-46, seed=1) == expected


def test_top_logprobs_are_those_of_the_same_numbers(llama):
    (answer,) = llama.text_completion(["Anna took"], 0, max_gen_len=5, logprobs=True, top_logprobs=3)
    assert len(answer["top_logprobs"]) == len(answer["tokens"]) == 5
    for token, logprob, top in zip(answer["tokens"], answer["logprobs"], answer["top_logprobs"], strict=True):
        assert len(top) == 3 and top[0] == (token, pytest.approx(logprob, abs=1e-6))
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)


def test_top_logprobs_of_an_echoed_prompt(llama):
    (answer,) = llama.text_completion(["Anna took"], 0, max_gen_len=2, echo=True, top_logprobs=2)
    assert answer["top_logprobs"][0] == [] and all(len(top) == 2 for top in answer["top_logprobs"][1:])
    assert len(answer["top_logprobs"]) == len(answer["tokens"]) and "logprobs" not in answer


# --- chat --------------------------------------------------------------------------------------------------------

DIALOGS = [[{"role": "user", "content": "Where is the red cup?"}], [{"role": "user", "content": "[INST] no"}]]


def test_streamed_chat_is_chat(llama):
    expected = llama.chat_completion(DIALOGS, 0.7, max_gen_len=9, seed=3, n=2)
    joined = ["", "", "", ""]
    reasons = [None] * 4
    for piece in llama.stream_chat(DIALOGS, 9, 0.7, seed=3, n=2):
        joined[piece.row] += piece.text
        reasons[piece.row] = piece.finish_reason
    assert joined == [answer["generation"]["content"] for answer in expected]
    assert reasons == [answer["finish_reason"] for answer in expected]
    assert reasons[2:] == ["refused", "refused"]


def test_an_answer_is_continued(llama):
    begun = [*DIALOGS[0], {"role": "assistant", "content": "It is in"}]
    (answer,) = llama.chat_completion([begun], 0, max_gen_len=6, continue_final=True)
    from llama.prompts import encode_dialog

    prompt = encode_dialog(llama.tokenizer, begun, continue_final=True)
    (ids,), _ = llama.generate([prompt], 6, 0)
    assert answer["generation"] == {"role": "assistant", "content": llama.tokenizer.decode(prompt + ids)[
        len(llama.tokenizer.decode(prompt)) :]}  # fmt: skip
    pieces = list(llama.stream_chat([begun], 6, 0, continue_final=True))
    assert "".join(piece.text for piece in pieces) == answer["generation"]["content"]


def test_a_dialog_that_ends_with_an_answer_is_refused_unless_it_is_to_be_continued(llama):
    begun = [*DIALOGS[0], {"role": "assistant", "content": "It is in"}]
    with pytest.raises(ValueError, match=r"Dialog 0, message 1: .*'user'"):
        llama.chat_completion([begun])
    with pytest.raises(ValueError, match=r"Dialog 0, message 0: .*'assistant'"):
        llama.chat_completion([DIALOGS[0]], continue_final=True)


def test_a_bare_dialog_in_place_of_a_list(llama):
    with pytest.raises(ValueError, match=r"write \[dialog\]"):
        llama.chat_completion(DIALOGS[0])


# --- what a call leaves alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_default_dtype_is_used_by_none_and_kept(llama, dtype):
    """A call that sets the default to float32, or leaves it so, is noticed only where it was not float32 before."""
    expected = llama.generate([[1, 5, 9]], 6, 0.9, seed=1, logprobs=True)
    torch.set_default_dtype(dtype)
    try:
        ids, logprobs = llama.generate([[1, 5, 9]], 6, 0.9, seed=1, logprobs=True)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert ids == expected[0] and logprobs[0] == pytest.approx(expected[1][0], abs=1e-5)


def test_calls_inside_and_outside_inference_mode_agree(llama):
    with torch.inference_mode():
        inside = llama.generate([[1, 5, 9, 11]], 6, 0)
    assert llama.generate([[1, 5, 9, 11]], 6, 0) == inside
