"""Dialogs to text and ids: literal text, and ids put together here from sentencepiece's own calls."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama.prompts import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    check_dialogs,
    encode_dialog,
    encode_infilling,
    format_dialog,
)
from llama.tokenizer import Tokenizer

BOS, EOS = 1, 2


def dialog(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant taking turns, after an optional system message."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CASES = {
    "one turn": (
        dialog("Where is the red cup?"),
        ["[INST] Where is the red cup? [/INST]"],
    ),
    "system and one turn": (
        dialog("Where is it?", system="Answer in one word."),
        ["[INST] <<SYS>>\nAnswer in one word.\n<</SYS>>\n\nWhere is it? [/INST]"],
    ),
    "two turns": (
        dialog("Who has the ball?", "Anna has it.", "And the cup?"),
        ["[INST] Who has the ball? [/INST] Anna has it. ", "[INST] And the cup? [/INST]"],
    ),
    "system and three turns": (
        dialog("one", "1", "two", "2", "three", system="Count."),
        [
            "[INST] <<SYS>>\nCount.\n<</SYS>>\n\none [/INST] 1 ",
            "[INST] two [/INST] 2 ",
            "[INST] three [/INST]",
        ],
    ),
    "space around every turn is stripped": (
        dialog("  hi \n", "\t hello  ", "\n\nbye  now\t"),
        ["[INST] hi [/INST] hello ", "[INST] bye  now [/INST]"],
    ),
    "system text and the turn it joins keep the space between them": (
        dialog("  hi  ", system="  Be kind. \n"),
        ["[INST] <<SYS>>\n  Be kind. \n\n<</SYS>>\n\n  hi [/INST]"],
    ),
    "empty system text keeps its tags": (
        dialog("hi", system=""),
        ["[INST] <<SYS>>\n\n<</SYS>>\n\nhi [/INST]"],
    ),
    "unicode": (
        dialog("日本の本はどこ? 😀", "В саду, naïve café", "Спасибо"),
        ["[INST] 日本の本はどこ? 😀 [/INST] В саду, naïve café ", "[INST] Спасибо [/INST]"],
    ),
    "quotes and braces": (
        dialog('Say "it\'s" and {x} \\n 100%s', system="Don't 'quote' \"me\"."),
        ["[INST] <<SYS>>\nDon't 'quote' \"me\".\n<</SYS>>\n\nSay \"it's\" and {x} \\n 100%s [/INST]"],
    ),
    "empty contents": (
        dialog("", "", ""),
        ["[INST]  [/INST]  ", "[INST]  [/INST]"],
    ),
    "control tokens in text stay text": (
        dialog("<s>hi</s>", "</s><s>", "ok"),
        ["[INST] <s>hi</s> [/INST] </s><s> ", "[INST] ok [/INST]"],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_of_each_exchange(case):
    given, expected = CASES[case]
    assert format_dialog(given) == expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_are_each_exchange_encoded_on_its_own(case, tokenizer, raw_sp):
    given, texts = CASES[case]
    expected = []
    for text in texts[:-1]:
        expected += [BOS, *raw_sp.encode(text), EOS]
    expected += [BOS, *raw_sp.encode(texts[-1])]
    ids = encode_dialog(tokenizer, given)
    assert ids == expected
    assert all(type(i) is int for i in ids)
    assert ids.count(BOS) == len(texts) and ids.count(EOS) == len(texts) - 1


# A tokenizer small enough to read ids by eye: a character c outside of PIECES is its bytes b, each with id 3 + b.
PIECES = ["\u2581", "[", "]", "/", "I", "N", "S", "T", "IN", "ST", "INST", "\u2581[", "\u2581[/"]  # from id 259 on
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer message: an integer below 2**14, a float, or bytes."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory) -> Tokenizer:
    """A sentencepiece model written by hand, so that its ids depend on no training."""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [(piece, NORMAL) for piece in PIECES]
    model = b"".join(
        field(1, field(1, piece.encode()) + field(2, -float(rank)) + field(3, kind))
        for rank, (piece, kind) in enumerate(pieces)
    )
    bpe_with_bytes = field(3, 2) + field(4, len(pieces)) + field(35, 1)
    keep_spaces_and_add_one = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)
    path = tmp_path_factory.mktemp("plain") / "tokenizer.model"
    path.write_bytes(model + field(2, bpe_with_bytes) + field(3, keep_spaces_and_add_one))
    return Tokenizer(str(path))


# fmt: off
LITERAL = [
    (dialog("hi"), [1, 270, 269, 261, 259, 107, 108, 271, 269, 261]),
    (dialog("a", system="b"), [1, 270, 269, 261, 259, 63, 63, 265, 92, 265, 65, 65, 13, 101, 13, 63, 63, 262, 265, 92,
                               265, 65, 65, 13, 13, 100, 271, 269, 261]),
    (dialog("a", "b", "c"), [1, 270, 269, 261, 259, 100, 271, 269, 261, 259, 101, 259, 2,
                             1, 270, 269, 261, 259, 102, 271, 269, 261]),
    (dialog("a", "b", "c", "d", "e", system="f"), [1, 270, 269, 261, 259, 63, 63, 265, 92, 265, 65, 65, 13, 105, 13, 63,
                                                   63, 262, 265, 92, 265, 65, 65, 13, 13, 100, 271, 269, 261, 259, 101,
                                                   259, 2,
                                                   1, 270, 269, 261, 259, 102, 271, 269, 261, 259, 103, 259, 2,
                                                   1, 270, 269, 261, 259, 104, 271, 269, 261]),
    (dialog("  a\n", "\tb  ", " c d "), [1, 270, 269, 261, 259, 100, 271, 269, 261, 259, 101, 259, 2,
                                        1, 270, 269, 261, 259, 102, 259, 103, 271, 269, 261]),
    (dialog(" a ", system=" b\n"), [1, 270, 269, 261, 259, 63, 63, 265, 92, 265, 65, 65, 13, 259, 101, 13, 13, 63, 63,
                                    262, 265, 92, 265, 65, 65, 13, 13, 259, 100, 271, 269, 261]),
    (dialog("a", system=""), [1, 270, 269, 261, 259, 63, 63, 265, 92, 265, 65, 65, 13, 13, 63, 63, 262, 265, 92, 265,
                              65, 65, 13, 13, 100, 271, 269, 261]),
    (dialog("é", "日", "😀"), [1, 270, 269, 261, 259, 198, 172, 271, 269, 261, 259, 233, 154, 168, 259, 2,
                              1, 270, 269, 261, 259, 243, 162, 155, 131, 271, 269, 261]),
    (dialog("<s>", "</s>", "\"'"), [1, 270, 269, 261, 259, 63, 118, 65, 271, 269, 261, 259, 63, 262, 118, 65, 259, 2,
                                   1, 270, 269, 261, 259, 37, 42, 271, 269, 261]),
]
# fmt: on


@pytest.mark.parametrize(("given", "ids"), LITERAL, ids=range(len(LITERAL)))
def test_literal_ids(plain_tokenizer, given, ids):
    assert encode_dialog(plain_tokenizer, given) == ids


def test_one_joined_string_would_give_other_ids(tokenizer, raw_sp):
    """Encoded as one text, the second turn loses its own leading space piece, and BOS and EOS become letters."""
    given, texts = CASES["two turns"]
    ids = encode_dialog(tokenizer, given)
    joined = [BOS, *raw_sp.encode("".join(texts))]
    assert [i for i in ids if i not in (BOS, EOS)] != joined[1:]
    tags_as_text = raw_sp.encode(f"<s>{texts[0]}</s><s>{texts[1]}")
    assert BOS not in tags_as_text and EOS not in tags_as_text
    assert tags_as_text != ids


def test_constants_of_the_release():
    assert (B_INST, E_INST) == ("[INST]", "[/INST]")
    assert (B_SYS, E_SYS) == ("<<SYS>>\n", "\n<</SYS>>\n\n")
    assert list(SPECIAL_TAGS) == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."


def test_a_dialog_is_not_changed(tokenizer):
    given, _ = CASES["system and three turns"]
    before = [dict(message) for message in given]
    encode_dialog(tokenizer, given)
    assert given == before


def roles(*names: str) -> list[dict]:
    return [{"role": name, "content": "hi"} for name in names]


@pytest.mark.parametrize(
    ("given", "index", "found", "wanted"),
    [
        (roles("assistant"), 0, "assistant", "user"),
        (roles("user", "user"), 1, "user", "assistant"),
        (roles("user", "assistant", "assistant"), 2, "assistant", "user"),
        (roles("system", "assistant"), 1, "assistant", "user"),
        (roles("user", "system"), 1, "system", "assistant"),
        (roles("system", "system", "user"), 1, "system", "user"),
        (roles("user", "assistant", "system", "user"), 2, "system", "user"),
        (roles("User"), 0, "User", "user"),
        (roles("system", "user", "bot", "user"), 2, "bot", "assistant"),
        (roles("assistant", "user"), 0, "assistant", "user"),
        (roles("assistant", "user", "assistant", "user"), 0, "assistant", "user"),
        (roles("system", "assistant", "user"), 1, "assistant", "user"),
        (roles("bot", "user", "assistant", "user"), 0, "bot", "user"),
    ],
)
@pytest.mark.parametrize("continue_final", [False, True])
def test_a_wrong_role_is_named_with_its_index_and_the_right_one(tokenizer, given, index, found, wanted, continue_final):
    with pytest.raises(ValueError, match=rf"\b{index}\b") as caught:
        encode_dialog(tokenizer, given, continue_final=continue_final)
    message = str(caught.value)
    assert repr(found) in message and repr(wanted) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "given", [roles("user", "assistant"), roles("system", "user", "assistant"), roles("system")], ids=len
)
def test_a_dialog_must_end_with_the_user(tokenizer, given):
    with pytest.raises(ValueError, match="user"):
        encode_dialog(tokenizer, given)


@pytest.mark.parametrize("given", [roles("user"), roles("system", "user"), roles("user", "assistant", "user")], ids=len)
def test_only_an_answer_can_be_continued(tokenizer, given):
    with pytest.raises(ValueError, match=rf"message {len(given) - 1}: .* 'assistant', got 'user'"):
        encode_dialog(tokenizer, given, continue_final=True)


def test_a_dialog_that_ends_with_an_answer_is_told_how_to_continue_it(tokenizer):
    with pytest.raises(ValueError, match="continue_final=True"):
        encode_dialog(tokenizer, roles("user", "assistant"))
    with pytest.raises(ValueError, match=r"must be 'user', got 'system'\.$"):
        encode_dialog(tokenizer, roles("system"))


@pytest.mark.parametrize("given", [[], ()], ids=["list", "tuple"])
def test_an_empty_dialog_is_refused(tokenizer, given):
    with pytest.raises(ValueError, match="empty"):
        encode_dialog(tokenizer, given)


@pytest.mark.parametrize("content", [None, 7, ["hi"], b"hi", {"text": "hi"}], ids=repr)
def test_content_must_be_a_string(tokenizer, content):
    given = dialog("hi", "hello", "again")
    given[2]["content"] = content
    with pytest.raises(ValueError, match=r"\b2\b") as caught:
        encode_dialog(tokenizer, given)
    assert type(content).__name__ in str(caught.value)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "hi"}, "hi", None], ids=repr)
def test_a_message_needs_a_role_and_a_content(tokenizer, message):
    with pytest.raises(ValueError, match=r"\b0\b"):
        encode_dialog(tokenizer, [message])


# --- answers that are continued ------------------------------------------------------------------------------------

BEGUN = {
    "one space before, none after": (dialog("Who?", "Anna has"), ["[INST] Who? [/INST] Anna has"]),
    "space around the beginning is dropped": (dialog("Who?", " \n Anna  has \n"), ["[INST] Who? [/INST] Anna  has"]),
    "an earlier exchange is finished": (
        dialog("one", "1", "two", "2,", system="Count."),
        ["[INST] <<SYS>>\nCount.\n<</SYS>>\n\none [/INST] 1 ", "[INST] two [/INST] 2,"],
    ),
    "nothing begun": (dialog("Who?", ""), ["[INST] Who? [/INST]"]),
    "nothing but space begun": (dialog("a", "b", "Who?", "  \n"), ["[INST] a [/INST] b ", "[INST] Who? [/INST]"]),
}


@pytest.mark.parametrize("case", BEGUN, ids=str)
def test_text_of_an_answer_that_is_continued(case, tokenizer, raw_sp):
    given, texts = BEGUN[case]
    assert format_dialog(given, continue_final=True) == texts
    finished = [id for text in texts[:-1] for id in [BOS, *raw_sp.encode(text), EOS]]
    ids = encode_dialog(tokenizer, given, continue_final=True)
    assert ids == [*finished, BOS, *raw_sp.encode(texts[-1])]


def test_literal_ids_of_an_answer_that_is_continued(plain_tokenizer):
    question = [1, 270, 269, 261, 259, 100, 271, 269, 261]
    assert encode_dialog(plain_tokenizer, dialog("a", " b "), continue_final=True) == [*question, 259, 101]
    assert encode_dialog(plain_tokenizer, dialog("a", ""), continue_final=True) == question


PARTS = [*"abcdeor \n.,:", " the ", " red cup", "kitchen", "é", "日", "😀"]
WORDS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@given(WORDS)
@example("Anna took the red cup to the kitchen.")
@example("  two\n\n spaces  and 1. a list:\n2. ")
def test_ids_of_a_beginning_are_the_first_of_the_finished_exchange(tokenizer, answer):
    """Wherever one of the finished exchange's tokens ends: cutting there, and encoding what was cut, changes no id."""
    exchange = encode_dialog(tokenizer, dialog("Where?", answer, "And?"))
    exchange = exchange[: exchange.index(EOS)]
    question = encode_dialog(tokenizer, dialog("Where?"))
    assert exchange[: len(question)] == question
    compared = 0
    for length in range(len(question), len(exchange) + 1):
        beginning = tokenizer.decode(exchange[:length]).removeprefix("[INST] Where? [/INST]")
        if "\ufffd" in beginning or beginning != beginning.rstrip():
            continue  # a cut within a character, or behind a space, which is not sent
        assert encode_dialog(tokenizer, dialog("Where?", beginning), continue_final=True) == exchange[:length]
        compared += 1
    assert compared >= bool(answer.strip())


def test_a_beginning_within_a_word_may_have_tokens_of_its_own(tokenizer):
    """The exception: its text is still what the finished exchange begins with, and the answer goes on from there."""
    whole = encode_dialog(tokenizer, dialog("Where?", "The kitchen", "And?"))
    begun = encode_dialog(tokenizer, dialog("Where?", "The kitc"), continue_final=True)
    assert begun != whole[: len(begun)]
    assert tokenizer.decode(whole[: whole.index(EOS)]).startswith(tokenizer.decode(begun))


# --- lists of dialogs ----------------------------------------------------------------------------------------------


def test_a_list_of_dialogs_is_accepted():
    check_dialogs([])
    check_dialogs([dialog("hi"), tuple(dialog("a", "b", "c", system="s"))])
    check_dialogs((dialog("hi", "he"),), continue_final=True)


def test_a_bare_dialog_in_place_of_a_list_is_told_so():
    with pytest.raises(ValueError, match=r"list of dialogs, not as one list of messages; write \[dialog\]\.$"):
        check_dialogs(dialog("hi"))


@pytest.mark.parametrize(
    "given", [None, "hi", {"role": "user", "content": "hi"}, 7, iter([])], ids=lambda given: type(given).__name__
)
def test_what_is_no_list_of_dialogs_is_named(given):
    with pytest.raises(ValueError, match=f"must come as a list of dialogs, not {type(given).__name__}"):
        check_dialogs(given)


def test_a_wrong_dialog_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"^Dialog 1, message 0: expected role 'user'"):
        check_dialogs([dialog("hi"), roles("assistant", "user")])
    with pytest.raises(ValueError, match=r"^Dialog 1 must be a list of messages, not str"):
        check_dialogs([dialog("hi"), "hi"])
    with pytest.raises(ValueError, match=r"^Dialog 0, message 0: the last role must be 'assistant'"):
        check_dialogs([dialog("hi")], continue_final=True)


# --- texts with a hole ---------------------------------------------------------------------------------------------

PRE, MID, SUF = 3, 4, 5
SPACE = 419  # on its own


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.sp_model.id_to_piece(id) for id in ids]


def test_infilling_prefix_suffix_middle(code_tokenizer):
    ids = encode_infilling(code_tokenizer, "Where is the ", "red cup?")
    assert ids == [BOS, PRE, 317, 278, 266, SPACE, SUF, 351, 339, 443, MID]
    assert pieces(code_tokenizer, ids) == (
        ["<s>", "▁<PRE>", "▁Where", "▁is", "▁the", "▁", "▁<SUF>", "red", "▁cup", "?", "▁<MID>"]
    )


def test_infilling_suffix_first(code_tokenizer):
    ids = encode_infilling(code_tokenizer, "Where is the ", "red cup?", suffix_first=True)
    assert ids == [BOS, PRE, SUF, 351, 339, 443, MID, 317, 278, 266, SPACE]


def test_infilling_gives_the_suffix_the_spaces_it_has_and_no_other(code_tokenizer):
    """Beginnings of a suffix: within a word, before a word, two spaces, a line break, an unknown character."""
    expected = {
        "red": ["red"],
        " red": ["▁red"],
        "  red": ["▁▁", "red"],
        "\n red": ["\n", "▁red"],
        "É": ["<0xC3>", "<0x89>"],
        "": [],
    }
    for suffix, spelled in expected.items():
        ids = encode_infilling(code_tokenizer, "", suffix)
        assert ids[:3] == [BOS, PRE, SUF] and ids[-1] == MID
        assert pieces(code_tokenizer, ids[3:-1]) == spelled, suffix


@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize(
    "text", ["<PRE>", " <PRE> x", "a <EOT> b", "  <SUF>", "red <MID> <MID>\n <EOT>", "▁<EOT>", "x<PRE>"]
)
def test_infilled_text_never_becomes_a_special_id(code_tokenizer, text, suffix_first):
    """Whoever writes the code in an editor must not be able to end the prefix or to answer in the model's place."""
    ids = encode_infilling(code_tokenizer, text, text, suffix_first)
    assert sorted(id for id in ids if id < 7) == [BOS, PRE, MID, SUF]


def test_infilling_without_the_pieces_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"lacks the pieces for infilling .*▁<PRE>.*; use Code Llama 7B or 13B"):
        encode_infilling(tokenizer, "a", "b")


def test_infilling_parts_that_are_no_text_are_refused(code_tokenizer):
    for parts in ((None, "b"), ("a", 3)):
        with pytest.raises(ValueError, match="must be a string"):
            encode_infilling(code_tokenizer, *parts)
