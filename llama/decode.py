"""How token ids run through a model: prompts in one prefill, then one step for a token of every row.

Knows positions, the cache, and how a step is run: as it is written, or compiled. Does not know what a token means, how
it was chosen, or when a row ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from llama import parallel
from llama.model import KVCache, Transformer
from llama.sampling import log_probs

PREFILL_TOKENS = 2048  # tokens of all rows in one forward pass: bounds the activations of a long prompt
SHORTEST_PASS = 64  # positions in one forward pass, unless fewer are left: shorter ones cost as much
SCORED_LOGITS = 2**24  # logits held at once while prompt tokens are scored: 64 MB in float32
STEPS_AHEAD = 8  # steps queued on a GPU before the host reads the ids they chose
COMPILATIONS = 10_000  # of one step, for other numbers of rows and other models: none is one too many
COMPILED = {"default": "default", "cudagraph": "reduce-overhead"}  # by torch's names


def common_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many first ids agree, at most all but the prompt's last: its logits have to be computed anyway."""
    limit = min(len(held), len(prompt) - 1)
    return next((n for n in range(limit) if held[n] != prompt[n]), limit)


Step = Callable[[Tensor, Tensor, Sequence[int], KVCache], Tensor]  # of ids (B, 1), positions (B,), lengths after it


def eager_step(model: Transformer) -> Step:
    """A step as the model writes it, over the filled part of the cache alone."""

    def step(tokens: Tensor, positions: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        cache = cache.narrow(len(lengths), max(lengths))
        if len(set(lengths)) == 1:  # no row has to skip a key
            return model(tokens, lengths[0] - 1, cache=cache)
        return model(tokens, positions=positions, cache=cache)

    return step


def compiled_step(model: Transformer, mode: str) -> Step:
    """A step that torch compiles once for each number of rows, over the whole cache: no shape changes between steps.

    Mode "cudagraph" launches it as one CUDA graph, and is "default" where there is no CUDA. The first call with a
    number of rows says on standard error how long it took. Raises `ValueError` for another mode, and the call
    `RuntimeError` where nothing can be compiled.
    """
    if mode not in COMPILED:
        raise ValueError(f"compile is {mode!r}; it must be None or one of {', '.join(COMPILED)}.")
    seen: set[int] = set()

    @torch.compile(mode=COMPILED[mode], fullgraph=True, dynamic=False)
    def logits(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return model.logits(model.run_layers(tokens, model.plan(tokens, positions, cache)))

    def step(tokens: Tensor, positions: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        rows, started = len(lengths), time.perf_counter()
        for tensor in (cache.k, cache.v):
            torch._dynamo.mark_static_address(tensor)  # written in place, so a graph has to know where it stays
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILATIONS) if rows not in seen else nullcontext():
                result = logits(tokens, positions, cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"torch cannot compile the model here ({reason}); leave compile out.") from None
        if rows not in seen and parallel.world()[0] == 0:
            what = f"compiled for {rows} row{'s' * (rows > 1)}"
            print(f"llama: {what} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        seen.add(rows)
        return result

    return step


def steps_ahead(device: torch.device) -> int:
    """How many tokens to choose before reading any: on a CPU, reading waits for nothing."""
    return 1 if device.type == "cpu" else STEPS_AHEAD


class Batch:
    """Some rows in a model's cache, each with its own length.

    The longest prompt has the first place in the cache and equal prompts come last: so any pass over the prompts is
    one over the first places, and a prompt that is there several times is computed once. Prompts are padded on the
    right and run causally; padding comes after a row's last token, so no token sees it, and the row's next tokens take
    its place in the cache.

    `held` is the ids whose keys the cache holds, place by place. `last` and `at`, on the device, are the last id of
    each place and its position: steps need nothing that the host would have to wait for or send. What they were fed is
    noted in `held` by `settle`, which a caller may put off for `ahead` steps. `lengths` and `grows`, on the host, say
    the same of positions and of the rows that the last step continued as `at` and `growing` on the device.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], step: Step | None = None):
        self.model, self.advance = model, step or eager_step(model)
        self.cache = model.own_cache()
        self.device = self.cache.k.device
        self.ahead = steps_ahead(self.device)
        first: dict[tuple[int, ...], int] = {}
        for row, prompt in enumerate(prompts):
            first.setdefault(tuple(prompt), row)
        different = sorted(first.values(), key=lambda row: -len(prompts[row]))
        self.rows = different + [row for row in range(len(prompts)) if first[tuple(prompts[row])] != row]
        self.places = [self.rows.index(row) for row in range(len(prompts))]
        self.prompts = [list(prompts[row]) for row in self.rows]
        self.sources = [self.places[first[tuple(prompt)]] for prompt in self.prompts]  # whose keys each place has
        self.different = len(different)
        self.held: list[list[int]] = []
        self.fed: list[tuple[Tensor, list[bool]]] = []
        self.lengths, self.grows = [len(prompt) for prompt in self.prompts], []
        ends = [[prompt[-1], len(prompt) - 1] for prompt in self.prompts]
        self.last, self.at = torch.tensor(ends, device=self.device).unbind(1)
        self.order = torch.tensor([self.rows, self.places], device=self.device)

    @torch.no_grad()
    def prefill(self, score: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the prompts; return the float32 logits (B, V) after the last token of each and, if asked, `scores`.

        `scores[row, t]` is the log-probability of the row's token t, (B, longest prompt) float32, 0 for the first.
        What the cache still holds of the beginning that all rows share with earlier ids is not computed again,
        unless scores are wanted.
        """
        earlier, self.held = self.cache.ids, []
        prompts, sources = self.prompts[: self.different], torch.tensor(self.sources, device=self.device)
        pairs = zip(earlier, prompts, strict=False)
        begin = 0 if score or len(earlier) < len(prompts) else min(common_prefix(*pair) for pair in pairs)
        self.cache.ids = self.held
        lengths = self.at[: self.different] + 1
        longest = len(prompts[0])
        padded = [prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts]  # no id that is not its own
        tokens = torch.tensor(padded, device=self.device)
        scores = torch.zeros(tokens.shape, dtype=torch.float32, device=self.device) if score else None
        final = torch.empty(len(prompts), self.model.params.dim, dtype=self.cache.k.dtype, device=self.device)
        while begin < longest:
            running = sum(len(prompt) > begin for prompt in prompts)
            shortest = max(len(prompts[running - 1]), begin + SHORTEST_PASS)
            end = min(longest, begin + max(1, PREFILL_TOKENS // running), shortest)
            cache = self.cache.narrow(running, end)
            h = self.model.hidden(tokens[:running, begin:end], begin, cache=cache)  # (B, T, C)
            ending = (lengths[:running] > begin) & (lengths[:running] <= end)
            final[:running][ending] = h[ending, lengths[:running][ending] - 1 - begin]
            if score:
                self.score_chunk(h, tokens[:running], begin, scores)
            begin = end
        for place in range(self.different, len(self.prompts)):
            for tensor in (self.cache.k, self.cache.v):
                filled = tensor[:, :, :, : len(self.prompts[place])]
                filled[:, place] = filled[:, self.sources[place]]
        self.held.extend(list(prompt) for prompt in self.prompts)
        order = sources[self.places]
        return self.model.logits(final)[order], None if scores is None else scores[order]

    def score_chunk(self, h: Tensor, tokens: Tensor, begin: int, scores: Tensor) -> None:
        """Fill in the scores of the tokens that follow those of `h`, a bounded number of logits at a time."""
        width = max(1, SCORED_LOGITS // (h.shape[0] * self.model.vocab_size))
        end = min(begin + h.shape[1], tokens.shape[1] - 1)  # the last token of all has no successor
        for at in range(begin, end, width):
            upto = min(at + width, end)
            logits = self.model.logits(h[:, at - begin : upto - begin])  # (B, width, V)
            scores[: h.shape[0], at + 1 : upto + 1] = log_probs(logits, tokens[:, at + 1 : upto + 1])

    @torch.no_grad()
    def step(self, ids: Tensor, going: Sequence[bool]) -> Tensor:
        """Feed one more id, of `ids` (B,), to each row that is `going`; return the logits (B, V) after it.

        Another row is fed its last id at its last position again, which changes nothing. Raises `RuntimeError` if
        another call has used the cache since the last step.
        """
        if self.cache.ids is not self.held:
            raise RuntimeError("Another call has used the model's cache since; an interrupted stream cannot go on.")
        rows, places = self.order
        grows = [going[row] for row in self.rows]
        if grows != self.grows:
            self.grows, self.growing = grows, torch.tensor(grows, device=self.device)
        self.last, self.at = torch.where(self.growing, ids[rows], self.last), self.at + self.growing
        self.lengths = [length + grow for length, grow in zip(self.lengths, grows, strict=True)]
        self.fed.append((self.last, grows))
        cache = self.cache.narrow(len(grows), self.cache.k.shape[3])
        return self.advance(self.last[:, None], self.at, self.lengths, cache)[places, 0]

    def settle(self) -> None:
        """Note in `held` what has been fed."""
        for ids, grows in self.fed:
            for held, id, grow in zip(self.held, ids.tolist(), grows, strict=True):
                held.extend([id] * grow)
        self.fed = []
