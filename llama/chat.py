"""A conversation in a terminal: questions in, answers as they come, and a few commands.

This module knows of the model only that it streams. With several ranks, the first reads the terminal and the others
follow.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama.cli import show
from llama.generation import Llama
from llama.parallel import broadcast_object, world
from llama.prompts import UNSAFE_ERROR, Message, encode_dialog, find_special_tag
from llama.terminal import Terminal


class Conversation:
    """What was said so far, and how the model is to go on. The model's cache keeps what a turn shares with the next."""

    def __init__(self, llama: Llama, name: str, system: str | None, options: Mapping[str, object]):
        self.llama = llama
        self.name = name
        self.system = system
        if system is not None and (
            tag := find_special_tag([{"role": "system", "content": system}])
        ):
            raise ValueError(f"The system text holds {tag[1]!r}, a special tag; write it without.")
        self.options = options
        self.exchanges: list[Message] = []  # question, answer, question, answer, ...
        self.going = True

    def hold(self, questions: Sequence[str] = ()) -> None:
        """Answer `questions`, then what is typed, until the input ends or /exit."""
        weight = self.llama.model.norm.weight
        about = f"{self.name}, {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        if world()[0] == 0:
            print(
                f"llama: {about}. Ctrl-C cuts an answer, Ctrl-D leaves, /help tells more.",
                file=sys.stderr,
            )

        with Terminal() as self.terminal:
            for question in questions:
                show(f"\n> User: {question}")
                self.turn(question)
            while self.going:
                line = self.terminal.read("> User: ") if world()[0] == 0 else None
                line = broadcast_object(line, self.llama.device)
                if line is None:
                    return
                self.turn(line)

    def turn(self, line: str) -> None:
        """Follow a command or answer a question; Ctrl-C ends either, unless other ranks would go on without this."""
        try:
            command, _, rest = line.strip().partition(" ")
            if re.fullmatch(r"/[a-z]+", command):
                self.follow(command, rest.strip())
            elif line.strip():
                self.ask(line)
        except KeyboardInterrupt:
            if world()[1] > 1:
                raise
            show("(interrupted)")

    # --- commands ------------------------------------------------------------------------------------------------

    def follow(self, command: str, rest: str) -> None:
        """Run the method `on_...` of a command; its docstring is what /help says of it."""
        method = getattr(self, f"on_{command[1:]}", None)
        if method is None:
            show(f"(There is no {command}; /help lists the commands.)")
        else:
            method(rest)

    def on_help(self, rest: str) -> None:
        """/help: these lines."""
        methods = [getattr(type(self), name) for name in vars(type(self)) if name.startswith("on_")]
        show("\n".join(inspect.getdoc(method) for method in methods))
        show(
            "Ctrl-C cuts an answer; twice at the prompt, it leaves. A paste of several lines is one question."
        )

    def on_system(self, rest: str) -> None:
        """/system TEXT: how the model is to answer from now on; without TEXT, as it likes."""
        if tag := find_special_tag([{"role": "system", "content": rest}]):
            show(f"({UNSAFE_ERROR} {tag[1]})")
            return
        self.system = rest or None
        show(f"(System: {rest})" if rest else "(No system text.)")

    def on_reset(self, rest: str) -> None:
        """/reset: forget what was said; the system text stays."""
        self.exchanges = []
        show("(Forgotten.)")

    def on_retry(self, rest: str) -> None:
        """/retry: answer the last question again."""
        if not self.exchanges:
            show("(There is no question yet.)")
            return
        *self.exchanges, question, _ = self.exchanges
        self.ask(question["content"])

    def on_save(self, rest: str) -> None:
        """/save FILE: write the conversation into a new file, as the JSON of a dialog."""
        if world()[0] != 0:
            return
        try:
            with open(Path(rest).expanduser(), "x", encoding="utf-8") as file:
                json.dump([*self.beginning(), *self.exchanges], file, ensure_ascii=False, indent=2)
            show(f"(Written to {rest}.)")
        except OSError as error:
            show(
                f"(Not written: {error.strerror or error}.)" if rest else "(Say where: /save FILE.)"
            )

    def on_exit(self, rest: str) -> None:
        """/exit: leave, as does Ctrl-D."""
        self.going = False

    # --- questions -----------------------------------------------------------------------------------------------

    def beginning(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> None:
        """Answer a question and remember both, unless it is refused, too long, or cut before a word came."""
        question = {"role": "user", "content": text}
        if tag := find_special_tag([question]):
            show(f"{UNSAFE_ERROR} ({tag[1]})")
            return
        kept = self.trim(question)
        if kept is None:
            show(
                f"(That is too long for max_seq_len {self.llama.model.params.max_seq_len}; nothing was sent.)"
            )
            return

        forgotten = (len(self.exchanges) - len(kept)) // 2
        if forgotten:
            which = "oldest exchange" if forgotten == 1 else f"{forgotten} oldest exchanges"
            show(f"(The context is full: forgot the {which}.)")
        self.exchanges = kept
        answer = self.answer([*self.beginning(), *kept, question])
        if answer:
            self.exchanges = [*kept, question, {"role": "assistant", "content": answer}]

    def trim(self, question: Message) -> list[Message] | None:
        """The latest exchanges that leave room for an answer, None if the question alone does not."""
        limit = self.llama.model.params.max_seq_len
        room = limit - min(self.options.get("max_gen_len") or limit // 4, limit // 2)
        for first in range(0, len(self.exchanges) + 1, 2):
            dialog = [*self.beginning(), *self.exchanges[first:], question]
            if len(encode_dialog(self.llama.tokenizer, dialog)) <= room:
                return self.exchanges[first:]
        return None

    def answer(self, dialog: list[Message]) -> str:
        """Show the answer as it comes and return it; Ctrl-C keeps what has come so far."""
        text = ""
        cut = False
        show("> Assistant: ", end="")
        try:
            pieces = self.llama.stream(
                [encode_dialog(self.llama.tokenizer, dialog)], **self.options
            )
            with self.terminal.watched():
                for piece in pieces:
                    text += piece.text
                    show(piece.text, end="")
                    cut = broadcast_object(self.terminal.cut(), self.llama.device)
                    if cut:
                        break
        except KeyboardInterrupt:
            if world()[1] > 1:
                raise
            cut = True
        show(" (interrupted)" if cut else "")
        return text.strip()
