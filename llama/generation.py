"""`Llama`: a model and its tokenizer, and the one loop that makes text of them.

`stream` is that loop; `generate`, `text_completion`, `chat_completion`, `text_infilling` and `score` drain
it. This module knows nothing of HTTP, argument parsing or how ranks share a layer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama import formats, parallel, prompts
from llama.decode import COMPILED, Batch, compiled_step, eager_step
from llama.device import dtype_name
from llama.kernels import FORMATS
from llama.loading import check_vocabulary, join, load
from llama.model import Transformer
from llama.prompts import B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS, UNSAFE_ERROR, Dialog, Message, Role
from llama.request import ChatPrediction, CompletionPrediction, Options, Piece, Request, Row, Score, drain
from llama.sampling import log_probs, sample, sample_top_p
from llama.stopping import Completion
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Unpack

__all__ = [  # what callers import from here, some of it defined elsewhere
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "ChatPrediction",
    "CompletionPrediction", "Dialog", "Llama", "Message", "Piece", "Role", "Score", "sample_top_p",
]  # fmt: skip


def row_uniforms(seed: int, row: int, count: int) -> Tensor:
    """The uniform numbers of one row, (count,) float32: they depend on the seed and the row's index alone."""
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")


class Llama:
    """Text from a model. Each call stands alone, except that calls without a `seed` continue one sequence of seeds.

    Calls take turns: a stream that is still open when another call begins cannot be continued.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1, compile: str | None = None):
        check_vocabulary(tokenizer.n_words, model.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.seeds = random.Random(seed)
        self.step = eager_step(model) if compile is None else compiled_step(model, compile)

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        lora: str | Path | None = None,
        compile: str | None = None,
    ) -> Llama:
        """Open a checkpoint folder and make it ready to generate.

        Under `torchrun` the model is shared by `model_parallel_size` ranks (all by default), whatever the number of
        files. The cache holds `max_batch_size` rows of `max_seq_len` tokens. `lora` is the folder of an adapter, in
        PEFT's layout, to merge into the weights; `quantize` then keeps them as "int8" or "int4". With `compile`
        "default" or "cudagraph", torch compiles the steps at their first use. Raises `FileNotFoundError` or
        `ValueError` for files or arguments that are missing or wrong, `RuntimeError` if the memory does not suffice.
        """
        device = join(model_parallel_size, device)
        for name, value, allowed in (("quantize", quantize, FORMATS), ("compile", compile, COMPILED)):
            if value is not None and value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be None or one of {', '.join(allowed)}.")
        source = formats.find(ckpt_dir)
        tokenizer = Tokenizer(tokenizer_path or formats.find_tokenizer(source.folder))
        model = load(source, tokenizer.n_words, max_seq_len, max_batch_size, device, dtype, quantize, lora)
        return Llama(model, tokenizer, seed=seed, compile=compile)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Piece]:
        """Yield what becomes certain of each row, as `(row, ids, text, logprobs, finish_reason)`.

        Joined by row, the pieces are what `generate` and `text_completion` return: characters are whole, and what may
        begin a stop string waits. Arguments and errors as for `generate`; errors of arguments are raised by the call
        itself, before the first piece.
        """
        request = Request(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, **options)
        request.streamed = True
        return self.start(request)[1]

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt; return each row's new ids and, with `logprobs=True`, their log-probabilities.

        A row ends at the EOS id, at a `stop` string or id, after `max_gen_len` tokens (None: no limit of its own), or
        where `max_seq_len` is full; neither EOS, nor a stop id, nor a token that touches a stop string is returned.
        `temperature=0` takes the likeliest token; else sampling keeps the `top_k` likeliest, and of those the nucleus
        of mass `top_p`. The same `seed` gives the same ids. Log-probabilities are natural, under the model's own
        distribution; `echo=True` puts the prompt in front, its first token with 0.0.

        Raises `ValueError` for arguments out of range and prompts that do not fit, `RuntimeError` if the model
        computes numbers that are not finite.
        """
        request = Request(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, **options)
        request, rows = self.complete(request)
        return [row.ids for row in rows], [row.logprobs for row in rows] if request.logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """Continue each text. Arguments and errors as for `generate`."""
        prompt_tokens = self.encode_texts(parallel.broadcast_object(prompts, self.device))
        request = Request(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, **options)
        request, rows = self.complete(request)
        return [self.prediction(row, row.text, request.logprobs) for row in rows]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[Options],
    ) -> list[ChatPrediction]:
        """Answer the last message of each dialog. Arguments and errors as for `generate`.

        A dialog in which a message holds a special tag is refused before anything is computed. Raises `ValueError`
        for roles out of order, naming dialog and message.
        """
        dialogs = parallel.broadcast_object(dialogs, self.device)
        for index, dialog in enumerate(dialogs):
            prompts.check_dialog(dialog, f"Dialog {index}")
        accepted = [index for index, dialog in enumerate(dialogs) if self.refusal(dialog, logprobs) is None]
        prompt_tokens = [prompts.encode_dialog(self.tokenizer, dialogs[index]) for index in accepted]
        request = Request(prompt_tokens, max_gen_len, temperature, top_p, logprobs, False, **options)
        request.rows = accepted
        request, rows = self.complete(request, len(dialogs))
        return [
            self.refusal(dialogs[at // request.n], request.logprobs)
            or self.prediction(row, {"role": "assistant", "content": row.text}, request.logprobs)
            for at, row in enumerate(rows)
        ]

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """Write what belongs between each prefix and its suffix. Arguments and errors as for `generate`.

        EOT ends a row, with `finish_reason` "stop". `suffix_first` puts the suffix before the prefix in the prompt,
        another order that the models were trained on. Raises `ValueError` for a model that is not made for infilling.
        """
        prefixes, suffixes = parallel.broadcast_object((prefixes, suffixes), self.device)
        if isinstance(prefixes, str) or isinstance(suffixes, str) or len(prefixes) != len(suffixes):
            raise ValueError("Prefixes and suffixes must be two lists of strings, of equal length.")
        pairs = list(zip(prefixes, suffixes, strict=True))
        prompt_tokens = [prompts.encode_infilling(self.tokenizer, *pair, suffix_first) for pair in pairs]
        request = Request(prompt_tokens, max_gen_len, temperature, top_p, logprobs, False, **options)
        request.infilling = True
        request, rows = self.complete(request)
        return [
            self.prediction(row, row.text, request.logprobs) | {"full_text": row.text.join(pairs[at // request.n])}
            for at, row in enumerate(rows)
        ]

    def score(self, texts: Sequence[str]) -> list[Score]:
        """The log-probability of each token of each text, BOS first with 0.0; nothing is generated."""
        prompt_tokens = self.encode_texts(parallel.broadcast_object(texts, self.device))
        request = Request(prompt_tokens, 0, temperature=0, top_p=1, logprobs=True, echo=True)
        rows = self.complete(request)[1]
        return [{"tokens": self.decode_each(row.ids), "logprobs": row.logprobs} for row in rows]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise ValueError("Texts must come as a list of strings, not as one string.")
        return [self.tokenizer.encode(text, bos=True, eos=False) for text in texts]

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode(id) for id in ids]

    def prediction(self, row: Row, generation: str | Message, logprobs: bool) -> dict:
        prediction = {"generation": generation, "finish_reason": row.finish_reason}
        return prediction | ({"tokens": self.decode_each(row.ids), "logprobs": row.logprobs} if logprobs else {})

    def refusal(self, dialog: Dialog, logprobs: bool) -> ChatPrediction | None:
        """The answer to a dialog that holds a special tag, None for one that may be answered."""
        found = prompts.find_special_tag(dialog)
        if found is None:
            return None
        row = Row(finish_reason="refused")
        prediction = self.prediction(row, {"role": "assistant", "content": UNSAFE_ERROR}, logprobs)
        return prediction | {"refusal": f"Message {found[0]} holds the special tag {found[1]}."}

    def complete(self, request: Request, prompts: int | None = None) -> tuple[Request, list[Row]]:
        """Run a request, the first rank's, which is returned, to its end; for `prompts`, those not asked included."""
        request, pieces = self.start(request)
        return request, drain(pieces, len(request.prompts) if prompts is None else prompts * request.n)

    def start(self, request: Request) -> tuple[Request, Iterator[Piece]]:
        """Check a request, the first rank's on all ranks, give it a seed if it has none, and begin to run it."""
        request = parallel.broadcast_object(request, self.device)
        if request.rows is None:
            request.rows = range(len(request.prompts))
        request.check(self.model.vocab_size, self.model.params.max_seq_len)
        if request.seed is None and request.temperature > 0:
            request.seed = parallel.broadcast_object(self.seeds.getrandbits(63), self.device)
        request.repeat()
        return request, self.run(request)

    def run(self, request: Request) -> Iterator[Piece]:
        """The prompts in consecutive chunks of at most `max_batch_size` rows; calls without prompts yield nothing."""
        size = self.model.params.max_batch_size
        for first in range(0, len(request.prompts), size):
            chunk = slice(first, first + size)
            yield from self.run_chunk(request, request.rows[chunk], request.prompts[chunk])

    def run_chunk(self, request: Request, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Iterator[Piece]:
        """One prefill for all rows of a chunk, then one step for each token; `rows` are their indices in the call.

        Where several steps run before their ids are read, no row passes its budget meanwhile, and what follows the
        end of a row is dropped.
        """
        outputs = [Completion(self.tokenizer, request.stop or (), request.infilling) for _ in prompts]
        budgets = [self.model.params.max_seq_len - len(prompt) for prompt in prompts]
        if request.max_gen_len is not None:
            budgets = [min(budget, request.max_gen_len) for budget in budgets]
        batch, scoring = Batch(self.model, prompts, self.step), request.echo and request.logprobs
        logits, scores = batch.prefill(scoring) if any(budgets) or scoring else (None, None)
        for at, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
            if request.echo:
                output.echo(prompt, self.prompt_scores(scores, at, rows[at], len(prompt)))
            if not budgets[at]:
                output.finish("length")
        spoiled = False  # by numbers that are not finite, after the end of a row: no matter but for the cache
        active, begin, ids, uniforms = list(range(len(rows))), 0, None, [None] * max(budgets)
        if request.temperature > 0:
            numbers_of_rows = [row_uniforms(request.seed, row, max(budgets)) for row in rows]
            uniforms = torch.stack(numbers_of_rows, dim=1).to(self.device)  # (steps, B)
        while True:
            for at in active:
                released, text, logprobs = outputs[at].release()
                if released or text or outputs[at].finish_reason:  # a row with nothing new is silent
                    given = logprobs if request.logprobs else None
                    yield Piece(rows[at], released, text, given, outputs[at].finish_reason)
            active = [at for at in active if outputs[at].finish_reason is None]
            if not active:
                if spoiled:
                    self.model.own_cache().clear()
                return
            going = [output.finish_reason is None for output in outputs]
            ahead = 1 if request.stop or request.streamed else batch.ahead
            steps, chosen = range(begin, min(begin + ahead, *(budgets[at] for at in active))), []
            for step in steps:
                logits = batch.step(ids, going) if step else logits
                ids, finite, logprobs = self.choose(logits, request, uniforms[step])
                chosen.append((ids, finite, logprobs))
            batch.settle()
            facts = (torch.stack(fact).tolist() for fact in zip(*chosen, strict=True))  # (steps, B) each
            for step, *values in zip(steps, *facts, strict=True):
                spoiled |= not all(values[1][at] for at in active)
                for at in (at for at in active if outputs[at].finish_reason is None):
                    id, finite, logprob = (value[at] for value in values)
                    self.require_finite(finite, rows[at], len(prompts[at]) + step - 1)
                    outputs[at].add(id, logprob)
                    if step + 1 == budgets[at] and outputs[at].finish_reason is None:
                        outputs[at].finish("length")
            begin = steps.stop

    def prompt_scores(self, scores: Tensor | None, at: int, row: int, length: int) -> list[float]:
        if scores is None:
            return [0.0] * length
        for position, finite in enumerate(scores[at, :length].isfinite().tolist()):
            self.require_finite(finite, row, position - 1)
        return scores[at, :length].tolist()

    @torch.no_grad()
    def choose(self, logits: Tensor, request: Request, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's next id, the first rank's on all ranks, whether its logits are finite, and the log-probability.

        Nothing here waits for the device.
        """
        known = logits[:, : self.tokenizer.n_words]  # rows beyond the tokenizer have no text: never chosen
        ids = parallel.broadcast(sample(known, uniforms, request.temperature, request.top_p, request.top_k))
        logprobs = log_probs(logits, ids) if request.logprobs else torch.zeros_like(logits[:, 0])
        return ids, logits.isfinite().all(-1), logprobs

    def require_finite(self, finite: bool, row: int, position: int) -> None:
        if not finite:
            self.model.own_cache().clear()
            computed = f"not finite, computed in {dtype_name(self.model.norm.weight.dtype)}"
            advice = "try dtype='float32', or check the weights"
            raise RuntimeError(f"Row {row}: the logits after position {position} are {computed}; {advice}.")
