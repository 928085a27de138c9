"""What an error that a user meets should look like."""

import pytest


def refusal(call, *words: str, error: type[Exception] = ValueError) -> str:
    """The message of the error that `call` raises: one line, a whole sentence, with `words`, no other error shown."""
    with pytest.raises(error) as caught:
        call()
    raised, message = caught.value, str(caught.value)
    assert type(raised) is error, f"a subclass: {type(raised)}"
    assert raised.__cause__ is None
    assert raised.__context__ is None or raised.__suppress_context__, "the inner error would be printed too"
    assert "\n" not in message and message.endswith("."), message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message
