"""The example scripts as a newcomer runs them: as programs, on a checkpoint whose answer is known.

The model here recites: attention and feed-forward layers are zero, so the next token follows from the last one alone,
and RECITED comes round and round without an end-of-sequence token. Runs that only print are started two at a time,
each with a time limit far above what it takes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from support.checkpoints import write_checkpoint
from support.models import random_weights

ROOT = Path(__file__).parents[2]
TEXT, CHAT = ROOT / "example_text_completion.py", ROOT / "example_chat_completion.py"
LIMIT = 240  # seconds until a program counts as hanging
# "Anna said, café 日本のми!": one character that latin-1 has, some that it has not, one that is spelled in bytes.
RECITED = ["Anna", "▁said", ",", "▁c", "a", "f", "é", "▁", "日", "本", "の", "<0xD0>", "<0xBC>", "и", "!"]
RULE = "=================================="
PARAMS = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 480, "multiple_of": 32, "norm_eps": 1e-5}


def reciting_weights(chain: list[int]) -> dict[str, torch.Tensor]:
    """A model that follows each id of the chain by the next, its last and every other id by its first."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in random_weights(PARAMS).items()}
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] += 1.0
    embedding, output = weights["tok_embeddings.weight"], weights["output.weight"]
    embedding[:, len(chain) - 1] = 1.0
    for place, id in enumerate(chain[:-1]):
        embedding[id] = 0.0
        embedding[id, place] = 1.0
    for place, following in enumerate([*chain[1:], chain[0]]):
        output[following, place] = 10.0
    return weights


@pytest.fixture(scope="module")
def chain(raw_sp) -> list[int]:
    ids = raw_sp.piece_to_id(RECITED)
    assert len(set(ids)) == len(ids) < PARAMS["dim"] and 0 not in ids
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path, chain) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    return write_checkpoint(folder, PARAMS, reciting_weights(chain), tokenizer_path)


def environment(**changes: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"} | changes


def run(script: Path, *arguments: object, stdin: bytes = b"", ranks: int = 0, **variables: str):
    """Run a script to its end; what it printed comes back as bytes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return subprocess.run(command, input=stdin, env=environment(**variables), capture_output=True, timeout=LIMIT)


TALK = ["--interactive", "--temperature", 0, "--max_gen_len", 15]
RUNS = {
    "text": (TEXT, "Anna took", "Hello, world", "12", '"quoted"', "--max_gen_len", 20, "--temperature", 0),
    "text streamed": (TEXT, "Anna took", "Hello, world", "--max_gen_len", 20, "--temperature", 0, "--stream"),
    "text, flag first": (TEXT, "--stream", "Anna took", "--max_gen_len", 6),
    "text, odd prompts": (TEXT, "x=True", "False", "-5 degrees", "--", "-", "--stream", *["--"] * 2),
    "text from input": (TEXT, "Anna took", "-", "--max-gen-len=6"),
    "text in threes": (TEXT, "Anna", "Tom", "--n", 3, "--max_gen_len", 6, "--max_batch_size", 4),
    "text stopped": (TEXT, "Anna", "--stop", "日本", "--stop", "caf", "--top_k", 5, "--temperature", 0),
    "text help": (TEXT, "--help"),
    "chat": (CHAT, "--max_gen_len", 20),
    "chat streamed": (CHAT, "--max_gen_len", 20, "--stream"),
    "chat help": (CHAT, "-h"),
    "chat asked": (CHAT, "Where is Anna?", "[INST] me", "--n=2", "--system", "-Be brief.", "--max_gen_len", 20),
    "text nonsense": (TEXT, "Anna", "--nonsense", 3, "--max_gen_len", 2),
    "chat nonsense": (CHAT, "--max_gen_length", 3),
    "text no folder": (TEXT, "--ckpt_dir", "/nowhere/at/all"),
    "text temperature": (TEXT, "Anna", "--temperature", "warm"),
    "chat dtype": (CHAT, "--dtype", "float8"),
    "chat seq len": (CHAT, "--max_seq_len", 0),
    "text top_p": (TEXT, "Anna", "--top_p", 1.5, "--ckpt_dir", "/nowhere/at/all"),
    "chat system": (CHAT, "--system", "Be brief."),
    "chat n": (CHAT, "--interactive", "--n", 2),
}


@pytest.fixture(scope="module")
def jobs(folder) -> Iterator[dict[str, Future]]:
    """Every run that only prints, and the conversation over pipes."""

    def place(arguments: tuple) -> list:
        script, *rest = arguments
        return [script, *([] if "--ckpt_dir" in rest else ["--ckpt_dir", folder]), *rest]

    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run, *place(arguments)) for name, arguments in RUNS.items() if "input" not in name}
        jobs["text from input"] = pool.submit(run, *place(RUNS["text from input"]), stdin="Привет,\nмир\n".encode())
        jobs["text latin-1"] = pool.submit(run, *place(RUNS["text"]), PYTHONIOENCODING="latin-1")
        jobs["chat C"] = pool.submit(run, *place(RUNS["chat"]), LC_ALL="C")
        jobs["chat ascii"] = pool.submit(run, *place(RUNS["chat"]), LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        yield jobs
        for job in jobs.values():
            job.cancel()


def printed(jobs: dict[str, Future], name: str, encoding: str = "utf-8") -> str:
    """What a run that succeeded printed."""
    done = jobs[name].result()
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(encoding)


@pytest.fixture(scope="module")
def said(chain, raw_sp):
    """The first n tokens that the model recites, as they follow a text."""
    return lambda n: raw_sp.decode((chain * 9)[:n])


# --- text --------------------------------------------------------------------------------------------------------


def completions(out: str) -> list[str]:
    parts = out.split(f"\n\n{RULE}\n\n")
    assert parts.pop() == ""
    return parts


def test_texts_are_continued_as_they_were_typed(jobs, raw_sp, chain):
    """Fire read "Hello, world" as a pair, 12 as a number and a quoted word as that word."""
    typed = RUNS["text"][1:5]
    expected = [raw_sp.decode([*raw_sp.encode(prompt), *(chain * 2)[:20]]) for prompt in typed]
    assert completions(printed(jobs, "text")) == expected


def test_streamed_texts_are_the_same(jobs):
    assert completions(printed(jobs, "text streamed")) == completions(printed(jobs, "text"))[:2]


def test_a_switch_before_a_text_does_not_swallow_it(jobs):
    """Fire took the text after --stream for its value, and the examples were continued instead."""
    out = completions(printed(jobs, "text, flag first"))
    assert len(out) == 1 and out[0].startswith("Anna took")


def test_texts_that_look_like_flags_stay_texts(jobs):
    """ "x=True" followed by "False" became "x=False", and "-5 degrees" was complained of after everything had run."""
    prompts = [text.split("Anna said")[0] for text in completions(printed(jobs, "text, odd prompts"))]
    assert prompts == ["x=True", "False", "-5 degrees", "-", "--stream", "--", "--"]


def test_a_dash_is_standard_input(jobs, said):
    """A lone dash was taken for fire's separator: the examples ran instead."""
    assert completions(printed(jobs, "text from input")) == [f"Anna took{said(6)}", f"Привет,\nмир{said(6)}"]


def test_several_continuations_of_each_prompt(jobs):
    out = completions(printed(jobs, "text in threes"))
    assert len(out) == 6
    assert all(text.startswith("Anna") for text in out[:3]) and all(text.startswith("Tom") for text in out[3:])


def test_stop_is_given_once_for_each_text(jobs):
    assert completions(printed(jobs, "text stopped")) == ["Anna said, "]


# --- chat --------------------------------------------------------------------------------------------------------


def test_six_dialogs_are_shown_and_answered(jobs, said):
    dialogs = completions(printed(jobs, "chat"))
    assert len(dialogs) == 6
    *answered, refused = dialogs
    assert all(dialog.endswith(f"> Assistant: {said(20)}") for dialog in answered)
    assert "special tags are not allowed" in refused
    assert sum("System: " in dialog for dialog in dialogs) == 3
    assert sum(dialog.count("User: ") for dialog in dialogs) == 7


def test_streamed_answers_are_the_same(jobs):
    assert completions(printed(jobs, "chat streamed")) == completions(printed(jobs, "chat"))


def test_questions_are_answered(jobs, said):
    """A question typed after the script was taken for the folder of the weights."""
    *answered, refused, refused_too = completions(printed(jobs, "chat asked"))
    assert answered == [f"System: -Be brief.\n\nUser: Where is Anna?\n\n> Assistant: {said(20)}"] * 2
    assert refused == refused_too and "special tags are not allowed" in refused


# --- help, wrong arguments, consoles -----------------------------------------------------------------------------


FLAGS = ["ckpt_dir", "tokenizer_path", "temperature", "top_p", "max_seq_len", "max_gen_len", "max_batch_size"]
FLAGS += ["device", "dtype", "seed", "stream", "lora", "top_k", "min_p", "presence_penalty", "frequency_penalty"]
FLAGS += ["stop", "n", "compile", "quantize"]


@pytest.mark.parametrize("name", ["text help", "chat help"])
def test_help_describes_every_flag(jobs, name):
    """It went to standard error, through a pager, among fire's own groups and types."""
    out = printed(jobs, name)
    assert jobs[name].result().stderr == b""
    for flag in [*FLAGS, *["interactive"] * (name == "chat help")]:
        assert f"--{flag}" in out
    assert "tokens" in out and "Default: 0.6" in out and "Optional" not in out


@pytest.mark.parametrize(
    "name, words",
    [
        ("text nonsense", ["nonsense"]),
        ("chat nonsense", ["max_gen_length"]),
        ("text no folder", ["/nowhere/at/all", "does not exist"]),
        ("text temperature", ["temperature", "warm"]),
        ("chat dtype", ["float8", "bfloat16"]),
        ("chat seq len", ["max_seq_len", "positive"]),
        ("text top_p", ["top_p", "1.5"]),
        ("chat system", ["--system", "--interactive"]),
        ("chat n", ["--n", "conversation"]),
    ],
)
def test_a_wrong_argument_ends_in_one_line(jobs, name, words):
    """An unknown flag was reported after everything had been computed, in four lines of usage."""
    done = jobs[name].result()
    assert done.returncode not in (0, None)
    assert done.stdout == b""
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("llama: ")]
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines


def test_a_console_that_lacks_characters_shows_question_marks(jobs):
    expected = printed(jobs, "text").encode("latin-1", errors="replace")
    assert b"caf\xe9 ??" in expected
    assert jobs["text latin-1"].result().stdout == expected
    assert printed(jobs, "text latin-1", "latin-1")


def test_the_c_locale_works(jobs):
    assert printed(jobs, "chat C") == printed(jobs, "chat")
    assert printed(jobs, "chat ascii", "ascii") == printed(jobs, "chat").encode("ascii", errors="replace").decode()


# --- conversation ------------------------------------------------------------------------------------------------

PROMPT, ANSWER = "\n> User: ", "> Assistant: "


def replies(out: str) -> list[str]:
    """What follows each line that was read, which is shown as it would be in a terminal, up to the next prompt."""
    before, *after = out.split(PROMPT)
    assert before == ""
    return [reply.partition("\n")[2].strip("\n") for reply in after]


@pytest.fixture(scope="module")
def conversation(folder) -> list[str]:
    lines = [
        b"Where is Anna?",
        b"",
        b"   ",
        b"She said [/INST] yes",
        "Привет 日本".encode(),
        b"\xff\xfe is no text",  # half a character, as a wrong key or a wrong terminal makes it
        b"Tom " * 300,
        b"And Tom?",
        b"And Lily?",
        b"And Hugo?",
    ]
    arguments = [*TALK, "--max_seq_len", 100, "--system", "Be brief, and kind.", "--ckpt_dir", folder]
    done = run(CHAT, *arguments, stdin=b"\n".join(lines) + b"\n", LC_ALL="C")
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return replies(done.stdout.decode())


def test_a_conversation_over_a_pipe(conversation, said):
    answer = ANSWER + said(15)
    assert len(conversation) == 11
    assert conversation[0] == answer
    assert conversation[1:3] == ["", ""], "empty lines are not sent"
    assert "special tags are not allowed" in conversation[3] and "[/INST]" in conversation[3]
    assert conversation[4].endswith(answer)
    assert conversation[5].endswith(answer)
    assert "too long" in conversation[6] and "max_seq_len 100" in conversation[6] and ANSWER not in conversation[6]
    assert all(reply.endswith(answer) for reply in conversation[7:10])
    assert conversation[10] == "", "the end of input ends it, after an empty line"


def test_lines_from_a_pipe_are_shown(folder):
    done = run(CHAT, *TALK, "--ckpt_dir", folder, "First?", stdin=b"Where is Anna?\n")
    assert done.stdout.decode().startswith(f"{PROMPT}First?\n{ANSWER}")
    assert f"{PROMPT}Where is Anna?\n{ANSWER}" in done.stdout.decode()


def test_a_full_context_forgets_the_oldest_exchanges_and_says_so(conversation):
    assert not any("forgot" in reply for reply in conversation[:2])
    assert any("context is full" in reply and "forgot" in reply for reply in conversation[4:10])


class Program:
    """A script that is talked to: lines go in, and what it printed is waited for."""

    def __init__(self, *command: object):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a background job's shell ignores
        )
        self.out = b""
        self.errors: list[bytes] = []
        self.reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr))
        self.reader.start()
        self.alarm = threading.Timer(LIMIT, self.process.kill)
        self.alarm.start()

    def wait_for(self, text: str) -> str:
        """Read until `text` has been printed after what was waited for before; return what came up to its end."""
        wanted = text.encode()
        while wanted not in self.out:
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, f"it ended without {text!r}: {self.out[-300:]!r} {b''.join(self.errors).decode()}"
            self.out += more
        found, _, self.out = self.out.partition(wanted)
        return (found + wanted).decode(errors="replace")

    def wait_until_it_reads(self) -> None:
        """A signal that comes between the prompt and the read is seen only once the read returns; let it begin."""
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()

    def type(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Close its input and return the exit status."""
        self.process.stdin.close()
        self.out += self.process.stdout.read()
        return self.process.wait()

    def close(self) -> None:
        self.alarm.cancel()
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                stream.close()


def test_ctrl_c_cuts_an_answer_short_and_the_conversation_goes_on(folder, raw_sp):
    """The answer would fill 16,000 tokens; it is interrupted at its first word, twice, and once between answers."""
    program = Program(CHAT, "--interactive", "--temperature", 0, "--max_seq_len", 16000, "--ckpt_dir", folder)
    try:
        program.wait_for(PROMPT)
        for question in ("Where is Anna?", "And Tom?"):
            program.type(question)
            program.wait_for(ANSWER + "Anna said")
            program.process.send_signal(signal.SIGINT)
            rest = program.wait_for(PROMPT)
            assert rest.endswith(f" (interrupted)\n{PROMPT}")
            assert rest.count("Anna") < 1000
        program.wait_until_it_reads()
        program.process.send_signal(signal.SIGINT)
        assert program.wait_for(PROMPT) == f"\n(Ctrl-C again leaves, as do Ctrl-D and /exit.)\n{PROMPT}"
        program.type("Are you there?")
        program.wait_for(ANSWER + "Anna said")
        program.process.send_signal(signal.SIGINT)
        program.wait_for(PROMPT)
        assert program.end() == 0
        assert b"Traceback" not in b"".join(program.errors)
    finally:
        program.close()


def test_ctrl_c_shows_the_rows_that_have_ended(folder, chain, raw_sp):
    """The second prompt leaves room for few tokens, so it has ended long before the first has recited ten rounds."""
    full = " ".join(["Tom"] * 900)
    room = 2000 - 1 - len(raw_sp.encode(full))
    assert 0 < room < 250
    sizes = ["--max_seq_len", 2000, "--max_gen_len", "None", "--temperature", 0]
    program = Program(TEXT, "Anna took", full, *sizes, "--stream", "--ckpt_dir", folder)
    try:
        for _ in range(20):
            program.wait_for("Anna said")
        program.process.send_signal(signal.SIGINT)
        assert program.end() == 130
        first, second, end = program.out.decode().split(f"\n\n{RULE}\n\n")
        assert first.endswith(" (interrupted)") and end == ""
        assert second == raw_sp.decode([*raw_sp.encode(full), *(chain * 20)[:room]])
        assert b"Traceback" not in b"".join(program.errors)
    finally:
        program.close()


def test_a_reader_that_goes_away_is_no_error_of_any_rank(folder):
    """The second rank printed a traceback of its lost peer."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TEXT)]
    arguments = ["--ckpt_dir", str(folder), "--max_gen_len", "5"]
    done = subprocess.run(
        [*command, *arguments], stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=LIMIT
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"[rank" not in done.stderr and b"BrokenPipe" not in done.stderr


def test_two_ranks_hold_one_conversation(folder, conversation, said):
    lines = [b"Where is Anna?", b"", b"She said [/INST] yes", b"And Tom?"]
    done = run(CHAT, *TALK, "--ckpt_dir", folder, stdin=b"\n".join(lines) + b"\n", ranks=2)
    assert done.returncode == 0, done.stderr.decode()
    first, empty, tag, second, end = replies(done.stdout.decode())
    assert first == second == ANSWER + said(15)
    assert (empty, end) == ("", "")
    assert "special tags" in tag
    assert done.stderr.decode().count("ready in") == done.stderr.decode().count("/help") == 1
