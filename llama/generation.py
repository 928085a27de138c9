"""`Llama`: a model and its tokenizer, and the calls that make text of them.

Each call turns its prompts into rows, hands them to the engine, and returns what they became. This module knows
nothing of HTTP, argument parsing or how ranks share a layer.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from llama import formats, parallel, prompts
from llama.compiling import check_mode, compiled_step
from llama.engine import Engine
from llama.kernels import FORMATS
from llama.loading import check_vocabulary, join, load
from llama.model import Transformer
from llama.options import takes_options
from llama.predictions import ChatPrediction, CompletionPrediction, Score, prediction, score
from llama.progress import Progress
from llama.prompts import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Dialog,
    Message,
    Role,
)  # fmt: skip
from llama.rows import Piece, Row, check_prompt
from llama.sampling import Sampling, sample_top_p, uniforms
from llama.tokenizer import Tokenizer

__all__ = [  # what callers import from here, some of it defined elsewhere
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "ChatPrediction",
    "CompletionPrediction", "Dialog", "Llama", "Message", "Piece", "Role", "Sampling", "Score", "sample_top_p",
]  # fmt: skip

Value = TypeVar("Value")


class Llama:
    """A model with its tokenizer: texts, dialogs or ids in, their continuations out.

    Any thread may call, and several may at once: their prompts share the rows of the model's cache, and each call gets
    what it would get alone. At several ranks the same calls are made on each, by one thread. Calls without a `seed`
    continue one sequence of seeds, in the order in which they arrive; each group of ranks that shares a model has its
    own sequence.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1, compile: str | None = None
    ):
        check_vocabulary(tokenizer.n_words, model.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.seeds = random.Random(seed)
        self.drawing = threading.Lock()
        compiled = None if compile is None else compiled_step(model, compile)
        self.engine = Engine(model, tokenizer.n_words, compiled)

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
        pack: bool | None = None,
    ) -> Llama:
        """Open a checkpoint folder and make it ready to generate.

        Under `torchrun` the model is shared by `model_parallel_size` ranks (all by default), whatever the number of
        files. The cache holds `max_batch_size` rows of `max_seq_len` tokens. `lora` is the folder of an adapter, in
        PEFT's layout, to merge into the weights; `quantize` then keeps them as "int8" or "int4". With `compile`
        "default" or "cudagraph", torch compiles the steps at their first use. `pack` True keeps a copy of each matrix
        in the layout that a processor multiplies fastest, False none, None where it pays. Raises `FileNotFoundError` or
        `ValueError` for files or arguments that are missing or wrong, `RuntimeError` if the memory does not suffice.
        """
        Sampling(seed=seed).checked()
        check_mode(compile)
        if quantize is not None and quantize not in FORMATS:
            allowed = ", ".join(FORMATS)
            raise ValueError(f"quantize is {quantize!r}; it must be None or one of {allowed}.")
        device = join(model_parallel_size, device)

        source = formats.find(ckpt_dir)
        tokenizer = Tokenizer(tokenizer_path or formats.find_tokenizer(source.folder))
        limits = (max_seq_len, max_batch_size)
        with torch.inference_mode(False):  # weights made in that mode could never be trained
            model = load(source, tokenizer.n_words, *limits, device, dtype, quantize, lora, pack)
        return Llama(model, tokenizer, seed=seed, compile=compile)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    # --- calls ---

    @takes_options
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt; return each row's new ids and, with `logprobs=True`, their log-probabilities.

        A row ends at the EOS id, at a `stop` string or id, after `max_gen_len` tokens (None: no limit of its own), or
        where `max_seq_len` is full; neither EOS, nor a stop id, nor a token that touches a stop string is returned.
        `temperature=0` takes the likeliest token. The same `seed` gives the same ids. Log-probabilities are natural,
        under the model's own distribution; `echo=True` puts the prompt in front, its first token with 0.0. The class
        `Sampling` in `llama.sampling` explains all options.

        Raises `ValueError` for arguments out of range and prompts that do not fit, `RuntimeError` if the model
        computes numbers that are not finite.
        """
        options = Sampling(temperature, top_p, max_gen_len, logprobs, echo, **options)
        prompt_tokens, options = self.agree(prompt_tokens, options)
        rows = self.complete(prompt_tokens, options)
        ids = [row.ids for row in rows]
        return ids, [row.logprobs for row in rows] if options.logprobs else None

    @takes_options
    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> list[CompletionPrediction]:
        """Continue each text.

        The class `Sampling` in `llama.sampling` explains the options. Errors as for `generate`.
        """
        options = Sampling(temperature, top_p, max_gen_len, logprobs, echo, **options)
        texts, options = self.agree(prompts, options)
        rows = self.complete(self.encode_texts(texts), options)
        return [prediction(self.tokenizer, row, row.text) for row in rows]

    @takes_options
    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        continue_final: bool = False,
        **options: Any,
    ) -> list[ChatPrediction]:
        """Answer the last message of each dialog; with `continue_final`, continue that message instead.

        Options and other errors as for `generate`. A dialog in which a message holds a special tag is refused before
        anything is computed. Raises `ValueError` for roles out of order, naming dialog and message.
        """
        options = Sampling(temperature, top_p, max_gen_len, logprobs, False, **options)
        dialogs, options = self.agree(dialogs, options)
        rows = self.dialog_rows(dialogs, options, continue_final)
        self.finish(rows)

        answers = []
        for row in rows:
            answer = prediction(self.tokenizer, row, {"role": "assistant", "content": row.text})
            if row.finish_reason == "refused":
                message, tag = prompts.find_special_tag(dialogs[row.index // options.n])
                answer["refusal"] = f"Message {message} holds the special tag {tag}."
            answers.append(answer)
        return answers

    @takes_options
    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        **options: Any,
    ) -> list[CompletionPrediction]:
        """Write what belongs between each prefix and its suffix. Arguments and errors as for `generate`.

        EOT ends a row, with `finish_reason` "stop". `suffix_first` puts the suffix before the prefix in the prompt,
        another order that the models were trained on. Raises `ValueError` for a model that is not made for infilling.
        """
        options = Sampling(temperature, top_p, max_gen_len, logprobs, False, **options)
        (prefixes, suffixes), options = self.agree((prefixes, suffixes), options)
        if isinstance(prefixes, str) or isinstance(suffixes, str) or len(prefixes) != len(suffixes):
            raise ValueError("Prefixes and suffixes must be two lists of strings, of equal length.")

        pairs = list(zip(prefixes, suffixes, strict=True))
        holes = [prompts.encode_infilling(self.tokenizer, *pair, suffix_first) for pair in pairs]
        if holes:
            options = dataclasses.replace(options, stop=(*options.stop, self.tokenizer.eot_id))
        rows = self.make_rows(holes, options, inside=range(len(holes)))
        self.finish(rows)

        predictions = []
        for row in rows:
            prefix, suffix = pairs[row.index // options.n]
            filled = {"full_text": prefix + row.text + suffix}
            predictions.append(prediction(self.tokenizer, row, row.text) | filled)
        return predictions

    @takes_options
    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> Iterator[Piece]:
        """Yield what becomes certain of each row, as `(row, ids, text, logprobs, finish_reason)`.

        Joined by row, the pieces are what `generate` and `text_completion` return: characters are whole, and what may
        begin a stop string waits. Arguments and errors as for `generate`; errors of arguments are raised by the call
        itself, before the first piece. A stream that is closed, or to which nobody refers any more, frees its rows.
        """
        options = Sampling(temperature, top_p, max_gen_len, logprobs, echo, **options)
        prompt_tokens, options = self.agree(prompt_tokens, options)
        return self.pieces(self.make_rows(prompt_tokens, options))

    @takes_options
    def stream_chat(
        self,
        dialogs: Sequence[Dialog],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        *,
        continue_final: bool = False,
        **options: Any,
    ) -> Iterator[Piece]:
        """Yield the answers of `chat_completion` piece by piece, as `stream` does.

        A refused dialog is a single piece: `text` is the refusal, `finish_reason` is "refused".
        """
        options = Sampling(temperature, top_p, max_gen_len, logprobs, False, **options)
        dialogs, options = self.agree(dialogs, options)
        return self.pieces(self.dialog_rows(dialogs, options, continue_final))

    def score(self, texts: Sequence[str]) -> list[Score]:
        """The log-probability of each token of each text, BOS first with 0.0; nothing is generated."""
        options = Sampling(temperature=0, top_p=1, max_gen_len=0, logprobs=True, echo=True)
        texts, options = self.agree(texts, options)
        rows = self.complete(self.encode_texts(texts), options)
        return [score(self.tokenizer, row) for row in rows]

    # --- from arguments to rows ---

    def agree(self, wanted: Value, options: Sampling) -> tuple[Value, Sampling]:
        """Check this rank's options; return what the first rank was asked for, with the first rank's options.

        A `logits_processor` stays on the first rank, where ids are chosen.
        """
        self.engine.check_thread()
        options = options.checked()
        sent = (wanted, dataclasses.replace(options, logits_processor=None))
        wanted, agreed = parallel.broadcast_object(sent, self.device)
        if parallel.rank() == 0:
            agreed = options
        return wanted, agreed

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        found = "one string" if isinstance(texts, str) else type(texts).__name__
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"Texts must come as a list of strings, not as {found}.")
        return [self.tokenizer.encode(text, bos=True, eos=False) for text in texts]

    def make_rows(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sampling,
        indices: Sequence[int] | None = None,
        inside: Collection[int] = (),
    ) -> list[Row]:
        """Make `n` rows for each prompt: completion j of prompt i is row i n + j.

        The number i of a prompt is its place in `prompts`, or its entry in `indices`. `inside` are the numbers of the
        prompts whose continuation goes on inside a text, so that a space at its beginning counts. Raises `ValueError`
        for a prompt that does not fit, or a bias of an id that there is not.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            kind = type(prompts).__name__
            found = "a string; encode it first" if kind == "str" else kind
            raise ValueError(f"Prompts must come as a list of lists of token ids, not as {found}.")
        indices = range(len(prompts)) if indices is None else indices
        for index, prompt in zip(indices, prompts, strict=True):
            check_prompt(index, prompt, self.model.vocab_size, self.model.params.max_seq_len)

        highest = max(options.logit_bias or [0])
        if highest >= self.tokenizer.n_words:
            last = self.tokenizer.n_words - 1
            raise ValueError(f"logit_bias holds {highest}; ids go from 0 to {last}.")

        seed = self.next_seed(options)
        rows = []
        for prompt_index, prompt in zip(indices, prompts, strict=True):
            room = self.model.params.max_seq_len - len(prompt)
            for index in range(prompt_index * options.n, (prompt_index + 1) * options.n):
                row = Row(prompt, options, self.tokenizer, index=index, room=room)
                row.decoder.begun = prompt_index in inside
                if options.temperature > 0:
                    row.uniforms = uniforms(seed, index, row.budget)
                rows.append(row)
        return rows

    def next_seed(self, options: Sampling) -> int:
        """The seed of a call: the one that was given, else the next of this instance's sequence, equal on all ranks.

        Temperature 0 needs no seed, and takes none from the sequence.
        """
        if options.seed is not None or options.temperature == 0:
            return options.seed or 0
        with self.drawing:
            drawn = self.seeds.getrandbits(63) + parallel.group()
        return parallel.broadcast_object(drawn, self.device)

    def dialog_rows(
        self, dialogs: Sequence[Dialog], options: Sampling, continue_final: bool
    ) -> list[Row]:
        """`n` rows for each dialog in order; those of a dialog that holds a special tag have ended already."""
        prompts.check_dialogs(dialogs, continue_final=continue_final)
        refused = []
        accepted = []
        begun = []  # answers that go on inside a text
        for index, dialog in enumerate(dialogs):
            tagged = prompts.find_special_tag(dialog) is not None
            (refused if tagged else accepted).append(index)
            if continue_final and dialog[-1]["content"].strip():
                begun.append(index)

        encoded = []
        for index in accepted:
            ids = prompts.encode_dialog(
                self.tokenizer, dialogs[index], continue_final=continue_final
            )
            encoded.append(ids)

        rows = self.make_rows(encoded, options, accepted, begun)
        for prompt_index in refused:
            for index in range(prompt_index * options.n, (prompt_index + 1) * options.n):
                row = Row([], options, self.tokenizer, index=index, room=0)
                row.refuse(UNSAFE_ERROR)
                rows.append(row)
        return sorted(rows, key=lambda row: row.index)

    # --- from rows to results ---

    def complete(self, prompts: Sequence[Sequence[int]], options: Sampling) -> list[Row]:
        """Make rows for the prompts, and run them to their end."""
        rows = self.make_rows(prompts, options)
        self.finish(rows)
        return rows

    def finish(self, rows: Sequence[Row]) -> None:
        """Run rows to their end, and show on a terminal how far they are if that takes long."""
        progress = Progress(shown=parallel.world()[0] == 0)
        self.engine.submit(rows)
        try:
            for _ in self.engine.follow(rows):
                if progress.due():  # to count is work where thousands of rows wait
                    done = sum(row.ended for row in rows)
                    speed = sum(len(row.generated) for row in rows) / progress.seconds
                    progress.show(f"llama: {done} of {len(rows)} rows done, {speed:.1f} tokens/s")
                for row in rows:
                    row.pieces.clear()
        finally:
            self.engine.cancel(rows)
            progress.close()

    def pieces(self, rows: Sequence[Row]) -> Iterator[Piece]:
        """Submit rows, and give out their pieces as they come."""
        self.engine.submit(rows)

        def give_out() -> Iterator[Piece]:
            try:
                yield  # `next` below runs to here: so closing a stream of which nothing was read frees its rows too
                for _ in self.engine.follow(rows):
                    for row in rows:
                        while row.pieces:
                            yield row.pieces.popleft()
            finally:
                self.engine.cancel(rows)

        stream = give_out()
        next(stream)
        return stream
