"""The protocol that `llama.formats` explains."""

import doctest
import subprocess
import sys
from pathlib import Path

import torch

from llama import formats
from llama.formats.slicing import Joined

ROOT = Path(__file__).parents[2]


def test_slices_are_what_the_worked_example_shows():
    names = {"torch": torch, "Joined": Joined}
    example = doctest.DocTestParser().get_doctest(formats.__doc__, names, "llama.formats", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert (runner.failures, runner.tries) == (0, 6)


LIGHT = """
import sys, types
package = types.ModuleType("llama")  # in the place of llama/__init__.py, which imports everything
package.__path__ = [sys.argv[1]]
sys.modules["llama"] = package
import llama.formats.recognise, llama.tokenizer
print("torch" in sys.modules)
"""


def test_formats_bring_no_torch_to_modules_of_text():
    """The tokenizer asks `recognise` what a wrong file is."""
    command = [sys.executable, "-c", LIGHT, str(ROOT / "llama")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False\n", "")
