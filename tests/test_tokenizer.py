"""Text to ids and back, whole and piece by piece, and the files that are not tokenizers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama.tokenizer import IncrementalDecoder, Tokenizer

FIRST_BYTE_ID = 3  # unk, BOS and EOS come before the 256 byte pieces


def incremental(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What the decoder gives for each id, then at the end."""
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.feed(i) for i in ids] + [decoder.flush()]


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE_ID + b for b in data]


# --- whole texts ---------------------------------------------------------------------------------------------------


def test_ids_are_sentencepiece_ids_between_bos_and_eos(tokenizer, raw_sp):
    text = "Anna took the red cup to the kitchen."
    ids = raw_sp.encode(text)
    assert tokenizer.encode(text, bos=False, eos=False) == ids
    assert tokenizer.encode(text, bos=True, eos=False) == [1, *ids]
    assert tokenizer.encode(text, False, True) == [*ids, 2]
    assert tokenizer.encode(text, True, True) == [1, *ids, 2]
    assert tokenizer.encode("", bos=True, eos=False) == [1]


def test_sizes_and_special_ids(tokenizer):
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (480, 1, 2, -1)
    assert tokenizer.sp_model.vocab_size() == 480
    assert all(type(i) is int for i in tokenizer.encode("two shoes", True, True))


def test_decode(tokenizer):
    ids = tokenizer.encode("  two spaces,日本 and 😀", bos=True, eos=True)
    assert tokenizer.decode(ids) == "  two spaces,日本 and 😀"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.decode(tuple(ids)) == tokenizer.decode(ids)


def test_decode_of_one_id_is_its_text(tokenizer, raw_sp):
    for i in (0, 1, 2, FIRST_BYTE_ID + ord("A"), 300, tokenizer.n_words - 1):
        assert tokenizer.decode(i) == tokenizer.decode([i]) == raw_sp.decode([i])


@pytest.mark.parametrize("text", ["<s>", "</s>", "a</s><s>b", "<s> [INST] hi [/INST] </s>", "<unk>", "<0x0A>", "<pad>"])
def test_text_never_gives_control_ids(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "half", "index"),
    [
        ("a smile \ud83d", r"'\ud83d'", 8),  # a cut emoji
        ("\ude00", r"'\ude00'", 0),
        ("日本\udc80 \ud83d", r"'\udc80'", 2),  # a file name that was no UTF-8; the first of several
        ("\ud83d\ude00", r"'\ud83d'", 0),  # both halves, which Python does not join
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_half_a_character_is_named_with_its_place(tokenizer, text, half, index, inner):
    """sentencepiece answered with several lines about incompatible function arguments."""
    with pytest.raises(ValueError) as caught:
        tokenizer.encode(text, True, False, inner=inner)
    message = str(caught.value)
    assert half in message and f"index {index}," in message and "half of a character" in message
    assert "\n" not in message and message.isascii()


@pytest.mark.parametrize("text", [None, 7, b"text", ["text"]], ids=repr)
def test_text_is_a_string(tokenizer, text):
    with pytest.raises(ValueError, match=f"must be a string, not {type(text).__name__}"):
        tokenizer.encode(text, True, False)


@given(st.text())
@example("<s>")
@example("x</s>")
@example("\ufffd")
@example(" leading and trailing ")
@example("\x00\n\t\r")
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids[0] == 1 and ids[-1] == 2
    assert not {0, 1, 2} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")  # sentencepiece's own sign for a space


# --- piece by piece ------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.text())
@example("\ufffd")
@example("\ufffd\ufffd a")
@example("  a  b ")
@example("👩‍👩‍👧‍👦 日本 Привет")
def test_incremental_equals_one_shot_for_any_text(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    pieces = incremental(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""  # valid text leaves nothing incomplete


ID = st.one_of(
    st.integers(0, 479),
    st.integers(0, 2),
    st.integers(FIRST_BYTE_ID, FIRST_BYTE_ID + 255),
    st.sampled_from(byte_ids("日é😀\ufffd ".encode())),
    st.sampled_from([287, 419, 264, 270]),  # pieces that are or begin with spaces
)


@settings(max_examples=600)
@given(st.lists(ID, max_size=30))
@example(byte_ids(b"\xe6\x97"))
@example(byte_ids(b"\xf0\x9f\x98A\x80"))
@example(byte_ids(b"\xef\xbf\xbd\xef\xbf"))
@example([1, 419, 1, 419, 264])
@example([0, 419, 0])
@example([FIRST_BYTE_ID + 32, 419, 264])
@example([*byte_ids(b"\xc3"), 1, *byte_ids(b"\xa9")])
@example([*byte_ids(b"\xc3"), 0, *byte_ids(b"\xa9")])
def test_incremental_equals_one_shot_for_any_ids(tokenizer, ids):
    assert "".join(incremental(tokenizer, ids)) == tokenizer.decode(ids)


def test_incomplete_characters_are_held_back(tokenizer):
    assert incremental(tokenizer, byte_ids("😀é".encode())) == ["", "", "", "😀", "", "é", ""]


def test_what_never_becomes_a_character_comes_out_at_the_end(tokenizer):
    pieces = incremental(tokenizer, [*tokenizer.encode("two", False, False), *byte_ids(b"\xe6\x97")])
    assert "".join(pieces[:-1]) == "two"
    assert set(pieces[-1]) == {"\ufffd"}


def test_an_invalid_byte_does_not_hold_back_what_follows(tokenizer):
    pieces = incremental(tokenizer, [*byte_ids(b"\xff"), *tokenizer.encode("cup cup", False, False)])
    assert "cup" in "".join(pieces[:-1])


def test_only_the_first_space_of_a_text_is_dropped(tokenizer):
    """Decoding ids one at a time loses the spaces between words; the decoder keeps them."""
    ids = tokenizer.encode("the red cup", bos=False, eos=False)
    assert "".join(tokenizer.decode(i) for i in ids) == "theredcup"
    assert "".join(incremental(tokenizer, ids)) == "the red cup"


def test_complete_text_is_never_late(tokenizer):
    """After each id, all characters that are complete are out: the stream is as early as it can be."""
    ids = tokenizer.encode('Anna said "日本 😀" in the kitchen', bos=False, eos=False)
    so_far = ""
    for n, piece in enumerate(incremental(tokenizer, ids)[:-1], start=1):
        so_far += piece
        assert so_far == tokenizer.decode(ids[:n]).rstrip("\ufffd")


# --- pieces of texts with a hole -----------------------------------------------------------------------------------

PRE, MID, SUF, EOT = 3, 4, 5, 6
SPACE = 419  # on its own


def test_the_pieces_are_found(code_tokenizer, tokenizer):
    found = code_tokenizer.prefix_id, code_tokenizer.middle_id, code_tokenizer.suffix_id, code_tokenizer.eot_id
    assert found == (PRE, MID, SUF, EOT)
    assert (tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id) == (None,) * 4


@given(st.text(st.sampled_from(" \n\tredcup?Where<>PSUFMIDEOT7é😀\ue000▁"), max_size=20))
def test_text_inside_a_text_is_what_follows_a_line_break(raw_sp, tokenizer_path, text):
    """A character that joins with nothing stands for any text before; decoding what follows it gives the text back."""
    tokenizer = Tokenizer(tokenizer_path)
    ids = tokenizer.encode(text, bos=False, eos=False, inner=True)
    before = raw_sp.encode("☃")
    assert ids == raw_sp.encode("☃" + text)[len(before) :]
    decoder = IncrementalDecoder(tokenizer, begun=True)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == text.replace("▁", " ")


SPECIAL_TEXTS = ["<PRE>", " <PRE> x", "a <EOT> b", "  <SUF>", "red <MID> <MID>\n <EOT>", "▁<EOT>", "x<PRE>"]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_text_never_becomes_a_special_id(code_tokenizer, text):
    """Whoever writes the code in an editor must not be able to end the prefix or to answer in the model's place."""
    for ids in (code_tokenizer.encode(text, False, False), code_tokenizer.encode(text, False, False, inner=True)):
        assert not {1, 2, PRE, MID, SUF, EOT} & set(ids)
    plain = text.replace("▁", " ")
    assert code_tokenizer.decode(code_tokenizer.encode(text, False, False)) == plain


def test_a_special_piece_in_text_is_spelled_in_place(code_tokenizer):
    assert code_tokenizer.encode("a <EOT> b", False, False) == [326, SPACE, 432, 76, 463, 441, 433, 283]


# --- files that are not tokenizers ---------------------------------------------------------------------------------

TIKTOKEN = "".join(f"{piece} {rank}\n" for rank, piece in enumerate(["IQ==", "Ig==", "Iw==", "JA==", "IHRoZQ=="]))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>", "HTML"),
        ("<html>\n<body>Access denied</body></html>", "HTML"),
        (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'9e556afd' * 8}\nsize 499723\n",
            "Git LFS",
        ),
        ("", "empty"),
        (TIKTOKEN * 50, "Llama 3"),
    ],
    ids=["html_page", "html_fragment", "lfs_pointer", "empty", "llama3"],
)
def test_wrong_files_are_named_in_one_sentence(tmp_path, content, word):
    path = tmp_path / "tokenizer.model"
    path.write_text(content)
    with pytest.raises(ValueError, match=word) as caught:
        Tokenizer(str(path))
    message = str(caught.value)
    assert "tokenizer.model" in message
    assert "\n" not in message


def test_garbage_is_refused_by_name(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"tokenizer\.model") as caught:
        Tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.model"):
        Tokenizer(str(tmp_path / "absent.model"))


def test_a_folder_is_not_a_tokenizer(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="tokenizer_folder"):
        folder = tmp_path / "tokenizer_folder"
        folder.mkdir()
        Tokenizer(str(folder))


def test_a_path_may_be_a_path(tokenizer_path):
    assert Tokenizer(tokenizer_path).n_words == Tokenizer(str(tokenizer_path)).n_words


@pytest.mark.parametrize("outside", [-1, 480, 10**6])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, outside):
    with pytest.raises(ValueError, match=rf"^Token id {outside} is outside the vocabulary of 480"):
        tokenizer.decode([5, outside])


def test_ids_that_only_the_model_knows_are_unknown_characters(tokenizer):
    """A model may have more ids than its tokenizer; a prompt that is echoed may hold them."""
    decoder = IncrementalDecoder(tokenizer)
    (half, *_) = [id for id in range(tokenizer.n_words) if tokenizer.sp_model.id_to_piece(id) == "<0xF0>"]
    ids = [tokenizer.n_words, *tokenizer.encode("cup", bos=False, eos=False), half, tokenizer.n_words + 5]
    assert "".join(decoder.feed(id) for id in ids) == "\ufffd cup\ufffd\ufffd"
