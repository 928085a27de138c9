"""How far long work has come: one line on standard error, where that is a terminal, from the third second on."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line that is written again and again over itself; `shown` is false on all ranks but the first."""

    def __init__(self, shown: bool = True, after: float = 2.0):
        self.shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self.started = time.perf_counter()
        self.next = self.started + after
        self.width = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def due(self) -> bool:
        """Whether the line would be written now."""
        return self.shown and time.perf_counter() >= self.next

    def show(self, text: str) -> None:
        """Write the line, at most four times a second."""
        if not self.due():
            return
        self.next = time.perf_counter() + 0.25
        print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)
        self.width = len(text)

    def close(self) -> None:
        """Wipe the line, so that what is printed next begins on a clean one."""
        if self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)
            self.width = 0
