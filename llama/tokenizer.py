"""Text to token ids and back, with the sentencepiece model that comes with a checkpoint.

This module knows nothing of chat formats (`llama.prompts` does) nor of torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.formats.recognise import refuse

PREFIX, SUFFIX, MIDDLE, EOT = INFILLING_PIECES = (
    "\u2581<PRE>",
    "\u2581<SUF>",
    "\u2581<MID>",
    "\u2581<EOT>",
)
MARK = "\ue000"  # a private character, in no vocabulary: no piece joins it to the text behind it


def check_text(text: object) -> None:
    """Raise `ValueError` for what is not a string, or holds half of a character.

    A string may hold half of an emoji, a lone surrogate, where the text was cut in a system that counts in UTF-16.
    """
    if not isinstance(text, str):
        raise ValueError(f"Text to encode must be a string, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        advice = "remove it, or cut the text elsewhere"
        raise ValueError(
            f"Text to encode holds {half!r} at index {error.start}, half of a character (a lone surrogate); {advice}."
        ) from None


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
            raise FileNotFoundError(
                f"No tokenizer at {path}; give tokenizer_path, the checkpoint's tokenizer.model."
            )
        refuse(path, "a sentencepiece model", "fetch the checkpoint's tokenizer.model")
        try:
            self.sp_model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(
                f"{path} is not a sentencepiece model, or is damaged; fetch it again."
            ) from None
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        self.prefix_id = self.find_piece(PREFIX)
        self.suffix_id = self.find_piece(SUFFIX)
        self.middle_id = self.find_piece(MIDDLE)
        self.eot_id = self.find_piece(EOT)

    def find_piece(self, piece: str) -> int | None:
        """The id of a piece, None if the vocabulary lacks it."""
        id = self.sp_model.piece_to_id(piece)  # the id of "unknown", where there is no such piece
        return id if self.sp_model.id_to_piece(id) == piece else None

    def encode(self, s: str, bos: bool, eos: bool, *, inner: bool = False) -> list[int]:
        """Ids of `s`, with the ids of beginning and end of sequence around them where asked.

        Text never becomes a special id: "<s>" is three characters like any other, "<PRE>" is five. A space before the
        first word is implied, unless `inner` says that the text goes on inside another. Raises `ValueError` for
        anything but a string of whole characters.
        """
        check_text(s)
        if inner:
            marked = self.sp_model.encode(MARK + s)
            ids = marked[len(self.sp_model.encode(MARK)) :]
        else:
            ids = self.sp_model.encode(s)

        before = [self.bos_id] if bos else []
        after = [self.eos_id] if eos else []
        return before + self.spell(ids) + after

    def spell(self, ids: list[int]) -> list[int]:
        """The ids, but where an infilling piece was found in ordinary text, the ids of its characters instead.

        Code Llama's vocabulary is one in which sentencepiece finds them. Half of a piece is not that piece.
        """
        special = {self.prefix_id, self.suffix_id, self.middle_id, self.eot_id}
        if special.isdisjoint(ids):
            return ids

        spelled = []
        for id in ids:
            if id not in special:
                spelled.append(id)
                continue
            text = self.sp_model.id_to_piece(id).replace("\u2581", " ")
            spelled += self.encode(text[:-1], bos=False, eos=False, inner=True)
            spelled += self.encode(text[-1], bos=False, eos=False, inner=True)
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
        self.n_words = tokenizer.n_words
        self.begun = begun  # whether a piece with text has come; from then on a space at a piece's front is text
        self.bytes = b""  # the bytes of a character that is not complete

    def feed(self, id: int) -> str:
        """The characters that this id completes; U+FFFD for an id that only the model knows."""
        if id >= self.n_words:
            self.begun = True
            return self.flush() + "\ufffd"
        if self.sp_model.is_byte(id):
            self.begun = True
            self.bytes += bytes.fromhex(self.sp_model.id_to_piece(id)[3:-1])  # of "<0x0A>"
            return self.take_complete()
        if self.sp_model.is_control(id):
            return self.flush()
        return self.flush() + self.text_of(id)

    def text_of(self, id: int) -> str:
        """The text of a piece that is no byte, without the space at its front if no piece came before."""
        first = not self.begun
        self.begun = True
        if first or self.sp_model.is_unknown(id):
            return self.sp_model.decode([id])
        return self.sp_model.id_to_piece(id).replace("\u2581", " ")

    def take_complete(self) -> str:
        """Cut complete characters off the front of `bytes`; a byte that can begin none becomes U+FFFD."""
        text = ""
        while self.bytes:
            try:
                text += self.bytes.decode()
                self.bytes = b""

            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and error.start == 0:
                    break  # the rest of the character may still come
                text += self.bytes[: error.start].decode() + "\ufffd"
                self.bytes = self.bytes[error.start + 1 :]
        return text

    def flush(self) -> str:
        """Give up waiting for the rest of a character: each byte held becomes U+FFFD."""
        count = len(self.bytes)
        self.bytes = b""
        return "\ufffd" * count
