"""The options of a call, and the function from logits to the next token's id and to log-probabilities.

This module knows nothing of tokenizers, positions or models. Randomness comes in as numbers: `choose` is a function.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

CANDIDATES = 256  # probabilities that are sorted first; all are where these do not hold the nucleus
# A lower temperature is 0 in float32, and nothing divides by 0.
COOLEST = torch.finfo(torch.float32).tiny


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# --- options -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a call asks for, besides its prompts.

    temperature        0 takes the likeliest token; higher values choose more freely
    top_p              keep the likeliest tokens that together have this probability (nucleus)
    max_gen_len        tokens to generate at most; None: until `max_seq_len` is full
    logprobs           whether to return the log-probability of each token
    echo               whether to return the prompt too, before what was generated
    top_k              keep this many of the likeliest tokens; None keeps all
    min_p              drop tokens with less than this share of the likeliest token's probability
    presence_penalty   subtracted from the logit of each token that was generated before
    frequency_penalty  subtracted from it once for each time that the token was generated
    logit_bias         numbers to add to the logits of some ids
    logits_processor   a function (ids of the row so far, logits (V,)) -> logits (V,); called on the first rank
    stop               strings and ids that end a row
    seed               the same seed gives the same ids; None continues the instance's own sequence
    n                  completions of each prompt
    top_logprobs       how many of the likeliest tokens to report at each position
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_gen_len: int | None = None
    logprobs: bool = False
    echo: bool = False
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processor: Callable[[list[int], Tensor], Tensor] | None = None
    stop: Iterable[str | int] | None = None
    seed: int | None = None
    n: int = 1
    top_logprobs: int = 0

    def checked(self) -> Sampling:
        """The same options with `stop` as a tuple. Raises `ValueError` for the first that is out of its range."""
        self.check_ranges()
        self.check_counts()
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ValueError(
                f"logits_processor is {self.logits_processor!r}; it must be a function, or None."
            )
        self.check_bias()
        return dataclasses.replace(self, stop=self.checked_stop())

    def check_ranges(self) -> None:
        temperature = self.temperature
        if not is_number(temperature) or not 0 <= temperature < math.inf:
            allowed = "0 (greedy) or a positive number"
            raise ValueError(f"temperature is {temperature!r}; it must be {allowed}.")

        top_p = self.top_p
        if not is_number(top_p) or not 0 < top_p <= 1:
            allowed = "above 0 and at most 1 (1 keeps every token)"
            raise ValueError(f"top_p is {top_p!r}; it must be {allowed}.")

        min_p = 0 if self.min_p is None else self.min_p
        if not is_number(min_p) or not 0 <= min_p <= 1:
            raise ValueError(f"min_p is {min_p!r}; it must be from 0 to 1, or None.")

        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; it must be a number.")

    def check_counts(self) -> None:
        for name, least in (("top_k", 1), ("max_gen_len", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_integer(value) or value < least:
                allowed = f"an integer of at least {least}, or None"
                raise ValueError(f"{name} is {value!r}; it must be {allowed}.")

        for name, least in (("n", 1), ("top_logprobs", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                allowed = f"an integer of at least {least}"
                raise ValueError(f"{name} is {value!r}; it must be {allowed}.")

        if self.seed is not None and not is_integer(self.seed):
            allowed = "an integer, or None to continue the sequence"
            raise ValueError(f"seed is {self.seed!r}; it must be {allowed}.")

    def check_bias(self) -> None:
        if self.logit_bias is None:
            return
        allowed = "a dictionary from token ids to numbers (-inf bans an id), or None"
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias is {self.logit_bias!r}; it must be {allowed}.")

        for id, bias in self.logit_bias.items():
            if not (is_integer(id) and id >= 0 and is_number(bias) and bias < math.inf):
                raise ValueError(f"logit_bias holds {id!r}: {bias!r}; it must be {allowed}.")

    def checked_stop(self) -> tuple[str | int, ...]:
        allowed = "a list of non-empty strings and token ids"
        if isinstance(self.stop, str) or not isinstance(self.stop, Iterable | None):
            raise ValueError(f"stop is {self.stop!r}; it must be {allowed}.")

        entries = tuple(self.stop or ())
        for entry in entries:
            if entry == "" or not (isinstance(entry, str) or is_integer(entry)):
                raise ValueError(f"stop is {list(entries)!r}; it must be {allowed}.")
        return entries

    def changes_logits(self) -> bool:
        """Whether these options change a row's logits, see `adjust`, before one of them is chosen."""
        penalized = self.presence_penalty or self.frequency_penalty
        return bool(self.logits_processor or self.logit_bias or penalized)


# --- log-probabilities -------------------------------------------------------------------------------------------


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[ids] in float32: logits (..., V), ids (...) int64 -> (...)."""
    logits = logits.float()
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def top_log_probs(logits: Tensor, count: int, known: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of log softmax(logits) among the first `known`, falling, and their ids."""
    logits = logits.float()
    values, ids = logits[..., :known].topk(min(count, known), dim=-1)
    return values - logits.logsumexp(-1, keepdim=True), ids


# --- choosing ----------------------------------------------------------------------------------------------------


def uniforms(seed: int, row: int, count: int) -> list[float]:
    """The uniform numbers of one row, exact in float32: they depend on the seed and the row's index alone."""
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu").tolist()


def adjust(
    logits: Tensor, options: Sampling, context: list[int], generated: Sequence[int]
) -> Tensor:
    """One row's logits (V,) after its processor, its bias and its penalties, in that order, as a new tensor.

    `context` are all ids of the row so far, `generated` those that the prompt did not have. Penalties are OpenAI's:
    of each id that was generated, its count times `frequency_penalty`, and `presence_penalty`, are subtracted.
    """
    logits = logits.clone()

    if options.logits_processor is not None:
        shape = logits.shape
        logits = options.logits_processor(list(context), logits)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"logits_processor returned {found}; it must return logits of {tuple(shape)}."
            )
        logits = logits.float().clone()

    for id, bias in (options.logit_bias or {}).items():
        logits[id] += bias

    if generated and (options.presence_penalty or options.frequency_penalty):
        ids, counts = torch.tensor(generated, device=logits.device).unique(return_counts=True)
        logits[ids] -= options.frequency_penalty * counts + options.presence_penalty

    if not logits.amax().isfinite():
        raise ValueError("logits_processor and logit_bias left no token that can be chosen.")
    return logits


def keep_top_p(probs: Tensor, top_p: float) -> Tensor:
    """Zero each probability whose predecessors, in falling order, hold more than `top_p`; renormalize the rest.

    `probs` (..., V) falls along its last dimension. The first always stays. (Nucleus sampling, arXiv:1904.09751.)
    """
    total = probs.cumsum(-1)
    dropped = total - probs > top_p
    kept = probs.masked_fill(dropped, 0.0)
    last = (~dropped).sum(-1, keepdim=True) - 1
    return kept / total.gather(-1, last)  # the sum in falling order: zeros after it change no digit


def keep_min_p(probs: Tensor, min_p: float) -> Tensor:
    """Zero each probability under `min_p` times the first, which is the largest; renormalize the rest."""
    kept = probs.masked_fill(probs < min_p * probs[..., :1], 0.0)
    return kept / kept.sum(-1, keepdim=True)


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The index at which the running sum of `probs` (..., V) first exceeds `uniforms` (...): (...) int64.

    Rounding may leave the whole sum a little under a uniform near 1; the last index with any probability takes it.
    """
    index = (probs.cumsum(-1) <= uniforms.unsqueeze(-1)).sum(-1)
    last = ((probs > 0).sum(-1) - 1).clamp(min=0)
    return torch.minimum(index, last)


def likeliest(probs: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """At least the nucleus, and the `top_k` largest, of `probs` (B, V): (values, indices) falling, ties by index.

    Sorting a whole vocabulary costs more than a small model's step. The 256 largest are enough if the nucleus ends
    before the smallest of them: no token left out can then tie with one that is kept. Asking whether it does would
    make the host wait for any device but a CPU.
    """
    few = top_p < 1 if top_k is None else top_k < CANDIDATES
    if not probs.is_cpu or probs.shape[-1] <= CANDIDATES or not few:
        return probs.sort(dim=-1, descending=True, stable=True)

    # Put ties in the order of their indices, which a stable sort by value then keeps.
    values, indices = probs.topk(CANDIDATES, dim=-1)
    indices, order = indices.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)

    larger = values > values[..., -1:]
    enough = (values * larger).sum(-1) > top_p
    if top_k is not None:
        enough |= larger.sum(-1) >= top_k
    if bool(enough.all()):
        return values, indices.gather(-1, order)
    return probs.sort(dim=-1, descending=True, stable=True)


def sample(
    logits: Tensor,
    uniforms: Tensor | None,
    temperature: float,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Next ids (B,) from logits (B, V) and one uniform number in [0, 1) for each row, (B,) float32.

    Temperature 0 takes the largest logit and reads no uniform. Otherwise softmax(logits / temperature) in float32,
    cut to the `top_k` largest, to the `top_p` nucleus and by `min_p`, and inverted at the uniform in falling order.
    """
    if temperature == 0:
        return logits.argmax(-1)

    logits = logits.float()
    logits = logits - logits.amax(
        -1, keepdim=True
    )  # 0 at the top: any temperature is safe to divide by
    probs = (logits / max(temperature, COOLEST)).softmax(-1)

    probs, order = likeliest(probs, top_p, top_k)
    if top_k is not None:
        probs = probs[..., :top_k]
        probs = probs / probs.sum(-1, keepdim=True)
    probs = keep_top_p(probs, top_p)
    if min_p:
        probs = keep_min_p(probs, min_p)

    chosen = invert(probs, uniforms)
    return order.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def choose(logits: Tensor, options: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Next ids (B,) from logits (B, V), each row by its own options: rows of equal options are sampled together."""
    groups: dict[tuple, list[int]] = {}
    for row, wish in enumerate(options):
        shape = (wish.temperature, wish.top_p, wish.top_k, wish.min_p)
        groups.setdefault(shape, []).append(row)

    numbers = torch.tensor(uniforms, dtype=torch.float32, device=logits.device)
    if len(groups) == 1:
        return sample(logits, numbers, *groups.popitem()[0])

    ids = torch.empty(len(options), dtype=torch.int64, device=logits.device)
    for shape, rows in groups.items():
        ids[rows] = sample(logits[rows], numbers[rows], *shape)
    return ids


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Draw ids (..., 1) from the `p` nucleus of probabilities (..., V), with torch's global generator.

    For callers that sample by themselves; the library uses `choose`, which leaves global state alone.
    """
    ordered, order = probs.float().sort(dim=-1, descending=True, stable=True)
    uniforms = torch.rand(probs.shape[:-1], device=probs.device)
    chosen = invert(keep_top_p(ordered, p), uniforms)
    return order.gather(-1, chosen.unsqueeze(-1))
