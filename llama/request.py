"""What a call asks for and what it gives back: the arguments with their checks, pieces and rows, result types.

Knows neither the model nor the tokenizer: sizes arrive as plain numbers.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypedDict

from llama.prompts import Message

FinishReason = Literal["eos", "stop", "length", "refused"]


class Score(TypedDict, total=False):
    """`tokens` (each id decoded alone) and `logprobs` are of equal length."""

    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(Score, total=False):
    """With `tokens` and `logprobs` if `logprobs=True`; `full_text` is a filled hole with its prefix and suffix."""

    generation: str
    full_text: str
    finish_reason: FinishReason


class ChatPrediction(Score, total=False):
    """With `tokens` and `logprobs` likewise; `refusal` says which message of a refused dialog holds which tag."""

    generation: Message
    finish_reason: FinishReason
    refusal: str


class Options(TypedDict, total=False):
    """Keyword arguments that all calls pass on to `stream`."""

    top_k: int | None
    stop: Sequence[str | int] | None
    seed: int | None
    n: int


class Piece(NamedTuple):
    """What became certain of one row: some ids, some whole characters; the row's last piece says why it ended."""

    row: int
    ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: FinishReason | None


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass
class Request:
    """The arguments of one call, the same on every rank once the first rank's have been broadcast."""

    prompts: Sequence[Sequence[int]]
    max_gen_len: int | None
    temperature: float
    top_p: float
    logprobs: bool
    echo: bool
    top_k: int | None = None
    stop: Sequence[str | int] | None = None
    seed: int | None = None
    n: int = 1  # completions of each prompt
    rows: Sequence[int] | None = dataclasses.field(default=None, init=False)  # indices of the prompts; None: 0, 1, ...
    infilling: bool = dataclasses.field(default=False, init=False)  # the output goes on inside a text, until EOT
    streamed: bool = dataclasses.field(default=False, init=False)  # each token is wanted at once

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """Raise `ValueError` for the first argument that is out of its range, or prompt that does not fit."""
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number.")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1 (1 keeps every token).")
        for name, least in (("top_k", 1), ("max_gen_len", 0), ("n", 1)):
            value, or_none = getattr(self, name), ", or None" * (name != "n")
            if not ((value is None and or_none) or (is_integer(value) and value >= least)):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}{or_none}.")
        if self.seed is not None and not is_integer(self.seed):
            raise ValueError(f"seed is {self.seed!r}; it must be an integer, or None to continue the sequence.")
        if isinstance(self.stop, str) or not all((isinstance(s, str) and s) or is_integer(s) for s in self.stop or ()):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of non-empty strings and token ids.")
        for row, prompt in zip(self.rows, self.prompts, strict=True):
            if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
                raise ValueError(f"Prompt {row} is {prompt!r}; it must be a list of token ids that begins with BOS.")
            wrong = next((id for id in prompt if not (is_integer(id) and 0 <= id < vocab_size)), None)
            if wrong is not None:
                raise ValueError(f"Prompt {row} holds {wrong!r}; token ids are integers from 0 to {vocab_size - 1}.")
            if len(prompt) > max_seq_len:
                advice = "shorten it, or build with a larger max_seq_len"
                raise ValueError(f"Prompt {row} has {len(prompt)} tokens, over max_seq_len {max_seq_len}; {advice}.")

    def repeat(self) -> None:
        """Put each prompt there `n` times: completion j of row i is row i n + j."""
        self.prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        self.rows = [row * self.n + j for row in self.rows for j in range(self.n)]


@dataclasses.dataclass
class Row:
    """A row's pieces put together."""

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None


def drain(pieces: Iterable[Piece], count: int) -> list[Row]:
    """Run a stream of `count` rows to its end."""
    rows = [Row() for _ in range(count)]
    for index, ids, text, logprobs, finish_reason in pieces:
        row = rows[index]
        row.ids += ids
        row.text += text
        row.logprobs += logprobs or []
        row.finish_reason = finish_reason
    return rows
