"""Command lines: what is typed reaches `main` as it was typed, or is refused in one sentence before anything runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llama import cli

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds until a program counts as hanging
SCRIPT = """
import json
from llama import cli

def main(
    *prompts: str,
    temperature: float = 0.6,
    top_k: int | None = 3,
    stop: list[str] | None = None,
    sizes: tuple[int, ...] = (1, 2),
    system: str | None = None,
    stream: bool = False,
    max_gen_len: int | None = 9,
):
    \"""Do nothing.

    Args:
        prompts: texts.
        temperature: a number of words that is too large for one line of the help, which goes on in another one,
            and here too.
        top_k: 1, or more.
    \"""
    {body}

cli.run(main)
"""
ECHO = "print(json.dumps([prompts, temperature, top_k, stop, sizes, system, stream, max_gen_len]))"
DEFAULTS = [[], 0.6, 3, None, [1, 2], None, False, 9]


def write_script(folder: Path, body: str) -> Path:
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("{body}", body))
    return script


def start(folder: Path, body: str, *arguments: str, **options) -> subprocess.Popen:
    script = write_script(folder, body)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(script), *arguments], env=environment, text=True, **(pipes | options))


def run(folder: Path, body: str, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    process = start(folder, body, *arguments)
    out, err = process.communicate(stdin, timeout=LIMIT)
    return process.returncode, out, err


def received(folder: Path, *arguments: str) -> list:
    """What `main` was called with."""
    code, out, err = run(folder, ECHO, *arguments)
    assert code == 0, err
    return json.loads(out)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("", {}),
        ("--temperature 1e-1 --top-k=5", {1: 0.1, 2: 5}),
        ("--temperature 2 --temperature 1", {1: 1}),
        ("--top_k None --system None", {2: None}),
        ("--stop a,b --stop=--x=1 --stop None", {3: ["a,b", "--x=1", "None"]}),
        ("--sizes 4,5", {4: [4, 5]}),
        ("--stream", {6: True}),
        ("--stream --top_k 1", {6: True, 2: 1}),
        ("--stream=no", {}),
        ("--stream=YES", {6: True}),
        ("--stream True x", {6: True, 0: ["x"]}),
        ("--stream False", {}),
        ("--stream text", {6: True, 0: ["text"]}),
        ("x=True False", {0: ["x=True", "False"]}),
        ("-5 1,2 'q' [1] None = - --system -", {0: ["-5", "1,2", "'q'", "[1]", "None", "=", ""], 5: "-"}),
        ("--system -x --temperature -1", {5: "-x", 1: -1}),
        ("a -- b --stream -- -", {0: ["a", "b", "--stream", "--", "-"]}),
        ("--system=a=b", {5: "a=b"}),
    ],
)
def test_what_is_typed_arrives(tmp_path, arguments, changed):
    expected = [changed.get(place, value) for place, value in enumerate(DEFAULTS)]
    assert received(tmp_path, *arguments.split()) == expected


def test_texts_with_spaces_line_breaks_and_dashes(tmp_path):
    texts = ["-x is negative", "--- a line", "two\nlines", " spaces ", "", "--Hello there", "日本"]
    assert received(tmp_path, *texts, "--system", "--Be brief")[0] == texts


def test_standard_input_is_a_text_without_its_last_line_break(tmp_path):
    code, out, _ = run(tmp_path, ECHO, "a", "-", stdin="one\ntwo \n\n")
    assert code == 0 and json.loads(out)[0] == ["a", "one\ntwo \n"]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temprature", "0"], ["--temprature is not a flag", "did you mean --temperature?"]),
        (["--max-gen-length=3"], ["did you mean --max_gen_len?"]),
        (["--xyz"], ["--xyz is not a flag", "--help"]),
        (["--prompt", "x"], ["--prompt is not a flag", "type prompts without"]),
        (["--prompts=x"], ["--prompts is not a flag"]),
        (["a", "-t", "5"], ["-t is not a flag", "Put -- before"]),
        (["--temperature"], ["--temperature needs a value"]),
        (["--temperature", "--stream"], ["--temperature needs a value"]),
        (["--system", "--"], ["--system needs a value"]),
        (["--temperature=hot"], ["temperature is 'hot'", "a number"]),
        (["--temperature=True"], ["temperature is 'True'"]),
        (["--top_k=1.5"], ["top_k is '1.5'", "a whole number"]),
        (["--top_k", "True"], ["top_k is 'True'"]),
        (["--temperature", "None"], ["temperature is 'None'"]),
        (["--stream=maybe"], ["stream is 'maybe'", "yes or no"]),
        ([b"caf\xe9 \xff".decode(errors="surrogateescape")], ["\\udce9", "UTF-8"]),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(tmp_path, arguments, words):
    code, out, err = run(tmp_path, "print('ran')", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_a_script_without_texts_refuses_them(capsys):
    def main(size: int = 1):
        pass

    with pytest.raises(SystemExit):
        cli.parse(["5"], main)
    assert "'5' is neither a flag" in capsys.readouterr().err


def test_options_are_checked_and_those_not_given_left_out():
    given = cli.chosen(temperature=0.5, top_p=0.9, top_k=None, stop=["x"])
    assert given == {"temperature": 0.5, "top_p": 0.9, "stop": ["x"]}
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"stop": [""]}, {"n": 0}, {"max_gen_len": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cli.chosen(**{"temperature": 0.5, "top_p": 0.9} | wrong)


# --- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed_on_standard_output_without_torch(tmp_path, flag):
    (tmp_path / "torch.py").write_text("raise SystemError('imported')")
    code, out, err = run(tmp_path, "print('ran')", "text", flag, "--nonsense")
    assert (code, err) == (0, "")
    assert out.startswith("usage: script.py [PROMPT ...] [--FLAG VALUE ...]\n\nDo nothing.\n")
    words = " ".join(out.split())
    assert "--temperature NUMBER a number of words that" in words
    assert "another one, and here too. Default: 0.6." in words and "--top_k NUMBER 1, or more. Default: 3." in words
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    "script", ["example_text_completion", "example_chat_completion", "examples/infilling", "bench"]
)
def test_every_flag_of_a_script_is_described(script):
    """Only what the docstring names is in the help, so it has to name all."""
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    signature = source.partition("def main(\n")[2].partition("\n):")[0]
    names = [line.split(":")[0].strip() for line in signature.splitlines()]
    assert len(names) > 10
    for name in names:
        assert (f"  --{name}" if "*" not in name else f"  {name[1:].upper()}") in done.stdout, name


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('Said on purpose.')",
        "from llama.prompts import check_dialog; check_dialog([], 'Said on purpose.')",
        "from llama.tokenizer import Tokenizer; Tokenizer('/Said on purpose.')",
    ],
)
def test_an_error_raised_on_purpose_is_one_sentence(tmp_path, body):
    code, out, err = run(tmp_path, body)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and "Said on purpose." in err


@pytest.mark.parametrize(
    "body",
    [
        "int('x')",
        "json.loads('{')",
        "[][0]",
        "assert False",
        "from llama.prompts import format_dialog; format_dialog([{'role': 'user', 'content': {}['x']}])",
        "from llama.prompts import find_special_tag; find_special_tag([{}])",
        "from llama.cli import SHORT; SHORT.fullmatch(1)",
    ],
)
def test_any_other_error_keeps_its_traceback(tmp_path, body):
    """All errors lost theirs, so that nobody could tell where a bug was."""
    code, _, err = run(tmp_path, body)
    assert code == 1 and err.startswith("Traceback") and "script.py" in err


def test_ctrl_c_while_torch_is_imported_ends_quietly(tmp_path):
    """It printed a traceback of ten lines."""
    (tmp_path / "torch.py").write_text(
        "import signal, sys\nprint('importing', flush=True)\nwhile True: signal.pause()\n"
    )
    process = start(
        tmp_path,
        "from llama import Llama",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    process = start(tmp_path, "input(); cli.show('x')")
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=LIMIT) == 141


def test_a_full_disk_is_one_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, "cli.show('x')", stdout=full)
        err = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 1 and err == "Standard output cannot be written: No space left on device.\n"


@pytest.mark.parametrize(
    ("closed", "read", "out", "err"),
    [
        ("<&-", "", "typed\n", "said\n"),
        (">&-", "in", "", "said\n"),
        ("2>&-", "in", "typed\n", ""),
        ("<&- >&- 2>&-", "", "", ""),
    ],
)
def test_closed_standard_streams_are_as_good_as_empty_ones(tmp_path, closed, read, out, err):
    """They were None, which has no `reconfigure`; and a file opened later got their numbers."""
    write_script(
        tmp_path,
        "import sys; print(prompts[0]); print('said', file=sys.stderr); open('found', 'w').write(sys.stdin.read())",
    )
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} script.py "typed" {closed}'],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input="in",
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    assert (tmp_path / "found").read_text() == read


# --- rows --------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """What the rows of a stream come in, as far as it is printed."""

    row: int
    text: str
    finish_reason: str | None


def pieces(*made: tuple[int, str, str | None], interrupted: bool = False):
    for row, text, reason in made:
        yield Piece(row, text, reason)
    if interrupted:
        raise KeyboardInterrupt


def rows_of(out: str) -> list[str]:
    return out.split(f"\n{cli.RULE}\n")


MADE = [(1, "b", None), (0, "a", None), (1, "B", "eos"), (0, "", None), (2, "c", "stop"), (0, "A", "length")]


@pytest.mark.parametrize("live", [False, True])
def test_rows_are_printed_in_order(capsys, live):
    cli.show_rows(pieces(*MADE), "<{}>".format, live)
    assert rows_of(capsys.readouterr().out) == ["<0>aA", "<1>bB", "<2>c", ""]


def test_a_row_is_printed_as_soon_as_it_and_those_before_it_have_ended(capsys):
    seen = []

    def watched():
        for piece in pieces(*MADE):
            yield piece
            seen.append(len(rows_of(capsys.readouterr().out)) - 1)

    cli.show_rows(watched())
    assert seen == [0, 0, 0, 0, 0, 3]


def test_live_rows_come_piece_by_piece(capsys):
    seen = []

    def watched():
        for piece in pieces((1, "x", None), (0, "a", None), (0, "b", "eos"), (1, "y", "eos")):
            yield piece
            seen.append(capsys.readouterr().out)

    cli.show_rows(watched(), "<{}>".format, live=True)
    assert seen == ["", "<0>a", f"b\n{cli.RULE}\n<1>x", f"y\n{cli.RULE}\n"]


@pytest.mark.parametrize("live", [False, True])
def test_ctrl_c_shows_what_has_ended(capsys, live):
    """Rows that had ended were lost with those that had not."""
    with pytest.raises(KeyboardInterrupt):
        cli.show_rows(pieces(*MADE[:-1], interrupted=True), "<{}>".format, live)
    begun = ["<0>a (interrupted)"] if live else []
    assert rows_of(capsys.readouterr().out) == [*begun, "<1>bB", "<2>c", ""]
