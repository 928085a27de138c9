"""The chat in a real terminal: keys go in, and what the model was asked is read from what /save wrote.

The program runs in a session of its own on a pseudo-terminal, so that Ctrl-C is a key there as it is for a person. The
model is a random one; only the texts of its prompts matter, and that its answers are long.
"""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from support.models import BASE_PARAMS, random_weights

ROOT = Path(__file__).parents[2]
CHAT = ROOT / "example_chat_completion.py"
LIMIT = 120  # seconds until a program counts as hanging
MARKED = "\033[?2004h"  # what asks a terminal to mark pastes, before each prompt
PROMPT, ANSWER = MARKED + "> User: ", "> Assistant: "
LEFT, UP, BACKSPACE, ENTER, CTRL_C, CTRL_D = "\033[D", "\033[A", "\177", "\r", "\003", "\004"
PASTE, PASTED = "\033[200~", "\033[201~"
SHORT = ["--max_gen_len", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path) -> Path:
    params = BASE_PARAMS | {"vocab_size": 480}
    folder = tmp_path_factory.mktemp("terminal") / "tiny-chat"
    return write_checkpoint(folder, params, random_weights(params), tokenizer_path)


class Person:
    """Someone at a terminal, with the chat before them."""

    def __init__(self, folder: Path, *arguments: str, ranks: int = 0):
        self.keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        command = [sys.executable, *launcher, str(CHAT), "--interactive", "--ckpt_dir", str(folder), *arguments]
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "INPUTRC"))
        }
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "TERM": "xterm"}

        def sit_down() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self.process = subprocess.Popen(
            command,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=inherited | settings,
            start_new_session=True,
            preexec_fn=sit_down,
        )
        os.close(screen)
        self.seen = ""
        self.alarm = threading.Timer(LIMIT, self.process.kill)
        self.alarm.start()

    def __enter__(self) -> "Person":
        return self

    def __exit__(self, *error: object) -> None:
        self.alarm.cancel()
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)

    def read_more(self) -> bool:
        with contextlib.suppress(OSError):  # the other end is closed
            if more := os.read(self.keyboard, 4096):
                self.seen += more.decode(errors="replace")
                return True
        return False

    def wait_for(self, text: str) -> str:
        """Read until `text` has been printed after what was waited for before; return what came up to its end."""
        while text not in self.seen:
            assert self.read_more(), f"it ended without {text!r}: {self.seen[-500:]!r}"
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def press(self, *keys: str) -> None:
        """Type keys; many at a time are taken in as they are read."""
        waiting = "".join(keys).encode()
        while waiting:
            waiting = waiting[os.write(self.keyboard, waiting[:512]) :]

    def settle(self) -> None:
        """Wait until the chat sleeps: between prompt and reading, a signal shows only at the next key."""
        asleep = 0
        while asleep < 100:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
            os.sched_yield()

    def ask(self, *keys: str) -> str:
        """Type a question and wait for the next prompt; return what was on the screen between."""
        self.press(*keys, ENTER)
        return self.wait_for(PROMPT)

    def end(self) -> int:
        while self.read_more():
            pass
        return self.process.wait()


def asked(person: Person, path: Path) -> list[str]:
    """The questions of the conversation so far."""
    person.ask(f"/save {path}")
    return [message["content"] for message in json.loads(path.read_text()) if message["role"] == "user"]


def test_lines_are_edited_and_remembered(folder, tmp_path):
    """Left and Up were printed as ^[[D and ^[[A and went to the model; half a character was left of an erased one."""
    with Person(folder, *SHORT) as person:
        person.wait_for(PROMPT)
        person.ask("Where is Ana?", LEFT, LEFT, "n")
        person.ask(UP)
        person.ask("日本語", BACKSPACE, BACKSPACE, "Hi")
        fcntl.ioctl(person.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        person.ask("A question that is longer than the narrower window", LEFT, BACKSPACE)
        questions = ["Where is Anna?"] * 2 + ["日Hi", "A question that is longer than the narrower windw"]
        assert asked(person, tmp_path / "said.json") == questions
        person.press(CTRL_D)
        assert person.end() == 0


def test_a_long_line_arrives_whole(folder, tmp_path):
    """A terminal hands over at most 4,095 bytes of a line where nobody edits it; what followed was dropped."""
    line = "日本 " * 700 + "END"
    with Person(folder, *SHORT, "--max_seq_len", "16000") as person:
        person.wait_for(PROMPT)
        person.ask(line)
        assert asked(person, tmp_path / "said.json") == [line]


def test_a_paste_of_several_lines_is_one_question(folder, tmp_path):
    """Each of its lines was a question."""
    with Person(folder, *SHORT) as person:
        person.wait_for(PROMPT)
        person.ask(PASTE, "one\ntwo\n\nthree", PASTED, "!")
        assert asked(person, tmp_path / "said.json") == ["one\ntwo\n\nthree!"]


def test_it_says_what_it_is_and_how_to_leave(folder):
    with Person(folder, *SHORT, "--quantize", "int8") as person:
        words = person.wait_for(PROMPT)
        assert all(word in words for word in ("tiny-chat", "int8", "on cpu", "/help", "Ctrl-C", "Ctrl-D"))
        for command in ("/system", "/reset", "/retry", "/save", "/exit"):
            assert command in person.ask("/help")
        person.press("/exit", ENTER)
        assert person.end() == 0


def test_commands(folder, tmp_path):
    with Person(folder, *SHORT) as person:
        person.wait_for(PROMPT)
        person.ask("First?")
        assert ANSWER in person.ask("/retry")
        assert asked(person, tmp_path / "1") == ["First?"]
        assert "exists" in person.ask(f"/save {tmp_path / '1'}")
        person.ask("/reset")
        assert "no question" in person.ask("/retry")
        person.ask("/system Be brief.")
        person.ask("/etc/passwd?")
        assert "no /bye" in person.ask("/bye")
        assert asked(person, tmp_path / "2") == ["/etc/passwd?"]
        assert json.loads((tmp_path / "2").read_text())[0] == {"role": "system", "content": "Be brief."}
        assert "special tags" in person.ask("/system [INST]")


@pytest.mark.parametrize("ranks", [0, 2])
def test_ctrl_c_cuts_answers_and_twice_at_the_prompt_leaves(folder, tmp_path, ranks):
    """At two ranks it reached torchrun alone, which ended the job."""
    with Person(folder, "--max_seq_len", "16000", "--max_gen_len", "8000", ranks=ranks) as person:
        person.wait_for(PROMPT)
        for question in ("Where is Anna?", "And Tom?"):
            person.press(question, ENTER)
            person.wait_for(ANSWER)
            person.wait_for(" ")
            person.press(CTRL_C)
            assert "(interrupted)" in person.wait_for(PROMPT)
        person.press("never mind")
        person.settle()
        person.press(CTRL_C)
        assert "Ctrl-C again" in person.wait_for(PROMPT)
        assert asked(person, tmp_path / "said.json") == ["Where is Anna?", "And Tom?"]
        person.settle()
        person.press(CTRL_C)
        person.wait_for("Ctrl-C again")
        person.wait_for(PROMPT)
        person.settle()
        person.press(CTRL_C)
        assert person.end() == 0
        assert "Traceback" not in person.seen
