"""How token ids run through a model: prompts in one prefill, then one step for a token of every row.

Knows positions and the cache. Does not know what a token means, how it was chosen, or when a row ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.model import Transformer
from llama.sampling import log_probs

PREFILL_TOKENS = 2048  # tokens of all rows in one forward pass: bounds the activations of a long prompt
SCORED_LOGITS = 2**24  # logits held at once while prompt tokens are scored: 64 MB in float32


def common_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many first ids agree, at most all but the prompt's last: its logits have to be computed anyway."""
    limit = min(len(held), len(prompt) - 1)
    return next((n for n in range(limit) if held[n] != prompt[n]), limit)


class Batch:
    """Some rows in a model's cache, each with its own length.

    Prompts are padded on the right and run causally; padding comes after a row's last token, so no token sees it,
    and the row's next tokens take its place in the cache. `held` is the ids whose keys the cache holds, row by row.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]]):
        self.model = model
        self.prompts = prompts
        self.cache = model.own_cache()
        self.device = self.cache.k.device
        self.held: list[list[int]] = []

    @torch.no_grad()
    def prefill(self, score: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the prompts; return the float32 logits (B, V) after the last token of each and, if asked, `scores`.

        `scores[row, t]` is the log-probability of the row's token t, (B, longest prompt) float32, 0 for the first.
        What the cache still holds of the beginning that all rows share with earlier ids is not computed again,
        unless scores are wanted.
        """
        earlier, self.held = self.cache.ids, []
        pairs = zip(earlier, self.prompts, strict=False)
        reusable = 0 if score or len(earlier) < len(self.prompts) else min(common_prefix(*pair) for pair in pairs)
        self.cache.ids = self.held
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        longest = int(lengths.max())
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in self.prompts]
        tokens = torch.tensor(padded, device=self.device)  # (B, longest)
        scores = torch.zeros(tokens.shape, dtype=torch.float32, device=self.device) if score else None
        cache = self.cache.narrow(len(padded), longest)
        final = torch.empty(len(padded), self.model.params.dim, dtype=self.cache.k.dtype, device=self.device)
        width = max(1, PREFILL_TOKENS // len(padded))
        for begin in range(reusable, longest, width):
            h = self.model.hidden(tokens[:, begin : begin + width], begin, cache=cache)  # (B, T, C)
            ends = (lengths > begin) & (lengths <= begin + h.shape[1])
            final[ends] = h[ends, lengths[ends] - 1 - begin]
            if score:
                self.score_chunk(h, tokens, begin, scores)
        self.held.extend(list(prompt) for prompt in self.prompts)
        return self.model.logits(final), scores

    def score_chunk(self, h: Tensor, tokens: Tensor, begin: int, scores: Tensor) -> None:
        """Fill in the scores of the tokens that follow those of `h`, a bounded number of logits at a time."""
        width = max(1, SCORED_LOGITS // (h.shape[0] * self.model.vocab_size))
        end = min(begin + h.shape[1], tokens.shape[1] - 1)  # the last token of all has no successor
        for at in range(begin, end, width):
            upto = min(at + width, end)
            logits = self.model.logits(h[:, at - begin : upto - begin])  # (B, width, V)
            scores[:, at + 1 : upto + 1] = log_probs(logits, tokens[:, at + 1 : upto + 1])

    @torch.no_grad()
    def step(self, ids: Sequence[int | None]) -> Tensor:
        """Feed one more id to each row; return the logits (B, V) after it.

        A row without one (None) is finished: it is fed its last id at its last position again, which changes nothing.
        Raises `RuntimeError` if another call has used the cache since the last step.
        """
        if self.cache.ids is not self.held:
            raise RuntimeError("Another call has used the model's cache since; an interrupted stream cannot go on.")
        positions = [len(held) - (id is None) for held, id in zip(self.held, ids, strict=True)]
        fed = [held[-1] if id is None else id for held, id in zip(self.held, ids, strict=True)]
        logits = self.model(
            torch.tensor(fed, device=self.device)[:, None],
            positions=torch.tensor(positions, device=self.device),
            cache=self.cache.narrow(len(fed), max(positions) + 1),
        )
        for held, id in zip(self.held, ids, strict=True):
            if id is not None:
                held.append(id)
        return logits[:, 0]
