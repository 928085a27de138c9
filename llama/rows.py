"""`Row`: one prompt and what follows it, why it ended, and how much of it can no longer change.

A stop string may span tokens and begin or end inside one. So text that might be its beginning is held back until the
next tokens decide. This module knows the tokenizer, but neither the model nor how ids are chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llama.sampling import Sampling, is_integer
from llama.tokenizer import IncrementalDecoder, Tokenizer

FinishReason = Literal["eos", "stop", "length", "refused", "cancelled"]
# The likeliest ids of one position, with their log-probabilities.
Alternatives = list[tuple[int, float]]


class Piece(NamedTuple):
    """What became certain of one row: some ids, some whole characters; the row's last piece says why it ended."""

    row: int
    ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: FinishReason | None


@dataclass
class Token:
    """A token that is not certain yet; `end` is where its characters end in the row's text, None if incomplete."""

    id: int
    logprob: float
    top: Alternatives
    end: int | None = None


@dataclass
class Scores:
    """What the model itself said of the prompt's tokens: nothing of the first, so its log-probability is 0."""

    logprobs: list[float] = field(default_factory=lambda: [0.0])
    top: list[Alternatives] = field(default_factory=lambda: [[]])


def check_prompt(index: int, prompt: Sequence[int], vocab_size: int, max_seq_len: int) -> None:
    """Raise `ValueError` unless a prompt is a list of ids that the model knows, and fits."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        allowed = "a list of token ids that begins with BOS"
        advice = "; of one prompt, write [ids]" if is_integer(prompt) else ""
        raise ValueError(f"Prompt {index} is {prompt!r}; it must be {allowed}{advice}.")

    for id in prompt:
        if not is_integer(id) or not 0 <= id < vocab_size:
            allowed = f"integers from 0 to {vocab_size - 1}"
            raise ValueError(f"Prompt {index} holds {id!r}; token ids are {allowed}.")

    if len(prompt) > max_seq_len:
        tokens = f"{len(prompt)} tokens, over max_seq_len {max_seq_len}"
        advice = "shorten it, or build with a larger max_seq_len"
        raise ValueError(f"Prompt {index} has {tokens}; {advice}.")


class Row:
    """Takes ids one by one, ends itself, and says what no later id can take back.

    `context` is the prompt with all ids that were chosen since. `ids`, `text`, `logprobs` and `top_logprobs` are what
    is certain of the output so far; `pieces` are the same, cut as it became certain, for whoever takes them off.

    With stop string "END", the tokens "a", " E", "N", "D!" come out as ids and text "a", nothing, nothing, then the
    end: text " " (it is before the match), reason "stop", and no id, because the second token touches the match.

    `index` is the row's place in its call. `room` is how many tokens fit behind the prompt, and `uniforms` has a
    number for each that may be drawn. Where the output goes on inside a text, so that a space at its beginning counts,
    `decoder.begun` is set.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: Sampling,
        tokenizer: Tokenizer,
        *,
        index: int = 0,
        room: int,
        uniforms: Sequence[float] = (),
    ):
        self.prompt = [int(id) for id in prompt]  # they may be numpy's
        self.context = list(self.prompt)
        self.options = options
        self.index = index
        self.uniforms = uniforms
        self.budget = room if options.max_gen_len is None else min(room, options.max_gen_len)

        # What is certain.
        self.ids: list[int] = []
        self.text = ""
        self.logprobs: list[float] = []
        self.top_logprobs: list[Alternatives] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.pieces: deque[Piece] = deque()
        self.scores = Scores()

        # What is not certain yet: the text after `text`, its tokens, and those of them whose character is incomplete.
        self.tail = ""
        self.held: list[Token] = []
        self.incomplete: list[Token] = []
        self.decoder = IncrementalDecoder(tokenizer)

        # What ends the row.
        stop = options.stop or ()
        self.eos_id = tokenizer.eos_id
        self.stop_strings = [entry for entry in stop if isinstance(entry, str)]
        self.stop_ids = {int(entry) for entry in stop if not isinstance(entry, str)}

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def generated(self) -> list[int]:
        """The ids that were chosen so far."""
        return self.context[len(self.prompt) :]

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's own tokens are wanted."""
        return self.options.echo and bool(self.options.logprobs or self.options.top_logprobs)

    def next_uniform(self) -> float:
        """The number that decides the next token; rows without sampling have none, and read none."""
        drawn = len(self.context) - len(self.prompt)
        return self.uniforms[drawn] if self.uniforms else 0.0

    # --- what happens to a row ---

    def begin(self) -> None:
        """Put the prompt in front if it is to be echoed, where it stops nothing; end if nothing may follow.

        If the prompt's log-probabilities are wanted, `scores` has them all by now.
        """
        if self.options.echo:
            count = len(self.prompt)
            logprobs = self.scores.logprobs if self.scores_prompt else [0.0] * count
            top = self.scores.top if self.scores_prompt else [[]] * count
            for id, logprob, alternatives in zip(self.prompt, logprobs, top, strict=True):
                self.append(id, logprob, alternatives)
            self.release(len(self.tail))

        if self.budget == 0:
            self.end("length")

    def add(self, id: int, logprob: float, top: Alternatives) -> None:
        """Take the next id that was chosen, which may end the row."""
        self.context.append(id)
        if id == self.eos_id:
            self.end("eos")
            return
        if id in self.stop_ids:
            self.end("stop")
            return

        before = len(self.text) + len(self.tail)
        self.append(id, logprob, top)
        if self.cut_at_stop(before):
            self.end("stop")
        elif len(self.context) - len(self.prompt) == self.budget:
            self.end("length")
        else:
            self.release()

    def end(self, reason: FinishReason) -> None:
        """Give out all that is left: bytes that wait for the rest of their character become U+FFFD each.

        The reason is set last. Whoever follows the row in another thread takes it as the sign that all is there.
        """
        self.tail += self.decoder.flush()
        for token in self.incomplete:
            token.end = len(self.text) + len(self.tail)
        self.incomplete = []
        self.release(len(self.tail), reason)
        self.finish_reason = reason

    def refuse(self, text: str) -> None:
        """End before anything is computed, with a text in place of an answer."""
        self.tail = text
        self.end("refused")

    def fail(self, error: Exception) -> None:
        """End without a reason: whoever waits for the row raises the error."""
        self.error = error

    # --- text ---

    def append(self, id: int, logprob: float, top: Alternatives) -> None:
        """Add the id's text, and note where each token that is now complete ends.

        Bytes that were waiting become one character together, or one U+FFFD each.
        """
        before = len(self.text) + len(self.tail)
        self.tail += self.decoder.feed(id)
        length = len(self.text) + len(self.tail)

        token = Token(id, logprob, top)
        self.held.append(token)
        self.incomplete.append(token)

        complete = len(self.incomplete) - len(self.decoder.bytes)
        for count, token in enumerate(self.incomplete[:complete], 1):
            token.end = min(before + count, length)
        if not self.decoder.bytes:
            token.end = length
        del self.incomplete[:complete]

    def cut_at_stop(self, before: int) -> bool:
        """Cut the text at the first stop string that the characters from `before` on complete, if there is one."""
        new = before - len(self.text)
        found = []
        for string in self.stop_strings:
            start = self.tail.find(string, max(new - len(string) + 1, 0))
            if start >= 0:
                found.append(start)
        if not found:
            return False

        self.tail = self.tail[: min(found)]
        end = len(self.text) + len(self.tail)
        self.held = [token for token in self.held if token.end is not None and token.end <= end]
        self.incomplete = []
        self.decoder.bytes = b""
        return True

    def possible_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = 0
        for string in self.stop_strings:
            for length in range(min(len(string) - 1, len(self.tail)), longest, -1):
                if self.tail.endswith(string[:length]):
                    longest = length
                    break
        return longest

    def release(self, characters: int | None = None, reason: FinishReason | None = None) -> None:
        """Make certain what no later id can change, or so many characters, and put it into `pieces`.

        `reason` is given with a row's last piece.
        """
        if characters is None:
            characters = len(self.tail) - self.possible_stop()
        text = self.tail[:characters]
        self.tail = self.tail[characters:]
        self.text += text

        certain = 0
        while certain < len(self.held):
            end = self.held[certain].end
            if end is None or end > len(self.text):
                break
            certain += 1
        tokens = self.held[:certain]
        del self.held[:certain]

        ids = [token.id for token in tokens]
        logprobs = [token.logprob for token in tokens]
        self.ids += ids
        self.logprobs += logprobs
        self.top_logprobs += [token.top for token in tokens]

        if ids or text or reason:  # a row with nothing new is silent
            given = logprobs if self.options.logprobs else None
            self.pieces.append(Piece(self.index, ids, text, given, reason))
