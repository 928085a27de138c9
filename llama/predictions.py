"""What calls return: for each row a dictionary, in which tokens are texts."""

from __future__ import annotations

from typing import TypedDict

from llama.prompts import Message
from llama.rows import FinishReason, Row
from llama.tokenizer import Tokenizer


class Score(TypedDict, total=False):
    """`tokens` (each id decoded alone) and `logprobs` are of equal length.

    `top_logprobs` has for each token the likeliest ones in its place, with their log-probabilities.
    """

    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]


class CompletionPrediction(Score, total=False):
    """One completion, with those entries of `Score` that were asked for.

    `full_text`, of `text_infilling` alone, is the prefix, the generation and the suffix.
    """

    generation: str
    full_text: str
    finish_reason: FinishReason


class ChatPrediction(Score, total=False):
    """One answer, with those entries of `Score` that were asked for.

    `refusal`, of a refused dialog alone, says which message holds which tag.
    """

    generation: Message
    finish_reason: FinishReason
    refusal: str


def prediction(tokenizer: Tokenizer, row: Row, generation: str | Message) -> dict:
    """A completion, with the row's score where that was asked for."""
    return {"generation": generation, "finish_reason": row.finish_reason} | score(tokenizer, row)


def score(tokenizer: Tokenizer, row: Row) -> Score:
    """The row's tokens, each decoded alone, with what was asked for about them; nothing if nothing was."""
    found: Score = {}
    if row.options.logprobs or row.options.top_logprobs:
        found["tokens"] = [text_of(tokenizer, id) for id in row.ids]
    if row.options.logprobs:
        found["logprobs"] = row.logprobs
    if row.options.top_logprobs:
        found["top_logprobs"] = []
        for likeliest in row.top_logprobs:
            decoded = [(text_of(tokenizer, id), logprob) for id, logprob in likeliest]
            found["top_logprobs"].append(decoded)
    return found


def text_of(tokenizer: Tokenizer, id: int) -> str:
    """An id decoded alone; U+FFFD for one in a prompt that only the model knows."""
    return tokenizer.decode(id) if id < tokenizer.n_words else "\ufffd"
