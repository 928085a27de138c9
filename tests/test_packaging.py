"""What people install: a source distribution, a wheel built from it, and every module imported outside the checkout."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "llama").rglob("*.py")
)


def setup(folder: Path, command: str) -> Path:
    """Run a command of setup.py in a folder, without network; return the one file that it makes."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", command], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built in a copy, so that nothing is left in the checkout and nothing old of it comes along."""
    copy = tmp_path_factory.mktemp("copy")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    shutil.copytree(ROOT / "llama", copy / "llama", ignore=shutil.ignore_patterns("__pycache__"))
    return setup(copy, "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from what the source distribution holds, and from nothing else."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return setup(unpacked, "bdist_wheel")


def test_wheel_of_an_sdist_says_what_it_requires(wheel):
    """setup.py reads requirements.txt, which the source distribution did not hold: it could not be installed."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(name).decode()
    required = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist" in line]
    assert [line for line in required if "extra" not in line] == (ROOT / "requirements.txt").read_text().split()
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0] in metadata


IMPORT = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    print(name, module.__file__.startswith(sys.argv[1]))
"""


def test_wheel_imports_every_module_outside_the_checkout(wheel, tmp_path):
    """Packages were listed by hand, and what is below them was missing; an editable install hides that."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    command = [sys.executable, "-I", "-c", IMPORT, str(tmp_path / "installed"), *MODULES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} True" for name in MODULES]
    assert {"llama", "llama.formats", "llama.formats.meta", "llama.generation"} <= set(MODULES)
