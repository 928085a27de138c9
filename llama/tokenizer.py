"""Text to token ids and back, with the sentencepiece model that comes with a checkpoint.

This module knows nothing of chat formats (`llama.prompts` does) nor of torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.formats.recognise import refuse

INFILLING_PIECES = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")
MARK = "\ue000"  # a private character, in no vocabulary: no piece joins it to the text behind it


class Tokenizer:
    """Sentencepiece byte-pair encoding as Llama 2 uses it.

    `n_words` is the size of the vocabulary; `bos_id`, `eos_id` and `pad_id` are its special ids (`pad_id` is -1:
    Llama has no padding token). Code Llama's `prefix_id`, `suffix_id`, `middle_id` and `eot_id` frame a text with a
    hole; each is None where the vocabulary has no such piece. `sp_model` is the sentencepiece processor itself.
    """

    def __init__(self, model_path: str | Path):
        """Load `tokenizer.model`. Raises `FileNotFoundError`, or `ValueError` for a file that is something else."""
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(f"No tokenizer at {path}; give tokenizer_path, the checkpoint's tokenizer.model.")
        refuse(path, "a sentencepiece model", "fetch the checkpoint's tokenizer.model")
        try:
            self.sp_model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is not a sentencepiece model, or is damaged; fetch it again.") from None
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        self.prefix_id, self.suffix_id, self.middle_id, self.eot_id = map(self.find_piece, INFILLING_PIECES)

    def find_piece(self, piece: str) -> int | None:
        id = self.sp_model.piece_to_id(piece)  # of a piece that is not there, the unknown id
        return id if self.sp_model.id_to_piece(id) == piece else None

    def encode(self, s: str, bos: bool, eos: bool, *, inner: bool = False) -> list[int]:
        """Ids of `s`, with the ids of beginning and end of sequence around them where asked.

        Text never becomes a special id: "<s>" is three characters like any other, "<PRE>" is five. A space before the
        first word is implied, unless `inner` says that the text goes on inside another.
        """
        if not isinstance(s, str):
            raise ValueError(f"Text to encode must be a string, not {type(s).__name__}.")
        sp = self.sp_model
        ids = sp.encode(MARK + s)[len(sp.encode(MARK)) :] if inner else sp.encode(s)
        return [self.bos_id] * bos + self.spell(ids) + [self.eos_id] * eos

    def spell(self, ids: list[int]) -> list[int]:
        """The ids with those of infilling pieces, which some vocabularies find in ordinary text, as characters."""
        special = {self.prefix_id, self.suffix_id, self.middle_id, self.eot_id}
        if special.isdisjoint(ids):
            return ids
        spelled = []
        for id in ids:
            text = self.sp_model.id_to_piece(id).replace("\u2581", " ")
            halves = (text[:-1], text[-1]) if id in special else ()  # neither contains the piece
            spelled += [part for half in halves for part in self.encode(half, False, False, inner=True)] or [id]
        return spelled

    def decode(self, ids: int | Iterable[int]) -> str:
        """The text of the ids: special ids have none, bytes that form no UTF-8 character become U+FFFD."""
        ids = [ids] if isinstance(ids, int) else [int(id) for id in ids]
        for id in ids:
            if not 0 <= id < self.n_words:
                raise ValueError(f"Token id {id} is outside the vocabulary of {self.n_words}.")
        return self.sp_model.decode(ids) if ids else ""


class IncrementalDecoder:
    """Text as it comes, id by id, in whole characters: all of `feed` and `flush` joined equal one `decode`.

    Two things make decoding ids one by one differ from decoding them together. The space that stands for "a word
    begins" is dropped at the start of a text, and only there. And a character outside the vocabulary is spelled in
    byte tokens, so it exists only once its last byte has come:

        feed(id of <0xF0>) -> ""   feed(<0x9F>) -> ""   feed(<0x98>) -> ""   feed(<0x80>) -> "😀"

    Text that goes on inside another has `begun` before its first id.
    """

    def __init__(self, tokenizer: Tokenizer, begun: bool = False):
        self.sp_model = tokenizer.sp_model
        self.begun = begun  # whether a piece with text has come, so that a leading space counts
        self.bytes = b""  # the bytes of a character that is not complete

    def feed(self, id: int) -> str:
        """The characters that this id completes."""
        if self.sp_model.is_byte(id):
            self.begun = True
            self.bytes += bytes([int(self.sp_model.id_to_piece(id)[1:-1], 16)])
            return self.take_complete()
        if self.sp_model.is_control(id):
            return self.flush()
        return self.flush() + self.text_of(id)

    def text_of(self, id: int) -> str:
        first, self.begun = not self.begun, True
        if first or self.sp_model.is_unknown(id):
            return self.sp_model.decode([id])
        return self.sp_model.id_to_piece(id).replace("\u2581", " ")

    def take_complete(self) -> str:
        """Cut complete characters off the front of `bytes`; a byte that can begin none becomes U+FFFD."""
        text = ""
        while self.bytes:
            try:
                whole, self.bytes = self.bytes.decode(), b""
                return text + whole
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and error.start == 0:
                    return text
                text += self.bytes[: error.start].decode() + "\ufffd"
                self.bytes = self.bytes[error.start + 1 :]
        return text

    def flush(self) -> str:
        """Give up waiting for the rest of a character: each byte held becomes U+FFFD."""
        held, self.bytes = self.bytes, b""
        return "\ufffd" * len(held)
