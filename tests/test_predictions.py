"""What calls return: just the keys that were asked for."""

import pytest

from llama.predictions import prediction, score
from llama.rows import Row
from llama.sampling import Sampling


@pytest.fixture
def row(tokenizer):
    def make(**options) -> Row:
        row = Row([1], Sampling(**options), tokenizer, room=9)
        row.add(40, -0.25, [(40, -0.25), (41, -2.0)])
        row.add(2, -0.5, [])
        return row

    return make


def test_without_wishes_there_is_the_text_and_its_end(tokenizer, row):
    assert prediction(tokenizer, row(), "text") == {"generation": "text", "finish_reason": "eos"}


def test_log_probabilities_come_with_tokens(tokenizer, row):
    expected = {"tokens": [tokenizer.decode(40)], "logprobs": [-0.25]}
    assert score(tokenizer, row(logprobs=True)) == expected


def test_alternatives_are_decoded(tokenizer, row):
    likeliest = [[(tokenizer.decode(40), -0.25), (tokenizer.decode(41), -2.0)]]
    assert score(tokenizer, row(top_logprobs=2)) == {"tokens": [tokenizer.decode(40)], "top_logprobs": likeliest}
