"""Keyword arguments that all calls share, written once: as fields of `Sampling`.

A call is declared with `**options`. `takes_options` gives it the whole signature, so that `help()`, notebooks and
`typing.get_type_hints` show every keyword. A keyword that does not exist is refused with the one to write instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from llama.sampling import Sampling

Call = TypeVar("Call", bound=Callable)

# The options that the Llama 2 release has too. A call names those that it takes, in its own order.
RELEASE = ("temperature", "top_p", "max_gen_len", "logprobs", "echo")

# Keywords of other libraries, and what to write here in their place.
ELSEWHERE = {
    "max_new_tokens": "max_gen_len",
    "max_tokens": "max_gen_len",
    "max_length": "max_gen_len, which counts the new tokens alone",
    "num_return_sequences": "n",
    "do_sample": "temperature: 0 takes the likeliest token, more samples",
    "repetition_penalty": "presence_penalty or frequency_penalty, which are subtracted from logits",
    "stop_strings": "stop",
    "eos_token_id": "stop, which takes ids too",
    "stream": "the method stream, or stream_chat for dialogs",
}


def takes_options(call: Call) -> Call:
    """Give a method with `**options` a keyword for each field of `Sampling` that the Llama 2 release does not have."""
    hints = typing.get_type_hints(Sampling)
    plain = inspect.signature(call)
    own = [p for p in plain.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    shared = []
    for field in dataclasses.fields(Sampling):
        if field.name not in RELEASE:
            keyword = inspect.Parameter.KEYWORD_ONLY
            shared.append(
                inspect.Parameter(
                    field.name, keyword, default=field.default, annotation=hints[field.name]
                )
            )
    known = [p.name for p in (*own, *shared) if p.name != "self"]

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{call.__name__}() has no argument {name!r}; {instead(name, known)}."
                )
        return call(*args, **kwargs)

    checked.__signature__ = plain.replace(parameters=[*own, *shared])
    checked.__annotations__ = call.__annotations__ | {p.name: p.annotation for p in shared}
    checked.__annotations__.pop("options", None)
    return checked


def instead(name: str, known: list[str]) -> str:
    """What to write in the place of a keyword that does not exist."""
    if name in ELSEWHERE:
        return f"here it is {ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}"
    return f"it takes {', '.join(known)}"
