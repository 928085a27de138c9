"""The download script against servers on loopback: every file arrives right, or is named as missing.

The matrix of tools (curl or wget, md5sum or openssl) is made of folders of links that are the script's whole PATH.
The hub's tests run the hub's own client, which must be installed beside this interpreter.
"""

from __future__ import annotations

import hashlib
import os
import pty
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from support.download_server import PAGE, SIGNATURE, Fault, Hub, Server

pytestmark = pytest.mark.download

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "download.sh"
# Every program that the script may call, but for the clients and the digests.
BASICS = "awk bash cat df dirname du env grep head mkdir mv rm rmdir sed sh sleep sort tail tr wc"
TOOLSETS = [("curl", "md5sum"), ("wget", "openssl")]
PATIENCE = 600  # seconds after which a run counts as hung, however busy the machine is
TOKEN = "hf_notARealTokenButSecretAllTheSame"


def stand_in(shards: int, seed: int, tokenizer: bool = False) -> dict[str, bytes]:
    """One model's folder: small files with the real names, and the checklist that names their sums."""
    noise = random.Random(seed)
    folder = {"params.json": b'{"dim": 64, "n_layers": 2}\n'}
    folder |= {f"consolidated.{shard:02d}.pth": b"PK" + noise.randbytes(60_000) for shard in range(shards)}
    if tokenizer:
        folder["tokenizer.model"] = b"\n" + noise.randbytes(9_000)
    return folder | {"checklist.chk": checklist(folder)}


def checklist(folder: dict[str, bytes]) -> bytes:
    """The lines of md5sum."""
    return "".join(f"{hashlib.md5(body).hexdigest()}  {name}\n" for name, body in folder.items()).encode()


def stand_ins() -> dict[str, bytes]:
    """What lies behind a link: some models of both families, the tokenizer, licence and policy."""
    models = {"llama-2-7b": 1, "llama-2-13b": 2, "llama-2-70b": 8, "llama-2-7b-chat": 1, "CodeLlama-7b": 1}
    models |= {"CodeLlama-34b-Python": 4, "CodeLlama-13b-Instruct": 2}
    files = {"LICENSE": b"COMMUNITY LICENSE\n" * 40, "USE_POLICY.md": b"# Use policy\n" * 40}
    files["tokenizer.model"] = b"\n" + random.Random(0).randbytes(9_000)
    files["tokenizer_checklist.chk"] = checklist({"tokenizer.model": files["tokenizer.model"]})
    for seed, (folder, shards) in enumerate(models.items(), start=1):
        model = stand_in(shards, seed, tokenizer=folder.startswith("Code"))
        files |= {f"{folder}/{name}": body for name, body in model.items()}
    return files


FILES = stand_ins()
SHARD = "llama-2-7b/consolidated.00.pth"


def expected(*folders: str) -> dict[str, bytes]:
    """What a run for these folders leaves, by path."""
    wanted = {name: body for name, body in FILES.items() if name.split("/")[0] in folders}
    for folder in folders:
        wanted |= {f"{folder}/{name}": FILES[name] for name in ("LICENSE", "USE_POLICY.md")}
    if folders[0].startswith("llama"):
        wanted |= {name: FILES[name] for name in ("tokenizer.model", "tokenizer_checklist.chk")}
    return wanted


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(folder: Path, *tools: str) -> str:
    """A PATH with the basics and these tools, and nothing else."""
    folder.mkdir()
    for tool in [*BASICS.split(), *tools]:
        real = shutil.which(tool)
        assert real, f"these tests need {tool}"
        (folder / tool).symlink_to(real)
    return str(folder)


def fake(path: str, name: str, body: str) -> None:
    """Put a shell script into a PATH folder, in place of what has that name there."""
    program = Path(path, name)
    program.unlink(missing_ok=True)
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


@dataclass
class Box:
    """A folder to download into and the tools to do it with."""

    target: Path
    path: str

    def command(self, server: Server, *flags: str) -> tuple[list[str], dict[str, str]]:
        """The command line and the environment of a run; the link travels in the environment."""
        env = {"PATH": self.path, "HOME": str(self.target.parent), "PRESIGNED_URL": server.link}
        env |= {"DOWNLOAD_PAUSE": "0", "DOWNLOAD_TRIES": "3", "TARGET_FOLDER": str(self.target)}
        return [str(SCRIPT), "--no-space-check", *flags], env

    def run(self, server: Server, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script to its end, with nobody at the keyboard."""
        command, env = self.command(server, *flags)
        pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        return subprocess.run(command, env=env | variables, cwd=self.target.parent, timeout=PATIENCE, **pipes)

    def start(self, server: Server, *flags: str) -> subprocess.Popen[str]:
        """Start the script as the leader of its own process group, which Ctrl-C reaches as it does at a terminal."""
        command, env = self.command(server, *flags)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the child of one that ignores it could not trap it
        try:
            return subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        finally:
            signal.signal(signal.SIGINT, before)

    def put(self, name: str, body: bytes) -> Path:
        """A file that was there before."""
        path = self.target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        return path


@pytest.fixture(params=TOOLSETS, ids="+".join)
def box(request, tmp_path):
    """A box for each client, with one digest or the other."""
    return Box(tmp_path / "target", only(tmp_path / "bin", *request.param))


@pytest.fixture
def curl_box(tmp_path):
    """A box for what does not depend on the tools."""
    return Box(tmp_path / "target", only(tmp_path / "bin", "curl", "md5sum"))


@pytest.fixture
def server():
    """A server of the stand-ins that behaves, until a test gives it faults."""
    with Server(FILES) as running:
        yield running


# ---- what a good run leaves


def test_everything_arrives_and_is_skipped_the_second_time(box, server):
    first = box.run(server, "--models", "7B-chat,13B")
    assert first.returncode == 0, first.stderr
    assert tree(box.target) == expected("llama-2-7b-chat", "llama-2-13b")
    assert len(first.stdout.splitlines()) == len(tree(box.target)) + 3, "one line per file, and how to run the two"
    assert "\r" not in first.stdout
    asked = len(server.requests)
    assert asked == len(tree(box.target))
    second = box.run(server, "--models", "7B-chat,13B")
    assert second.returncode == 0
    assert second.stdout.count("already, skipped") == asked
    assert len(server.requests) == asked


def test_code_llama_has_its_tokenizer_inside(box, server):
    models = "34b-Python,CodeLlama-13b-instruct,7b"
    run = box.run(server, "--models", models, "--jobs", "3")
    assert run.returncode == 0, run.stderr
    assert tree(box.target) == expected("CodeLlama-34b-Python", "CodeLlama-13b-Instruct", "CodeLlama-7b")


def test_eight_files_by_four_jobs_are_each_asked_for_once(box, server):
    run = box.run(server, "--models", "70B", "--jobs", "4")
    assert run.returncode == 0, run.stderr
    assert tree(box.target) == expected("llama-2-70b")
    assert len(server.requests) == len(expected("llama-2-70b"))


def test_the_last_lines_run_what_was_downloaded(curl_box, server):
    folder = curl_box.target.parent / "a folder"
    run = curl_box.run(server, "--models", "7B-chat,7B", "--dir", str(folder))
    chat, text = run.stdout.splitlines()[-2:]
    assert "example_chat_completion.py --ckpt_dir" in chat
    assert "example_text_completion.py --ckpt_dir" in text
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True).stdout.splitlines()
    assert Path(words[words.index("--ckpt_dir") + 1], "params.json").is_file()
    assert Path(words[words.index("--tokenizer_path") + 1]).is_file()
    assert Path(words[1]) == REPOSITORY / "example_text_completion.py"


def test_in_the_repository_nothing_tracked_is_written(curl_box, server):
    """Meta's licence has the name of the project's own: it goes into the model's folder."""
    curl_box.target.mkdir()
    shutil.copy(REPOSITORY / ".gitignore", curl_box.target)
    curl_box.put("LICENSE", b"ours")
    git = ["git", "-C", str(curl_box.target)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    command, env = curl_box.command(server, "--models", "7B")
    del env["TARGET_FOLDER"]
    shutil.copy(SCRIPT, curl_box.target)
    here = subprocess.run(command, env=env, cwd=curl_box.target, capture_output=True, text=True)
    assert here.returncode == 0, here.stderr
    assert here.stdout.splitlines()[-1].split()[-4:] == [
        "--ckpt_dir",
        "llama-2-7b/",
        "--tokenizer_path",
        "tokenizer.model",
    ]
    assert (curl_box.target / "llama-2-7b" / "LICENSE").read_bytes() == FILES["LICENSE"]
    (curl_box.target / "download.sh").unlink()
    untracked = ["ls-files", "--others", "--modified", "--exclude-standard"]
    assert subprocess.run([*git, *untracked], capture_output=True, text=True).stdout == ""


# ---- servers that misbehave


def test_403_from_the_start_stops_at_once(box, server):
    server.faults = [Fault("*", "status", status=403)]
    run = box.run(server, "--models", "7B,13B")
    assert run.returncode == 1
    assert "HTTP 403" in run.stderr
    assert "24 hours" in run.stderr
    assert len(server.requests) == 1
    assert tree(box.target) == {}
    for name in expected("llama-2-7b", "llama-2-13b"):
        assert name in run.stderr


def test_403_midway_keeps_what_was_verified(box, server):
    server.faults = [Fault("*.pth", "status", status=403, skip=1, times=1)]
    run = box.run(server, "--models", "13B")
    assert run.returncode == 1
    assert "HTTP 403" in run.stderr
    assert run.stderr.endswith("verified:\n  llama-2-13b/consolidated.01.pth: not fetched\n")
    before = len(server.requests)
    assert box.run(server, "--models", "13B").returncode == 0
    assert [request.path for request in server.requests[before:]] == ["llama-2-13b/consolidated.01.pth"]
    assert tree(box.target) == expected("llama-2-13b")


def test_403_ends_the_transfers_beside_it(box, server):
    """Three jobs stall for good, the fourth is refused: nobody waits for the three."""
    server.faults = [Fault("*00.pth", "status", status=403), Fault("*.pth", "stall", at=5_000)]
    run = box.run(server, "--models", "70B", "--jobs", "4", DOWNLOAD_TIMEOUT="20")
    assert run.returncode == 1
    assert "HTTP 403" in run.stderr
    assert len(server.asked("*.pth")) <= 4, "none of the three was tried again"
    assert [name for name in tree(box.target) if name.endswith(".pth")] == []


def test_416_for_a_complete_part_is_success(box, server):
    box.put(SHARD + ".part", FILES[SHARD])
    assert box.run(server, "--models", "7B").returncode == 0
    assert [request.status for request in server.asked(SHARD)] == [416]
    assert tree(box.target) == expected("llama-2-7b")


def test_416_for_a_wrong_part_starts_again(box, server):
    """The classic trap: an error page or a mixed file of full length, which the server calls complete."""
    box.put(SHARD + ".part", FILES[SHARD][:-1] + b"?")
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0, run.stderr
    assert [request.status for request in server.asked(SHARD)] == [416, 200]
    assert tree(box.target) == expected("llama-2-7b")


@pytest.mark.parametrize("where", [SHARD, SHARD + ".part"])
def test_an_error_page_of_an_earlier_run_is_replaced(box, server, where):
    box.put(where, PAGE)
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0, run.stderr
    assert tree(box.target) == expected("llama-2-7b")


def test_500_is_tried_again_after_growing_pauses(box, server):
    server.faults = [Fault(SHARD, "status", status=500, times=2)]
    slept = box.target.parent / "slept"
    fake(box.path, "sleep", f'echo "$1" >> "{slept}"')
    run = box.run(server, "--models", "7B", DOWNLOAD_PAUSE="3")
    assert run.returncode == 0, run.stderr
    assert [request.status for request in server.asked(SHARD)] == [500, 500, 200]
    assert slept.read_text().split() == ["3", "6"]


def test_500_for_ever_gives_one_file_up_and_fetches_the_rest(box, server):
    server.faults = [Fault(SHARD, "status", status=503)]
    run = box.run(server, "--models", "7B,7B-chat")
    assert run.returncode == 1
    assert run.stderr.endswith(f"not verified:\n  {SHARD}: the server answered HTTP 503\n")
    assert len(server.asked(SHARD)) == 3
    wanted = expected("llama-2-7b", "llama-2-7b-chat")
    del wanted[SHARD]
    assert tree(box.target) == wanted


def test_a_missing_file_is_named(box, server):
    server.faults = [Fault(SHARD, "status", status=404)]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert f"{SHARD}: the server answered HTTP 404" in run.stderr
    assert len(server.asked(SHARD)) == 1


def test_a_cut_connection_resumes_where_it_was(box, server):
    server.faults = [Fault(SHARD, "cut", at=20_000, times=1)]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0, run.stderr
    assert [request.range for request in server.asked(SHARD)] == [None, "bytes=20000-"]
    assert tree(box.target) == expected("llama-2-7b")


def test_cuts_do_not_count_while_bytes_arrive(box, server):
    server.faults = [Fault(SHARD, "cut", at=7_000, times=8)]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0, run.stderr
    assert len(server.asked(SHARD)) == 9
    assert tree(box.target) == expected("llama-2-7b")


def test_without_a_checksum_halves_are_not_joined(box, server):
    server.faults = [Fault("LICENSE", "cut", at=100, times=1)]
    assert box.run(server, "--models", "7B").returncode == 0
    assert [request.range for request in server.asked("LICENSE")] == [None, None]
    assert tree(box.target) == expected("llama-2-7b")


def test_without_a_checksum_a_part_is_never_the_file(box, server):
    server.faults = [Fault("LICENSE", "cut", at=100)]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert "llama-2-7b/LICENSE: no connection, or it was cut" in run.stderr
    assert "llama-2-7b/LICENSE" not in tree(box.target)


def test_a_stalled_connection_counts_as_lost(box, server):
    server.faults = [Fault(SHARD, "stall", at=30_000, times=1)]
    run = box.run(server, "--models", "7B", DOWNLOAD_TIMEOUT="1")
    assert run.returncode == 0, run.stderr
    assert [request.range for request in server.asked(SHARD)] == [None, "bytes=30000-"]
    assert tree(box.target) == expected("llama-2-7b")


def test_a_wrong_byte_once_is_fetched_again(box, server):
    server.faults = [Fault(SHARD, "corrupt", at=31_000, times=1)]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0
    assert "the checksum is wrong; fetched again from the start" in run.stderr
    assert tree(box.target) == expected("llama-2-7b")


def test_a_wrong_byte_for_ever_is_an_error(box, server):
    """Neither the file nor the checklist that it contradicts keeps its name."""
    server.faults = [Fault(SHARD, "corrupt", at=31_000)]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert f"{SHARD}: the checksum is wrong" in run.stderr
    assert len(server.asked(SHARD)) == 2
    wanted = expected("llama-2-7b")
    del wanted[SHARD], wanted["llama-2-7b/checklist.chk"]
    assert tree(box.target) == wanted


def test_a_wrong_byte_in_the_checklist_heals(box, server):
    lines = FILES["llama-2-7b/checklist.chk"]
    digit = re.search(rb"[0-9](?=[0-9a-f]*  consolidated)", lines).start()  # one digit becomes another
    server.faults = [Fault("*/checklist.chk", "corrupt", at=digit, times=1)]
    assert box.run(server, "--models", "7B").returncode == 1
    assert box.run(server, "--models", "7B").returncode == 0
    assert tree(box.target) == expected("llama-2-7b")


def test_a_file_has_no_name_before_its_checksum_was_compared(tmp_path, server):
    """A run that is killed while it compares would leave a wrong file under the right name."""
    path = only(tmp_path / "bin", "curl", "md5sum")
    fake(
        path,
        "md5sum",
        f'{shutil.which("readlink")} /proc/self/fd/0 >> "{tmp_path}/compared"\nexec {shutil.which("md5sum")}',
    )
    box = Box(tmp_path / "target", path)
    server.faults = [Fault(SHARD, "corrupt", at=31_000, times=1)]
    assert box.run(server, "--models", "7B").returncode == 0
    compared = [line for line in (tmp_path / "compared").read_text().splitlines() if line.startswith(str(box.target))]
    names = [SHARD, SHARD, "llama-2-7b/params.json", "tokenizer.model"]  # the shard twice, as it came wrong at first
    assert sorted(compared) == [str(box.target / f"{name}.part") for name in names]
    assert tree(box.target) == expected("llama-2-7b")


@pytest.mark.parametrize("name", [SHARD, "LICENSE", "tokenizer.model", "llama-2-7b/params.json"])
def test_a_web_page_is_not_a_file(box, server, name):
    server.faults = [Fault(name, "page")]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert "a web page came instead of the file" in run.stderr
    assert PAGE not in tree(box.target).values()
    assert not list(box.target.rglob("*.part"))


def test_a_web_page_for_the_checklist_leaves_the_model_unfetched(box, server):
    server.faults = [Fault("*/checklist.chk", "page")]
    run = box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert f"{SHARD}: its checklist is missing" in run.stderr
    assert server.asked(SHARD) == []


def test_no_range_support_still_ends_well(box, server):
    server.faults = [Fault(SHARD, "no range")]
    box.put(SHARD + ".part", FILES[SHARD][:20_000])
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0, run.stderr
    assert tree(box.target) == expected("llama-2-7b")


def test_without_a_network_it_ends_after_one_file(box, server):
    with Server({}) as closed:
        link = closed.link
    run = box.run(server, "--models", "7B", PRESIGNED_URL=link)
    assert run.returncode == 1
    assert "no connection to the server" in run.stderr
    assert run.stderr.count("trying again") == 2


def test_a_trickle_is_no_error(box, server):
    server.faults = [Fault("*tokenizer.model", "trickle")]
    assert box.run(server, "--models", "7B", DOWNLOAD_TIMEOUT="1").returncode == 0
    assert len(server.asked("tokenizer.model")) == 1
    assert tree(box.target) == expected("llama-2-7b")


def test_a_redirect_is_followed(box, server):
    server.faults = [Fault("*", "redirect")]
    assert box.run(server, "--models", "7B").returncode == 0
    assert tree(box.target) == expected("llama-2-7b")
    assert {request.status for request in server.asked("moved/*")} == {200}


def test_a_wrong_file_under_its_real_name_is_fetched_again(box, server):
    box.put(SHARD, FILES[SHARD][:40_000])
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0
    assert f"{SHARD}: does not match its checksum" in run.stderr
    assert [request.range for request in server.asked(SHARD)] == ["bytes=40000-"]
    assert tree(box.target) == expected("llama-2-7b")


# ---- the link


REPAIRED = {
    "spaces": "  {link} \t",
    "carriage return": "{link}\r",
    "quotes": '"{link}"',
    "angle brackets": "<{link}>",
    "wrapped lines": "{half}\r\n{rest}",
    "escaped ampersands": "{escaped}",
    "escaped star": "{percent}",
    "l.facebook.com": "https://l.facebook.com/l.php?u={quoted}&h=AT0abc&s=1",
    "safelinks": "https://nam02.safelinks.protection.outlook.com/?data=05%7C02&url={quoted}&reserved=0",
}


@pytest.mark.parametrize("form", REPAIRED)
def test_a_mangled_link_is_repaired(curl_box, server, form):
    link = server.link
    parts = {"link": link, "half": link[:40], "rest": link[40:], "quoted": quote(link, safe="")}
    parts |= {"escaped": link.replace("&", "&amp;"), "percent": link.replace("*", "%2A")}
    run = curl_box.run(server, "--models", "7B", "--url", REPAIRED[form].format(**parts))
    assert run.returncode == 0, run.stderr
    assert tree(curl_box.target) == expected("llama-2-7b")


META = f"*?{SIGNATURE}"
REFUSED = {
    "someone@example.com": "e-mail address",
    "what": "does not begin with https://",
    "file:///etc/*?x": "does not begin with https://",
    f"https://download.llamameta.net/llama-2-7b/?{SIGNATURE}": "no * in it",
    "https://l.facebook.com/l.php?h=AT0abc": "copy the text of the link, not its address",
    f"https://www.google.com/url?q=https://download.llamameta.net/{META}": "copy the text of the link, not its address",
    f"https://urldefense.com/v3/__https:/download.llamameta.net/?{SIGNATURE}": "copy the text of the link",
    f"https://llama3-1.llamameta.net/{META}": "another model family",
    f"https://download6.llamameta.net/{META}": "another model family",
    f"https://download2.llamameta.net/{META}": 'Code Llama has no model "7B-chat"',
    "https://download.llamameta.net/*?Policy=eyJ": "its end is missing",
    f"https://download.llamameta.net/{META} thanks": "there is a space in it",
    f"https://download.llamameta.net/{META}`id`": "characters that no link has",
}


@pytest.mark.parametrize("link", REFUSED)
def test_a_wrong_link_is_refused_before_anything_is_fetched(curl_box, server, link):
    run = curl_box.run(server, "--models", "7B-chat", "--url", link)
    assert run.returncode in (1, 2)
    assert REFUSED[link] in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not curl_box.target.exists()


def test_a_link_for_llama_is_not_for_code_llama(curl_box, server):
    run = curl_box.run(server, "--models", "34b", "--url", f"https://download.llamameta.net/{META}")
    assert 'Llama 2 has no model "34b"' in run.stderr


def test_the_family_can_be_said(curl_box, server):
    run = curl_box.run(server, "--models", "7B", "--family", "codellama")
    assert run.returncode == 0, run.stderr
    assert tree(curl_box.target) == expected("CodeLlama-7b")


def test_the_link_can_come_from_standard_input(curl_box, server):
    command, env = curl_box.command(server, "--models", "7B", "--url", "-")
    run = subprocess.run(command, env=env, input=f" {server.link} \r\n", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert tree(curl_box.target) == expected("llama-2-7b")


# ---- prompts, flags, tools


def test_without_a_terminal_nothing_is_asked(curl_box, server):
    for missing, said in ({"PRESIGNED_URL": ""}, "no link"), ({"MODEL_SIZE": ""}, "no models"):
        run = curl_box.run(server, **missing)
        assert run.returncode == 2
        assert said in run.stderr
        assert run.stdout == ""
    assert server.requests == []


def test_everything_can_come_from_the_environment(curl_box, server):
    assert curl_box.run(server, MODEL_SIZE="7B").returncode == 0
    assert tree(curl_box.target) == expected("llama-2-7b")


def at_a_terminal(box: Box, server: Server, answers: list[str], *flags: str) -> tuple[int, str]:
    """Run with a terminal for input and output, answering the questions in turn; status and what the screen got."""
    command, env = box.command(server, *flags)
    del env["PRESIGNED_URL"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as run:
        os.close(theirs)
        screen = b""
        while True:
            try:
                screen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if screen.endswith(b": ") and answers:
                os.write(ours, answers.pop(0).encode() + b"\n")
    os.close(ours)
    return run.returncode, screen.decode()


def test_at_a_terminal_it_asks_and_shows_progress(box, server):
    status, screen = at_a_terminal(box, server, [f" {server.link} ", "7B,7b-chat"])
    assert status == 0, screen
    assert tree(box.target) == expected("llama-2-7b", "llama-2-7b-chat")
    assert "consolidated.00.pth: 0 MB" in screen
    assert "\r\x1b[K" in screen


def test_enter_means_all_models(curl_box, server):
    """Without a checklist for most of them the run fails, but has asked for each."""
    status, _ = at_a_terminal(curl_box, server, [server.link, ""])
    assert status == 1
    asked = {request.path.split("/")[0] for request in server.asked("*/checklist.chk")}
    assert asked == {f"llama-2-{size}{chat}" for size in ("7b", "13b", "70b") for chat in ("", "-chat")}


def test_a_missing_tool_is_named_before_the_question(tmp_path, server):
    for tools, said in (["md5sum"], "curl or wget"), (["curl"], "one of: md5sum; md5 -q; openssl md5"):
        box = Box(tmp_path / "target", only(tmp_path / said[-5:], *tools))
        status, screen = at_a_terminal(box, server, [])
        assert status == 1
        assert f"missing: {said}" in screen
        assert "Paste" not in screen


def test_another_wget_is_not_used(tmp_path, server):
    box = Box(tmp_path / "target", only(tmp_path / "bin", "md5sum"))
    fake(box.path, "wget", "echo 'wget: unrecognized option' >&2; exit 1")
    run = box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert "GNU wget" in run.stderr


@pytest.mark.parametrize("corrupt", [False, True])
def test_the_digest_of_macos(tmp_path, server, corrupt):
    box = Box(tmp_path / "target", only(tmp_path / "bin", "curl"))
    fake(box.path, "md5", f'[ "$*" = -q ] && {shutil.which("openssl")} md5 -r | {shutil.which("cut")} -c 1-32')
    server.faults = [Fault(SHARD, "corrupt", at=9)] if corrupt else []
    run = box.run(server, "--models", "7B")
    assert run.returncode == (1 if corrupt else 0), run.stderr
    assert (SHARD in tree(box.target)) != corrupt


WRONG = {
    "--jobs 0": "whole number",
    "--jobs x": "whole number",
    "--nonsense 1": "unknown flag",
    "stray": "what is",
    "--url": "needs a value",
    "--models 8B": 'no model "8B"',
    "--models ,": "no models",
    "--layout hf": "needs --from hf",
    "--from ftp": "--from is meta or hf",
    "--family llama3": "--family is",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_usage_is_said_and_has_status_2(curl_box, server, flags):
    run = curl_box.run(server, *flags.split())
    assert run.returncode == 2
    assert WRONG[flags] in run.stderr
    assert server.requests == []


def test_help_is_the_header(curl_box, server):
    run = curl_box.run(server, "--help")
    assert run.returncode == 0
    said = "--url --models --dir --jobs --family --from --layout DOWNLOAD_PAUSE HF_TOKEN"
    assert [word for word in said.split() if word not in run.stdout] == []


def test_disk_space_is_compared_first(curl_box, server):
    command, env = curl_box.command(server, "--models", "13B,7B")
    command.remove("--no-space-check")
    space = "printf 'Filesystem 1024-blocks Used Available Capacity Mounted on\\n/dev/a b 9 9 %d 1%% /mnt/x y\\n' {}"
    fake(curl_box.path, "df", space.format(38_000_000))  # 38.9 GB for 39.5 GB of models
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 1
    assert "not enough room" in run.stderr
    assert "40 GB more are needed, 38 GB are free" in run.stderr
    assert server.requests == []
    fake(curl_box.path, "du", "echo 900000 $2")  # 0.9 GB of each model are here already
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert tree(curl_box.target) == expected("llama-2-7b", "llama-2-13b")


def test_a_folder_that_cannot_be_written_is_said(curl_box, server):
    curl_box.target.write_text("a file where the folder should be")
    run = curl_box.run(server, "--models", "7B")
    assert run.returncode == 1
    assert "cannot make or enter the folder" in run.stderr


# ---- shells and copies


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "bash --posix"])
def test_any_shell_can_start_it(curl_box, server, shell):
    (command, *flags), env = curl_box.command(server, "--models", "7B")
    program = [shutil.which(shell.split()[0]), *shell.split()[1:]]
    run = subprocess.run([*program, command, *flags], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert tree(curl_box.target) == expected("llama-2-7b")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_copy_with_windows_line_ends_works(curl_box, server, shell):
    copy = curl_box.target.parent / "download.sh"
    copy.write_bytes(SCRIPT.read_bytes().replace(b"\n", b"\r\n"))
    (_, *flags), env = curl_box.command(server, "--models", "7B")
    command = [shutil.which(shell), str(copy), *flags]
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert tree(curl_box.target) == expected("llama-2-7b")


def test_git_keeps_its_line_ends_and_its_mode():
    lines = [line.split() for line in (REPOSITORY / ".gitattributes").read_text().splitlines()]
    assert ["*.sh", "text", "eol=lf"] in lines
    assert b"\r" not in SCRIPT.read_bytes()
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


NEWER = {
    "associative array": (r"\b(declare|local|typeset)\s+-[a-zA-Z]*A", "declare -A x"),
    "name reference": (r"\b(declare|local|typeset)\s+-[a-zA-Z]*n", "local -n x=y"),
    "global declare": (r"\b(declare|typeset)\s+-[a-zA-Z]*g", "declare -g x"),
    "case change": (r"\$\{[^}]*(\^|,)\1?\}|\$\{\w+(\[[^]]*\])?(,|\^)", "${x,,}"),
    "transformation": (r"\$\{\w+(\[[@*]\])?@[A-Za-z]\}", "${x@Q}"),
    "mapfile": (r"\b(mapfile|readarray)\b", "mapfile -t x"),
    "append both": (r"&>>", "x &>> y"),
    "pipe both": (r"\|&", "x |& y"),
    "is set": (r"(\[\[|\btest|\[) -v\b", "[[ -v x ]]"),
    "coprocess": (r"\bcoproc\b", "coproc x"),
    "negative length": (r"\$\{\w+:[^:}]*:\s*-", "${x:0:-1}"),
    "negative index": (r"\w\[-\d", "x[-1]=y"),
    "printf time": (r"printf\b.*%\([^)]*\)T", "printf '%(%F)T'"),
    "printf into element": (r"printf\s+-v\s+\w+\[", "printf -v x[1] y"),
    "wait for any": (r"\bwait\s+-[a-z]", "wait -n"),
    "fall through": (r";;?&", ";;&"),
    "variables of bash 4 and 5": (r"\b(BASHPID|EPOCH\w+|SRANDOM|BASH_ARGV0)\b", "$BASHPID"),
    "descriptor variable": (r"\{\w+\}[<>]", "exec {fd}>x"),
    "options of bash 4": (r"\b(globstar|lastpipe|inherit_errexit)\b", "shopt -s globstar"),
    "local options": (r"\blocal\s+-\s*$", "local -"),
    "unicode escape": (r"\\u[0-9a-fA-F]{4}", r"$'\u00e9'"),
    "step in braces": (r"\{\w+\.\.\w+\.\.\w+\}", "{1..9..2}"),
    "read of bash 4": (r"\bread\s+(-\w+\s+)*-[iN]\b", "read -N 1"),
    "unguarded empty array": (r'(?<!\+)"\$\{(FOLDERS|NAMES|FILES|SUMS|names)\[@\]\}"', 'x "${FILES[@]}"'),
}


@pytest.mark.parametrize("construct", NEWER)
def test_nothing_newer_than_bash_3_2(construct):
    """Each pattern finds its example and nothing in the script.

    An empty array under `set -u` is an error in that bash, so expansions are guarded with ${x[@]+...} or named here.
    """
    pattern, example = NEWER[construct]
    assert re.search(pattern, example, re.MULTILINE)
    known_not_empty = ('for folder in "${FOLDERS[@]}"', 'hub "$1" shown "${names[@]}"')
    for number, line in enumerate(SCRIPT.read_text().splitlines(), start=1):
        if construct == "unguarded empty array" and any(known in line for known in known_not_empty):
            continue
        assert not re.search(pattern, line), f"{construct} in line {number}: {line}"


def test_shellcheck_is_content():
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert checker, "these tests need shellcheck"
    run = subprocess.run([checker, str(SCRIPT)], capture_output=True, text=True)
    assert run.stdout == ""


# ---- ends that were not planned


def test_ctrl_c_leaves_parts_that_resume(box, server):
    total = sum(map(len, expected("llama-2-7b").values()))
    started = []
    server.faults = [Fault(SHARD, "stall", at=30_000, times=1)]
    server.after_bytes = (total - 35_000, lambda: os.killpg(started[0].pid, signal.SIGINT))
    with server.lock:  # no byte is counted before the script's number is known
        started.append(box.start(server, "--models", "7B"))
    out, _ = started[0].communicate(timeout=PATIENCE)
    assert started[0].returncode == 130
    assert "run the same command again" in out
    assert not (box.target / ".download").exists()
    part = (box.target / (SHARD + ".part")).stat().st_size
    assert 0 < part < len(FILES[SHARD])
    assert box.run(server, "--models", "7B").returncode == 0
    assert server.asked(SHARD)[-1].range == f"bytes={part}-"
    assert tree(box.target) == expected("llama-2-7b")


@pytest.mark.parametrize("turn", range(20))
def test_killed_at_any_moment_it_ends_well_the_next_time(tmp_path, server, turn):
    """TERM, KILL of the script alone (its transfers live on), KILL of the whole group; a moment is a count of bytes."""
    box = Box(tmp_path / "target", only(tmp_path / "bin", TOOLSETS[turn % 2][0], "md5sum"))
    kind = (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)[turn % 3]
    send = os.killpg if turn % 3 == 2 else os.kill
    wanted = expected("llama-2-7b", "llama-2-13b")
    moment = random.Random(turn).randint(1, sum(map(len, wanted.values())))
    started = []
    server.after_bytes = (moment, lambda: send(started[0].pid, kind))
    server.faults = [Fault("*tokenizer.model", "trickle")]
    with server.lock:  # no byte is counted before the script's number is known
        started.append(box.start(server, "--models", "7B,13B", "--jobs", str(1 + turn % 3)))
    started[0].wait(timeout=PATIENCE)
    for name, body in tree(box.target).items():
        assert name.endswith(".part") or name.startswith(".download/") or body == wanted[name], name
    run = box.run(server, "--models", "7B,13B")
    assert run.returncode == 0, run.stderr
    assert tree(box.target) == wanted
    started[0].stdout.close()


def test_two_runs_do_not_share_a_folder(curl_box, server):
    others = []
    server.after_bytes = (30_000, lambda: others.append(curl_box.run(server, "--models", "13B")))
    assert curl_box.run(server, "--models", "7B").returncode == 0
    assert others[0].returncode == 1
    assert "another download.sh" in others[0].stderr
    assert tree(curl_box.target) == expected("llama-2-7b")


def visible(secret: str) -> list[str]:
    """The command lines of all processes that show a text."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_text(errors="replace"))
        except OSError:  # it has ended
            continue
    return [line for line in lines if secret in line]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the list of processes is read from /proc")
def test_no_process_shows_the_link(box, server):
    seen = []
    server.after_bytes = (30_000, lambda: seen.append((visible("K15"), visible("llama-2-7b/consolidated"))))
    run = box.run(server, "--models", "7B")
    assert run.returncode == 0
    shown, transfers = seen[0]
    assert transfers, "the transfer was looked at"
    assert shown == []
    assert "K15" not in run.stdout + run.stderr


# ---- the hub


def hub_files() -> dict[str, bytes]:
    """Two repositories with the names that the hub has, in the original and in the Hugging Face layout."""
    original, layout = "meta-llama/Llama-2-7b-chat/", "meta-llama/Llama-2-7b-chat-hf/"
    files = {original + name.split("/")[1]: body for name, body in FILES.items() if name.startswith("llama-2-7b-chat/")}
    files |= {original + name: FILES[name] for name in ("tokenizer.model", "tokenizer_checklist.chk", "USE_POLICY.md")}
    files |= {original + "LICENSE.txt": FILES["LICENSE"], original + "README.md": b"not asked for"}
    small = "config generation_config tokenizer tokenizer_config special_tokens_map"
    files |= {f"{layout}{name}.json": b'{"a": 1}' for name in small.split()}
    weights = [f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
    index = ", ".join(f'"layer{number}": "{name}"' for number, name in enumerate(weights))
    files[layout + "model.safetensors.index.json"] = f'{{"weight_map": {{{index}}}}}'.encode()
    files |= {layout + name: random.Random(name).randbytes(50_000) for name in weights}
    files |= {layout + "pytorch_model-00001-of-00001.bin": b"not asked for", layout + "tokenizer.model": b"\nmodel"}
    return files


HUB_FILES = hub_files()


def hub_expected(folder: str) -> dict[str, bytes]:
    """What a run for this folder leaves, but for the client's own notes."""
    repository = f"meta-llama/L{folder[1:]}/"
    ours = {name: body for name, body in HUB_FILES.items() if name.startswith(repository)}
    return {f"{folder}/{name.removeprefix(repository)}": ours[name] for name in ours if ours[name] != b"not asked for"}


def hub_tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but for the client's own notes."""
    return {name: body for name, body in tree(folder).items() if "/.cache/" not in name}


@pytest.fixture
def hub():
    """A hub that wants the token."""
    with Hub(HUB_FILES, token=TOKEN) as running:
        yield running


@dataclass
class HubBox(Box):
    """A box whose client is the hub's; `token` is what its user has."""

    token: str = TOKEN

    def command(self, server: Server, *flags: str) -> tuple[list[str], dict[str, str]]:
        """The link gives way to the hub's address and the token."""
        command, env = super().command(server, "--from", "hf", "--models", "7B-chat", *flags)
        del env["PRESIGNED_URL"]
        env |= {"HF_ENDPOINT": server.root, "HF_HOME": str(self.target.parent / "hf"), "HF_HUB_DISABLE_XET": "1"}
        return command, env | ({"HF_TOKEN": self.token} if self.token else {})


@pytest.fixture
def hub_box(tmp_path):
    """Only the hub's client and a digest."""
    path = only(tmp_path / "bin", "md5sum", "sha256sum")
    client = Path(sys.executable).parent / "hf"
    assert client.exists(), "these tests need the package huggingface_hub"
    Path(path, "hf").symlink_to(client)
    return HubBox(tmp_path / "target", path)


@pytest.mark.parametrize(("layout", "folder"), [("original", "llama-2-7b-chat"), ("hf", "llama-2-7b-chat-hf")])
def test_hub_files_arrive_are_skipped_and_heal(hub_box, hub, layout, folder):
    flags = ["--layout", layout, "--jobs", "2"]
    first = hub_box.run(hub, *flags)
    assert first.returncode == 0, first.stderr
    assert hub_tree(hub_box.target) == hub_expected(folder)
    assert "example_chat_completion.py" in first.stdout
    asked = len(hub.requests)
    second = hub_box.run(hub, *flags)
    assert second.returncode == 0
    assert second.stdout.count("already, skipped") == len(first.stdout.splitlines()) - 2
    assert len(hub.requests) == asked
    weights = next(hub_box.target.rglob("consolidated.00.pth" if layout == "original" else "*.safetensors"))
    body = weights.read_bytes()
    weights.write_bytes(body[:500] + b"?" + body[501:])
    third = hub_box.run(hub, *flags)
    assert third.returncode == 0, third.stderr
    assert "does not match its checksum" in third.stderr
    assert hub_tree(hub_box.target) == hub_expected(folder)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_hub_wrong_byte_for_ever_is_an_error(hub_box, hub, layout):
    hub.faults = [Fault("*.pth", "corrupt", at=500), Fault("*.safetensors", "corrupt", at=500)]
    run = hub_box.run(hub, "--layout", layout)
    assert run.returncode == 1
    assert run.stderr.endswith(": it did not come, or its checksum is wrong\n")
    assert not [name for name in hub_tree(hub_box.target) if name.endswith((".pth", ".safetensors", ".part"))]


@pytest.mark.parametrize(("token", "gated"), [("", "GatedRepo"), ("", "RepoNotFound"), ("hf_other", "GatedRepo")])
def test_hub_without_access_says_where_to_ask(hub_box, hub, token, gated):
    hub.gated, hub_box.token = gated, token
    run = hub_box.run(hub)
    assert run.returncode == 1
    assert f"no access to meta-llama/Llama-2-7b-chat: ask for it at {hub.root}/meta-llama/Llama-2-7b-chat" in run.stderr
    assert hub_tree(hub_box.target) == {}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the list of processes is read from /proc")
def test_hub_token_is_never_seen(hub_box, hub):
    seen = []
    hub.after_bytes = (40_000, lambda: seen.append((visible(TOKEN), visible("consolidated.00.pth"))))
    run = hub_box.run(hub)
    assert run.returncode == 0
    shown, transfers = seen[0]
    assert transfers, "the client was looked at"
    assert shown == []
    assert "hf_" not in run.stdout + run.stderr


def test_hub_ctrl_c_ends_the_client(hub_box, hub):
    """The client runs where Ctrl-C does not reach it, so the script must end it."""
    started = []
    hub.faults = [Fault("*.pth", "stall", at=30_000)]
    hub.after_bytes = (30_000, lambda: os.killpg(started[0].pid, signal.SIGINT))
    with hub.lock:  # no byte is counted before the script's number is known
        started.append(hub_box.start(hub))
    out, _ = started[0].communicate(timeout=PATIENCE)  # ends when nothing holds the pipe any more
    assert started[0].returncode == 130
    assert "run the same command again" in out
    assert "llama-2-7b-chat/consolidated.00.pth" not in hub_tree(hub_box.target)


def test_hub_errors_are_stripped_of_tokens(hub_box, hub):
    fake(hub_box.path, "hf", f"echo 'Error: something about {TOKEN}' >&2; exit 1")
    run = hub_box.run(hub)
    assert run.returncode == 1
    assert "the hub's client stopped: Error: something about hf_..." in run.stderr
    assert TOKEN not in run.stderr + run.stdout


def test_hub_client_missing(hub_box, hub):
    Path(hub_box.path, "hf").unlink()
    run = hub_box.run(hub)
    assert run.returncode == 1
    assert "missing: hf" in run.stderr


# ---- what arrives can be opened


def test_a_downloaded_model_in_two_files_opens_at_one_rank(curl_box, tmp_path):
    """The demo checkpoint cut in two, by the link and back through Llama.build, says what the demo says."""
    from llama import Llama
    from llama.convert import convert

    demo = REPOSITORY / "demo"
    convert(demo, tmp_path / "made", shards=2)
    folder = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    tokenizer = {"tokenizer.model": folder.pop("tokenizer.model")}
    folder["checklist.chk"] = checklist({name: body for name, body in folder.items() if name != "checklist.chk"})
    files = {f"llama-2-13b/{name}": body for name, body in folder.items()}
    files |= tokenizer | {"tokenizer_checklist.chk": checklist(tokenizer)}
    files |= {name: FILES[name] for name in ("LICENSE", "USE_POLICY.md")}
    with Server(files) as server:
        run = curl_box.run(server, "--models", "13B")
    assert run.returncode == 0, run.stderr
    options = {"temperature": 0, "max_gen_len": 12}
    [ours, theirs] = (
        Llama.build(where, device="cpu", dtype="float32").text_completion(["Once upon a time"], **options)
        for where in (curl_box.target / "llama-2-13b", demo)
    )
    assert ours == theirs
    assert len(ours[0]["generation"]) > 20
