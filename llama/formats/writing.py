"""Files of a checkpoint that are being written: their checksums, the bar that moves, the system's own errors."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WRITTEN_AT_ONCE = 2**26  # bytes; the system writes at most 2 GiB in one call


class Bar:
    """How much of all bytes has been written, on standard error; on a terminal it is redrawn at each percent."""

    def __init__(self, total: int):
        self.total = total
        self.written = 0
        self.shown = -1

    def advance(self, count: int) -> None:
        self.written += count
        percent = min(100 * self.written // max(self.total, 1), 100)
        if percent > self.shown and (percent == 100 or sys.stderr.isatty()):
            self.shown = percent
            self.draw(percent)

    def draw(self, percent: int) -> None:
        bar = f"[{'#' * (percent // 4):<25}] {percent:3d}%"
        sizes = f"{self.written / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        end = "" if percent < 100 else "\n"
        print(f"\rllama.convert: {bar}  {sizes}", end=end, file=sys.stderr, flush=True)


class Output:
    """A folder that is being written. It knows the checksum of each file and moves the bar as bytes go out."""

    def __init__(self, folder: Path, bar: Bar):
        self.folder = folder
        self.bar = bar
        self.sums: dict[str, str] = {}

    def create(self, name: str) -> OutputFile:
        return OutputFile(self, name)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with self.create(name) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")

    def copy(self, path: Path, name: str) -> None:
        with self.create(name) as file:
            file.write(path.read_bytes())

    def write_checklist(self) -> None:
        """Write `checklist.chk`, which `md5sum -c` reads."""
        lines = [f"{checksum}  {name}\n" for name, checksum in self.sums.items()]
        (self.folder / "checklist.chk").write_text("".join(lines))


class OutputFile:
    """One file of an `Output`. `error` is why a write failed; torch raises an error of its own in its place."""

    def __init__(self, output: Output, name: str):
        self.output = output
        self.name = name
        self.file = open(output.folder / name, "wb", buffering=0)  # noqa: SIM115
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.md5.update(view)
        try:
            done = 0
            while done < len(view):
                done += self.file.write(view[done : done + WRITTEN_AT_ONCE])
        except OSError as error:
            self.error = error
            raise
        self.output.bar.advance(len(view))
        return len(view)

    def flush(self) -> None:
        """Do nothing: no byte is held back."""

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.file.fileno())
                self.output.sums[self.name] = self.md5.hexdigest()
        finally:
            self.file.close()
        if self.error is not None:
            raise self.error from None
