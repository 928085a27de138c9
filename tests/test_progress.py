"""One line of progress, on a terminal alone, and gone at the end."""

import io

import pytest

from llama import progress
from llama.generation import Llama
from llama.progress import Progress
from support.models import build_model, random_weights

PARAMS = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 480, "multiple_of": 16}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def attach(monkeypatch) -> Terminal:
    """A terminal in the place of standard error; pytest puts its own there between a fixture and its test."""
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    return terminal


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which passes as the test says."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_short_work_shows_nothing(monkeypatch, clock):
    terminal = attach(monkeypatch)
    line = Progress()
    clock[0] += 1.9
    line.show("half")
    line.close()
    assert terminal.getvalue() == ""


def test_a_line_is_written_over_itself_and_wiped(monkeypatch, clock):
    terminal = attach(monkeypatch)
    line = Progress()
    clock[0] += 2.1
    line.show("9 of 10 rows")
    clock[0] += 0.1
    line.show("too soon")
    clock[0] += 0.3
    line.show("10 of 10")
    line.close()
    assert terminal.getvalue() == "\r9 of 10 rows\r10 of 10    \r        \r"


def test_no_terminal_no_line(monkeypatch, clock):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(progress.sys, "stderr", stream)
        line = Progress()
        clock[0] += 9
        line.show("x")
        line.close()
        assert stream is None or stream.getvalue() == ""


def test_other_ranks_show_nothing(monkeypatch, clock):
    terminal = attach(monkeypatch)
    line = Progress(shown=False)
    clock[0] += 9
    line.show("x")
    assert terminal.getvalue() == ""


def test_a_long_call_says_how_far_it_is(monkeypatch, clock, tokenizer):
    """Each step takes a second: from the third on, rows done of all and tokens a second."""
    terminal = attach(monkeypatch)
    model = build_model(PARAMS, random_weights(PARAMS))
    forward = model.forward

    def slow(*args, **kwargs):
        clock[0] += 1.0
        return forward(*args, **kwargs)

    model.forward = slow
    Llama(model, tokenizer).generate([[1, 5], [1, 6], [1, 7]], 6, temperature=0)
    assert "llama: 0 of 3 rows done, 3.0 tokens/s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")
