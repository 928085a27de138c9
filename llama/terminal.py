"""Lines from a terminal: editing, history, pastes of several lines, and Ctrl-C.

A process alone gets Ctrl-C as Python's KeyboardInterrupt. `torchrun` starts its ranks in sessions of their own, where
the key's signal reaches torchrun alone and would end the job; so there the terminal is told to send ^C as a character.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

from llama.parallel import world

try:
    import readline
    import termios
except ImportError:  # Windows
    readline = termios = None

CTRL_C = "\x03"


class Terminal:
    """The terminal of the first rank, or whatever its standard input is; other ranks have none."""

    def __init__(self):
        first, several = world()[0] == 0, world()[1] > 1
        self.is_terminal = first and sys.stdin.isatty()
        self.shared = several and self.is_terminal and termios is not None
        self.echoes = first and not sys.stdin.isatty()

    def __enter__(self) -> Terminal:
        if self.is_terminal and readline is not None:
            readline.parse_and_bind("set enable-bracketed-paste on")
        if self.shared:
            self.before = termios.tcgetattr(sys.stdin)
            self.set_keys()
            if readline is not None:  # typed: empty the line, put ^C there, accept it
                readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-v\C-c\C-m"')
        return self

    def __exit__(self, *error: object) -> None:
        if self.shared:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.before)

    def set_keys(self, off: int = 0) -> None:
        """Let the terminal work as before, but with ^C as any other character, and without the local flags in `off`.

        readline would set the flag for signals again; which key is the signal's it leaves alone.
        """
        changed = [*self.before]
        changed[3] &= ~off
        changed[6] = [*changed[6]]
        changed[6][termios.VINTR] = b"\0"
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)

    def read(self, prompt: str) -> str | None:
        """The next line or paste; None at the end of input or after Ctrl-C twice."""
        cut_before = False
        while True:
            print(file=sys.stdout)
            try:
                line = input(prompt)
                cut = CTRL_C in line and self.shared
            except EOFError:
                print(file=sys.stdout)
                return None
            except KeyboardInterrupt:
                cut = True
                print(file=sys.stdout)
            if not cut:
                if self.echoes:
                    print(line, file=sys.stdout)
                return line
            if cut_before:
                return None
            cut_before = True
            print("(Ctrl-C again leaves, as do Ctrl-D and /exit.)", file=sys.stdout)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, `cut` sees a Ctrl-C at once, without Enter; what else is typed is dropped."""
        if not self.shared:
            yield
            return
        self.set_keys(termios.ICANON | termios.ECHO)
        try:
            yield
        finally:
            self.set_keys()

    def cut(self) -> bool:
        """Whether Ctrl-C came as a character since the last time."""
        if not self.shared or not select.select([sys.stdin], [], [], 0)[0]:
            return False
        return CTRL_C.encode() in os.read(sys.stdin.fileno(), 4096)
