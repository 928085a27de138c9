"""What the README shows is what happens: its commands run, its outputs and tables are the real ones.

Folders of real weights are links to the demo checkpoint here. A block that cannot run in a test says why in a comment
right above it: `<!-- not run by the tests: reason -->`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ["llama-2-7b", "llama-2-7b-chat", "llama-2-13b-chat", "Llama-2-7b-chat-hf"]


class Block(NamedTuple):
    language: str
    text: str
    reason: str | None  # why the tests do not run it

    @property
    def name(self) -> str:
        return self.text.strip().splitlines()[0][:60]


def blocks() -> list[Block]:
    pattern = re.compile(r"(?:<!-- not run by the tests: ([^>]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
    return [Block(language, text, reason or None) for reason, language, text in pattern.findall(README)]


RUN = [block for block in blocks() if block.language in ("bash", "python") and not block.reason]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkout as it looks once weights have been downloaded."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / "demo")
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.name)
def test_block_runs(block, folder):
    command = ["bash", "-euc", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
    assert run(command, folder).strip()


def test_blocks_are_found_and_few_are_left_out():
    assert len(RUN) >= 5
    assert all(len(block.reason) > 10 for block in blocks() if block.reason)


def test_chat_format_prints_what_is_shown(folder):
    everything = blocks()
    at = next(n for n, block in enumerate(everything) if "format_dialog(dialog)" in block.text)
    assert run([sys.executable, "-c", everything[at].text], folder).strip() == everything[at + 1].text.strip()


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_table_is_the_estimate(memory):
    assert memory.table() in README


def test_rank_table_is_what_divides(memory):
    for name, args in memory.MODELS.items():
        [row] = re.findall(rf"^\| {name.split()[-1]}, .*\| ([\d, ]+) \|$", README, re.MULTILINE)
        assert [int(number) for number in row.split(",")] == args.rank_counts()


def test_every_argument_is_in_the_table():
    """Each argument of the public calls has a row that gives its default."""
    import inspect

    from llama import Llama

    rows = dict(re.findall(r"^\| `(\w+)`(?: of \S+(?: \w+)?)? \|([^|]*)\|", README, re.MULTILINE))
    for call in (Llama.build, Llama.stream, Llama.text_completion):
        for name, parameter in inspect.signature(call).parameters.items():
            if name in ("self", "options", "prompts", "prompt_tokens"):
                continue
            assert name in rows, name
            if parameter.default is not inspect.Parameter.empty and name != "seed":
                assert rows[name].strip().strip("`") == str(parameter.default), name


def test_paths_in_the_tree_exist():
    tree = next(block.text for block in blocks() if "model.py" in block.text and block.language == "text")
    modules = re.findall(r"^  (\w+\.py)", tree, re.MULTILINE)
    assert {path.name for path in (ROOT / "llama").glob("*.py")} - {"__init__.py"} == set(modules)
    for name in re.findall(r"^(\S+/|\S+\.(?:py|sh|txt|md))\s", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
