"""A processor that claims instructions it does not have, and the memory that is left to a process."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from llama import device
from support.process import global_state

ROOT = Path(__file__).parent.parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks as Linux does")


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own, in which nobody has told oneDNN anything."""
    environment = {name: value for name, value in os.environ.items() if "MAX_CPU_ISA" not in name}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)


# --- AMX that does not work ----------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A processor with or without AMX, and a child's verdicts one after the other; returns what is set meanwhile."""
    set_variables = []

    def install(claims: bool, *verdicts: bool) -> list[tuple[str, str]]:
        answers = iter(verdicts)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(device, "claims_amx", lambda: claims)
        monkeypatch.setattr(device, "survives", lambda action: next(answers))
        monkeypatch.setattr(os, "putenv", lambda name, value: set_variables.append((name, value)))
        return set_variables

    device.avoid_broken_amx.cache_clear()
    yield install
    device.avoid_broken_amx.cache_clear()
    monkeypatch.undo()
    device.use_device(torch.device("cpu"))


def test_amx_is_left_alone_where_a_product_survives(machine):
    set_variables = machine(True, True)
    device.use_device(torch.device("cpu"))
    assert set_variables == []


def test_amx_is_not_tried_where_there_is_none(machine):
    """No verdict is given, so asking for one fails."""
    set_variables = machine(False)
    device.use_device(torch.device("cpu"))
    assert set_variables == []


def test_amx_is_not_tried_for_another_device(machine):
    set_variables = machine(True)
    device.use_device(torch.device("meta"))
    assert set_variables == []


def test_amx_that_ends_a_product_is_switched_off_once_and_in_silence(machine, capfd):
    set_variables = machine(True, False, True)
    before = global_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.use_device(torch.device("cpu"))
        device.use_device(torch.device("cpu"))  # asks for no third verdict
    assert set_variables == [("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")]
    assert global_state() == before
    assert capfd.readouterr() == ("", "")


def test_amx_that_cannot_be_switched_off_any_more_is_warned_of(machine):
    """oneDNN reads the variable once: a process that has used it before is lost to bfloat16."""
    machine(True, False, False)
    with pytest.warns(UserWarning, match=r"set ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 before Python starts"):
        device.use_device(torch.device("cpu"))


@LINUX
def test_a_child_that_comes_back_survives():
    before = global_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.survives(lambda: None)
    assert global_state() == before


@LINUX
@pytest.mark.parametrize("kind", [signal.SIGILL, signal.SIGSEGV, signal.SIGKILL], ids=lambda kind: kind.name)
def test_a_child_that_a_signal_ends_does_not_survive(kind):
    assert not device.survives(lambda: os.kill(os.getpid(), kind))


DIE = """
import os, signal
from llama.device import survives
print(survives(lambda: os.kill(os.getpid(), signal.SIGILL)))
"""


@LINUX
def test_a_dying_child_is_silent():
    """Also where Python was told to print the stack of whatever dies, and where a core file would be written."""
    done = run("-X", "faulthandler", "-c", DIE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@LINUX
def test_a_child_that_raises_does_not_survive(capfd):
    assert not device.survives(lambda: 1 / 0)
    assert capfd.readouterr() == ("", "")


@LINUX
def test_a_child_that_is_stuck_is_ended(monkeypatch):
    monkeypatch.setattr(device, "TRIAL_SECONDS", 0.01)
    assert device.survives(signal.pause)


@LINUX
@pytest.mark.parametrize("action", [lambda: None, signal.pause, lambda: os.kill(os.getpid(), signal.SIGILL)])
def test_no_child_and_no_file_stays_behind(monkeypatch, action):
    children, fork, files = [], os.fork, os.listdir("/proc/self/fd")

    def noted_fork() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(device, "TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(os, "fork", noted_fork)
    device.survives(action)
    assert os.listdir("/proc/self/fd") == files
    with pytest.raises(ChildProcessError):
        os.waitpid(children[0], os.WNOHANG)


LEAVE = """
import atexit
from llama.device import survives
atexit.register(print, "left")
print("once")
survives(lambda: None)
survives(lambda: 1 / 0)
"""


@LINUX
def test_a_child_runs_none_of_its_parents_handlers():
    """Nor does it write what its parent had in a buffer."""
    done = run("-c", LEAVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\nleft\n", "")


USE = """
import torch
from llama.device import use_device
use_device(torch.device("cpu"))
x = torch.ones(64, 64, dtype=torch.bfloat16)
print((x @ x)[0, 0].item())
"""


@LINUX
def test_bfloat16_products_work_on_this_machine():
    """On a machine whose AMX traps, the process died here with "Illegal instruction"."""
    done = run("-c", USE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "64.0\n", "")


# --- memory --------------------------------------------------------------------------------------------------------

MB = 10**6


@pytest.fixture
def account(tmp_path, monkeypatch):
    """Linux's account of 8,192,000,000 free bytes, and a container's folder to fill."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(device, "MEMINFO", meminfo)
    monkeypatch.setattr(device, "CGROUP", tmp_path)

    def install(limit: int | str, used: int, cached: int = 0) -> None:
        sizes = {"anon": 7, "file": cached + 3 * MB, "shmem": 3 * MB, "inactive_file": cached - cached // 4}
        sizes["active_file"] = cached // 4
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in sizes.items()))

    install.folder = tmp_path
    return install


def free_on_processor() -> int | None:
    return device.free_memory(torch.device("cpu"))


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (100 * MB, 30 * MB, 0, 70 * MB),
        (100 * MB, 30 * MB, 20 * MB, 90 * MB),  # pages of files are dropped when needed, those of tmpfs cannot be
        (100 * MB, 100 * MB, 0, 0),
        (100 * MB, 101 * MB, 0, 0),  # a limit that was lowered
        (16_000 * MB, 30 * MB, 0, 8192 * MB),  # more than the machine has left
        ("max", 30 * MB, 0, 8192 * MB),
    ],
)
def test_free_memory_is_what_the_container_allows(account, limit, used, cached, free):
    account(limit, used, cached)
    assert free_on_processor() == free


@pytest.mark.parametrize("missing", ["memory.max", "memory.current", "memory.stat"])
def test_free_memory_without_a_container_is_the_systems(account, missing):
    account(100 * MB, 30 * MB)
    (account.folder / missing).unlink()
    assert free_on_processor() == 8192 * MB


def test_free_memory_where_linux_does_not_say(account, monkeypatch):
    """An old kernel, another system, and one that says nothing at all."""
    (account.folder / "meminfo").write_text("MemTotal:       16000000 kB\n")
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert free_on_processor() == 4_096_000
    (account.folder / "meminfo").unlink()
    assert free_on_processor() == 4_096_000
    monkeypatch.delattr(os, "sysconf")
    assert free_on_processor() is None
    account(100 * MB, 30 * MB)
    assert free_on_processor() == 70 * MB
