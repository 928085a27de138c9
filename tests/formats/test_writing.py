"""Files as they are written."""

from llama.formats.writing import Bar


def test_bar_moves_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = Bar(200)
    for _ in range(200):
        bar.advance(1)
    err = capsys.readouterr().err
    assert err.count("\r") == 101 and err.endswith("GB\n") and " 37%" in err
