"""Dialogs and texts with a hole to token ids, in the forms Llama 2's chat models and Code Llama were trained on.

One exchange is a user turn with its answer. Each is encoded on its own, so special ids stand exactly here:

    BOS [INST] <<SYS>>
    system
    <</SYS>>

    first question [/INST] first answer EOS BOS [INST] second question [/INST]

The tags are ordinary text; only BOS and EOS are ids. Encoding the joined text in one piece would give other ids. The
last exchange may go on with the beginning of its answer, which the model then continues.

A text with a hole becomes one sequence of its parts, each behind an id that says which it is; the middle follows:

    BOS <PRE> prefix <SUF> suffix <MID>        prefix-suffix-middle
    BOS <PRE> <SUF> suffix <MID> prefix        suffix-prefix-middle, "suffix first"

Sources: Llama 2, arXiv:2307.09288, sections 3.3 and A.3; Code Llama, arXiv:2308.12950, section 2.3. This module knows
nothing of torch or the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from llama.tokenizer import INFILLING_PIECES, Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def check_dialogs(dialogs: Sequence[Dialog], *, continue_final: bool = False) -> None:
    """Raise `ValueError` unless `dialogs` is a list of dialogs, each as `check_dialog` wants it."""
    if isinstance(dialogs, str | Mapping) or not isinstance(dialogs, Sequence):
        raise ValueError(f"Dialogs must come as a list of dialogs, not {type(dialogs).__name__}.")
    if dialogs and isinstance(dialogs[0], Mapping):
        raise ValueError("Dialogs must come as a list of dialogs, not as one list of messages; write [dialog].")

    for index, dialog in enumerate(dialogs):
        check_dialog(dialog, f"Dialog {index}", continue_final=continue_final)


def check_dialog(dialog: Dialog, name: str = "The dialog", *, continue_final: bool = False) -> None:
    """Raise `ValueError`, naming the message and both roles, unless roles are system?, user, assistant, ..., user.

    With `continue_final` the last role is the assistant's.
    """
    if isinstance(dialog, str | Mapping) or not isinstance(dialog, Sequence):
        raise ValueError(f"{name} must be a list of messages, not {type(dialog).__name__}.")
    if not dialog:
        raise ValueError(f"{name} is empty; it must hold at least one user message.")
    for index, message in enumerate(dialog):
        check_message(message, f"{name}, message {index}")

    # After the system's message, if there is one, user and assistant take turns.
    first_user = 1 if dialog[0]["role"] == "system" else 0
    for index in range(first_user, len(dialog)):
        expected = "assistant" if (index - first_user) % 2 else "user"
        found = dialog[index]["role"]
        if found != expected:
            raise ValueError(f"{name}, message {index}: expected role {expected!r}, got {found!r}.")

    wanted = "assistant" if continue_final else "user"
    last = dialog[-1]["role"]
    if last != wanted:
        place = f"{name}, message {len(dialog) - 1}"
        advice = "; continue_final=True continues its message" if last == "assistant" else ""
        raise ValueError(f"{place}: the last role must be {wanted!r}, got {last!r}{advice}.")


def check_message(message: Message, name: str) -> None:
    """Raise `ValueError` unless the message is a dictionary with a role and a string as its content."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{name}: expected {{'role': ..., 'content': ...}}, got {message!r}.")
    content = message["content"]
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be a string, not {type(content).__name__}.")


def find_special_tag(dialog: Dialog) -> tuple[int, str] | None:
    """(index of the message, tag) of the first special tag in a dialog's content, or None.

    A tag in a message would let its writer end the user's turn or speak as the system.
    """
    for index, message in enumerate(dialog):
        for tag in SPECIAL_TAGS:
            if tag in message["content"]:
                return index, tag
    return None


def format_dialog(dialog: Dialog, *, continue_final: bool = False) -> list[str]:
    """The text of each exchange, as it is encoded: all but the last end in the answer and a space.

    The system text joins the first question before that is stripped, so both keep the spaces between them:

        format_dialog([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}])
        -> ["[INST] <<SYS>>\\nBe brief.\\n<</SYS>>\\n\\nHi! [/INST]"]

    With `continue_final` the last exchange ends in the beginning of its answer, without a space.
    """
    check_dialog(dialog, continue_final=continue_final)
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents = [B_SYS + contents[0] + E_SYS + contents[1], *contents[2:]]
    questions = [f"{B_INST} {question.strip()} {E_INST}" for question in contents[0::2]]
    answers = [answer.strip() for answer in contents[1::2]]

    # An empty beginning is no beginning: the space before an answer belongs to its first word.
    last = questions.pop()
    beginning = answers.pop() if continue_final else ""
    if beginning:
        last = f"{last} {beginning}"

    finished = [f"{question} {answer} " for question, answer in zip(questions, answers, strict=True)]
    return [*finished, last]


def encode_dialog(tokenizer: Tokenizer, dialog: Dialog, *, continue_final: bool = False) -> list[int]:
    """The prompt of a chat model: every exchange between BOS and EOS, the last one without EOS.

    With `continue_final` the dialog's last message is the beginning of an answer, which the model is to continue.
    Space around it is dropped, as around every answer. The ids are then the first ids of the finished exchange, if
    one of its tokens ends where the beginning ends. That is so between words; a beginning such as "The kitc" may be
    written in other tokens than "The kitchen", and the model continues from those.

    Raises `ValueError` for roles out of order. Does not look for special tags: `find_special_tag` does.
    """
    *finished, last = format_dialog(dialog, continue_final=continue_final)

    ids = []
    for exchange in finished:
        ids += tokenizer.encode(exchange, bos=True, eos=True)
    return ids + tokenizer.encode(last, bos=True, eos=False)


def encode_infilling(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
    """The prompt whose continuation, up to EOT, belongs between `prefix` and `suffix`.

    The prefix begins the text, so like any text it has an implied space before its first word; the suffix goes on
    inside a word or line, so it has none. Raises `ValueError` for a tokenizer without the infilling pieces.
    """
    pre, suf, mid = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id
    if None in (pre, suf, mid, tokenizer.eot_id):
        pieces = ", ".join(INFILLING_PIECES)
        fitting = "Code Llama 7B or 13B, base or Instruct, and its tokenizer"
        raise ValueError(f"This tokenizer lacks the pieces for infilling ({pieces}); use {fitting}.")

    before = tokenizer.encode(prefix, bos=False, eos=False)
    after = tokenizer.encode(suffix, bos=False, eos=False, inner=True)
    if suffix_first:
        return [tokenizer.bos_id, pre, suf, *after, mid, *before]
    return [tokenizer.bos_id, pre, *before, suf, *after, mid]
