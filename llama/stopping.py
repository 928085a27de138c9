"""One row's output as it grows: text by character, ids, why it ended, and how much of it can no longer change.

A stop string may span tokens and begin or end inside one. So what might be its beginning is held back until the next
tokens decide. This module knows the tokenizer, but neither the model nor how ids are chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama.tokenizer import IncrementalDecoder, Tokenizer


@dataclass
class Token:
    """A token not given out yet; `end` is where its characters end in the text, None while they are incomplete."""

    id: int
    logprob: float
    end: int | None = None


class Completion:
    """Takes ids one by one and gives out, through `release`, what no later id can take back.

    With stop string "END", the tokens "a", " E", "N", "D!" come out as ids and text "a", nothing, nothing, then the
    end: text " " (it is before the match), reason "stop", and no id, because the second token touches the match.

    With `infilling`, the text goes on inside another, so a space at its beginning counts, and EOT stops it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str | int] = (), infilling: bool = False):
        self.eos_id = tokenizer.eos_id
        self.stop_ids = {int(entry) for entry in stop if not isinstance(entry, str)}
        if infilling:
            self.stop_ids.add(tokenizer.eot_id)
        self.stop_strings = [entry for entry in stop if isinstance(entry, str)]
        self.decoder = IncrementalDecoder(tokenizer, begun=infilling)
        self.text = ""
        self.begin = 0  # where generated text begins: no stop string begins before
        self.shown = 0  # characters given out
        self.pending: list[Token] = []
        self.finish_reason: str | None = None

    def echo(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Put the prompt in front; nothing in it stops anything."""
        for id, logprob in zip(ids, logprobs, strict=True):
            self.append(id, logprob)
        self.begin = len(self.text)

    def add(self, id: int, logprob: float) -> None:
        """Take the next generated id, which may end the row."""
        if id == self.eos_id:
            self.finish("eos")
        elif id in self.stop_ids:
            self.finish("stop")
        else:
            before = len(self.text)
            self.append(id, logprob)
            self.cut_at_match(before)

    def append(self, id: int, logprob: float) -> None:
        """Add the id's text, and note where each token that is now complete ends.

        Bytes that were waiting become one character together, or one U+FFFD each.
        """
        before = len(self.text)
        self.text += self.decoder.feed(id)
        self.pending.append(Token(id, logprob))
        waiting = [token for token in self.pending if token.end is None]
        complete = waiting[: len(waiting) - len(self.decoder.bytes)]
        for count, token in enumerate(complete, 1):
            token.end = min(before + count, len(self.text))
        if not self.decoder.bytes:
            self.pending[-1].end = len(self.text)

    def cut_at_match(self, before: int) -> None:
        """End the row at the first stop string that the characters from `before` on complete."""
        found = (self.text.find(string, max(before - len(string) + 1, self.begin)) for string in self.stop_strings)
        start = min((at for at in found if at >= 0), default=None)
        if start is None:
            return
        self.text = self.text[:start]
        touching = (n for n, token in enumerate(self.pending) if token.end is None or token.end > start)
        del self.pending[next(touching, len(self.pending)) :]
        self.decoder.bytes = b""
        self.finish("stop")

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self.text += self.decoder.flush()
        for token in self.pending:
            token.end = len(self.text) if token.end is None else token.end

    def held(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        if self.finish_reason:
            return 0
        generated = self.text[self.begin :]
        lengths = (
            length
            for string in self.stop_strings
            for length in range(min(len(string) - 1, len(generated)), 0, -1)
            if generated.endswith(string[:length])
        )
        return max(lengths, default=0)

    def release(self) -> tuple[list[int], str, list[float]]:
        """(ids, text, log-probabilities) that became certain since the last call."""
        limit = len(self.text) - self.held()
        text, self.shown = self.text[self.shown : limit], limit
        certain = list(itertools.takewhile(lambda token: token.end is not None and token.end <= limit, self.pending))
        del self.pending[: len(certain)]
        return [token.id for token in certain], text, [token.logprob for token in certain]
