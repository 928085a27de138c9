"""A step that torch compiles: the model's forward pass for one token of some rows.

This module knows nothing of tokens, sampling, or which rows sit where.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llama import parallel
from llama.cache import Window
from llama.model import Transformer

MODES = {"default": "default", "cudagraph": "reduce-overhead"}  # our names, torch's names
VARIANTS = 10_000  # torch gives up after 8 shapes; here there are a few for each number of rows, and all are wanted


def check_mode(mode: str | None) -> None:
    """Raise `ValueError` unless it is None or a way to compile."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"compile is {mode!r}; it must be None or one of {', '.join(MODES)}.")


def compiled_step(model: Transformer, mode: str) -> Callable[[Tensor, Tensor, Window], Tensor]:
    """A function of ids (B, 1), positions (B,) and their window of the cache, to logits (B, 1, V).

    torch compiles it anew for each number of rows and of positions, at the first call with them, and says on standard
    error what that costs. Mode "cudagraph" launches a step as one CUDA graph, and is "default" where there is no CUDA.
    Raises `ValueError` for another mode, and the call `RuntimeError` where nothing can be compiled.
    """
    check_mode(mode)
    compiled: set[tuple[int, int]] = set()

    @torch.compile(mode=MODES[mode], fullgraph=True, dynamic=False)
    def forward(tokens: Tensor, positions: Tensor, window: Window) -> Tensor:
        return model(tokens, positions=positions, cache=window)

    def step(tokens: Tensor, positions: Tensor, window: Window) -> Tensor:
        if mode == "cudagraph":  # keys are written in place, so a graph has to know where they stay
            for tensor in (*window.keys, *window.values):
                torch._dynamo.mark_static_address(tensor)

        shape = (len(tokens), window.keys[0].shape[2])
        if shape in compiled:
            return forward(tokens, positions, window)

        shown = parallel.world()[0] == 0
        rows, length = shape
        what = f"a step of {rows} row{'s' * (rows > 1)} and {length} positions"
        if shown:
            print(f"llama: compiling {what} ...", file=sys.stderr)

        started = time.perf_counter()
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            try:
                logits = forward(tokens, positions, window)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0]
                advice = "leave compile out"
                raise RuntimeError(
                    f"torch cannot compile the model here ({reason}); {advice}."
                ) from None

        if shown:
            print(
                f"llama: compiled {what} in {time.perf_counter() - started:.1f} s", file=sys.stderr
            )
        compiled.add(shape)
        return logits

    return step
