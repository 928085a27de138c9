"""A row by itself: text by character, stops, what is held back, echo, endings."""

import sys

import pytest

from llama.rows import Row, check_prompt
from llama.sampling import Sampling
from llama.tokenizer import Tokenizer


def make(tokenizer: Tokenizer, prompt: list[int], room: int = 40, **options) -> Row:
    return Row(prompt, Sampling(**options).checked(), tokenizer, room=room)


def given(row: Row) -> tuple[list[int], str]:
    """All pieces so far, joined, taken off the row."""
    ids: list[int] = []
    text = ""
    while row.pieces:
        piece = row.pieces.popleft()
        ids += piece.ids
        text += piece.text
    return ids, text


def byte(tokenizer: Tokenizer, value: int) -> int:
    return tokenizer.sp_model.piece_to_id(f"<0x{value:02X}>")


def word(tokenizer: Tokenizer, piece: str) -> int:
    id = tokenizer.sp_model.piece_to_id(piece)
    assert tokenizer.sp_model.id_to_piece(id) == piece
    return id


def test_a_row_ends_itself(tokenizer):
    for ids, options, reason in [
        ([50, 51, 2], {}, "eos"),
        ([50, 51], {"stop": [51]}, "stop"),
        ([50, 51, 52], {"max_gen_len": 3}, "length"),
    ]:
        row = make(tokenizer, [1, 5], **options)
        for id in ids:
            assert not row.ended
            row.add(id, -1.0, [])
        assert row.finish_reason == reason
        assert row.ids == [id for id in ids if id != 2 and id not in row.stop_ids]
        assert row.context == [1, 5, *ids] and row.generated == ids


def test_a_row_without_room_ends_before_it_begins(tokenizer):
    row = make(tokenizer, [1, 5, 6], room=0)
    row.begin()
    assert row.finish_reason == "length" and row.ids == [] and given(row) == ([], "")


def test_pieces_joined_are_what_is_certain(tokenizer):
    row = make(tokenizer, [1], stop=["never"])
    for id in (40, 61, byte(tokenizer, 0xE6), byte(tokenizer, 0x97), byte(tokenizer, 0xA5), 70, 2):
        row.add(id, -0.5, [])
    assert given(row) == (row.ids, row.text) and "日" in row.text
    assert row.logprobs == [-0.5] * 6


def test_text_that_may_begin_a_stop_waits(tokenizer):
    row = make(tokenizer, [1], stop=["ab!"])
    a, b = word(tokenizer, "a"), word(tokenizer, "b")
    row.add(a, 0.0, [])
    assert given(row) == ([], "")
    row.add(a, 0.0, [])
    assert given(row) == ([a], "a")
    row.add(b, 0.0, [])
    assert given(row) == ([], "")
    row.end("length")
    assert given(row) == ([a, b], "ab")


def test_bytes_that_wait_when_a_match_ends_the_row_add_nothing(tokenizer):
    """The stop is the character that stands for a broken byte; the next byte, which waits, must not become one."""
    row = make(tokenizer, [1], stop=["\ufffd"])
    row.add(word(tokenizer, "a"), 0.0, [])
    row.add(byte(tokenizer, 0xE6), 0.0, [])
    row.add(byte(tokenizer, 0xE6), 0.0, [])
    assert row.finish_reason == "stop" and row.text == "a"


def test_the_end_of_an_echoed_prompt_is_not_held_back(tokenizer):
    row = make(tokenizer, [1, word(tokenizer, "a"), word(tokenizer, "b")], echo=True, stop=["bc"])
    row.begin()
    assert given(row)[1] == "ab"
    row.add(word(tokenizer, "c"), 0.0, [])
    assert not row.ended and row.text == "abc"  # no stop begins in the prompt


def test_echo_is_linear_in_the_prompt(tokenizer):
    """Each id of the prompt once looked through all before it."""
    lines = []
    for length in (200, 400):
        row = make(tokenizer, [1] + [33 + n % 400 for n in range(length)], echo=True)
        count = [0]

        def trace(frame, event, argument, count=count):
            count[0] += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        row.begin()
        sys.settrace(before)
        lines.append(count[0])
    assert lines[1] < 2.3 * lines[0]


def test_alternatives_come_with_their_tokens(tokenizer):
    row = make(tokenizer, [1], top_logprobs=1, stop=["ab!"])
    for n, piece in enumerate(("a", "b", "a")):
        row.add(word(tokenizer, piece), -1.0 * n, [(n, -1.0 * n)])
    row.end("length")
    assert row.top_logprobs == [[(0, 0.0)], [(1, -1.0)], [(2, -2.0)]] and row.logprobs == [0.0, -1.0, -2.0]


def test_a_refused_row_is_one_piece(tokenizer):
    row = make(tokenizer, [])
    row.refuse("no")
    (piece,) = row.pieces
    assert (piece.ids, piece.text, piece.finish_reason) == ([], "no", "refused") and row.ended


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "must be a list of token ids that begins with BOS"),
        ("text", "must be a list of token ids"),
        (7, r"must be a list of token ids that begins with BOS; of one prompt, write \[ids\]"),
        ([1, -1], "holds -1; token ids are integers from 0 to 9"),
        ([1, 10], "holds 10; token ids are integers from 0 to 9"),
        ([1, 2.0], "holds 2.0; token ids are"),
        ([1, None], "holds None; token ids are"),
        ([1] * 5, "has 5 tokens, over max_seq_len 4; shorten it"),
    ],
)
def test_a_prompt_that_cannot_run_is_named(prompt, words):
    with pytest.raises(ValueError, match=rf"^Prompt 3 .*{words}"):
        check_prompt(3, prompt, vocab_size=10, max_seq_len=4)
