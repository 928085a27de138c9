"""A loopback stand-in for the servers that hold weights, which misbehaves on request.

It knows HTTP, byte ranges, signatures in the query and the few addresses of the hub that the hub's client asks for;
it knows nothing of the download script. A test hands it files and faults, and reads the requests it got.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

SIGNATURE = "Policy=eyJTdGF0ZW1lbnQ_&Signature=a~b-c%7Ed__&Key-Pair-Id=K15"
PAGE = b"<!DOCTYPE html>\n<html><body>Please sign in to the network.</body></html>\n"
CHUNK = 1024
BIG = (".pth", ".safetensors", ".model")  # what the hub keeps outside git, named by its SHA-256


def git_object(body: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def lfs_facts(body: bytes) -> dict:
    """What the hub says of a file that is kept outside git."""
    return {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}


@dataclass
class Fault:
    """What goes wrong, for paths that match `pattern`: the first `skip` requests are spared, the next `times` are not.

    Kinds: "status" (answers `status`), "cut" (closes after `at` bytes of the answer), "corrupt" (changes the file's
    byte `at`), "page" (an HTML page with status 200), "no range" (ignores Range), "trickle" (a byte at a time),
    "stall" (says nothing more after `at` bytes), "redirect" (302 to a signed address elsewhere on this server).
    """

    pattern: str
    kind: str
    status: int = 0
    at: int = 0
    skip: int = 0
    times: float = float("inf")


@dataclass
class Request:
    """What a client asked and was answered."""

    method: str
    path: str
    range: str | None
    status: int
    authorization: str | None = None


@dataclass
class Server:
    """Files by path behind signed links. Use as a context manager; `url(path)` and `link` are valid inside."""

    files: dict[str, bytes]
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    after_bytes: tuple[int, Callable[[], None]] | None = None
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Server:
        """Listen on a free port of the loopback interface."""
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"owner": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def root(self) -> str:
        """The address without a path."""
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def link(self) -> str:
        """A signed link of the kind that arrives by e-mail."""
        return f"{self.root}/*?{SIGNATURE}"

    def asked(self, pattern: str = "*") -> list[Request]:
        """The requests so far for paths that match."""
        return [request for request in self.requests if fnmatch(request.path, pattern)]

    def fault(self, path: str) -> Fault | None:
        """The fault that this request meets, counted down."""
        with self.lock:
            for fault in self.faults:
                if not fnmatch(path, fault.pattern):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def count(self, size: int) -> None:
        """Note bytes sent; at the chosen number of them, do what the test wants done at that moment."""
        with self.lock:
            self.sent += size
            due = self.after_bytes
            if due is None or self.sent < due[0]:
                return
            self.after_bytes = None
        due[1]()


class Handler(BaseHTTPRequestHandler):
    """One request: the hub's addresses where the server is a hub, signed files otherwise."""

    owner: Server

    def log_message(self, *_: object) -> None:
        """Say nothing; the server's list of requests is the log."""

    def do_GET(self) -> None:
        """Answer with a file, a part of one, or a fault."""
        path, _, query = self.path.partition("?")
        if isinstance(self.owner, Hub):
            self.owner.answer(self, path)
            return
        path = path.lstrip("/")
        moved = path.startswith("moved/")
        fault = None if moved else self.owner.fault(path)
        path = path.removeprefix("moved/")
        if unquote(query) != unquote(SIGNATURE):
            self.reply(403, b"<?xml version='1.0'?><Error>AccessDenied</Error>")
        elif fault and fault.kind == "status":
            self.reply(fault.status, b"<html>an error</html>")
        elif fault and fault.kind == "redirect":
            self.reply(302, b"", {"Location": f"{self.owner.root}/moved/{path}?{SIGNATURE}"})
        elif fault and fault.kind == "page":
            self.reply(200, PAGE, {"Content-Type": "text/html"})
        elif path not in self.owner.files:
            self.reply(404, b"<html>no such file</html>")
        else:
            self.send_file(self.owner.files[path], fault)

    def do_HEAD(self) -> None:
        """Only the hub's client asks so."""
        self.do_GET()

    def send_file(self, body: bytes, fault: Fault | None, extra: dict[str, str] | None = None) -> None:
        """The whole file or the range asked for, spoiled where a fault says so."""
        extra = dict(extra or {})
        if fault and fault.kind == "corrupt":
            body = body[: fault.at] + bytes([body[fault.at] ^ 1]) + body[fault.at + 1 :]
        start, asked = 0, self.headers.get("Range")
        if asked and not (fault and fault.kind == "no range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if "Content-Range" in extra else 200, body[start:], extra, fault)

    def reply(self, status: int, body: bytes, extra: dict[str, str] | None = None, fault: Fault | None = None) -> None:
        """Send the answer in small pieces and close the connection; a client that leaves early is no error."""
        self.note(status)
        step = 1 if fault and fault.kind == "trickle" else CHUNK
        end = fault.at if fault and fault.kind in ("cut", "stall") else len(body)
        try:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "Last-Modified": formatdate(0, usegmt=True)} | (extra or {})
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, 0 if self.command == "HEAD" else min(end, len(body)), step):
                piece = body[start : min(start + step, end)]
                self.wfile.write(piece)
                self.wfile.flush()
                self.owner.count(len(piece))
            if fault and fault.kind == "stall":
                self.owner.closing.wait()
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.close_connection = True

    def note(self, status: int) -> None:
        """Add this request to the server's list."""
        path = self.path.partition("?")[0].lstrip("/")
        asked = self.headers.get("Range")
        self.owner.requests.append(Request(self.command, path, asked, status, self.headers.get("Authorization")))


@dataclass
class Hub(Server):
    """A stand-in for the Hugging Face hub: `files` are by "owner/name/file"; repositories want the token, if it is set.

    `gated` names what a visitor without access is told: "GatedRepo" or "RepoNotFound".
    """

    token: str = ""
    gated: str = "GatedRepo"

    def answer(self, handler: Handler, path: str) -> None:
        """What a download asks for: a repository's facts and the list of its files, one file's facts, a file."""
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1:2] != ["models"]:
            handler.reply(404, b"")
        elif self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            known = handler.headers.get("Authorization") is not None
            handler.reply(403 if known else 401, b"", {"X-Error-Code": self.gated, "X-Error-Message": "no access"})
        elif parts[4:5] == ["tree"]:
            handler.reply(200, json.dumps(self.tree("/".join(parts[2:4]))).encode())
        elif parts[0] == "api":
            names = self.names("/".join(parts[2:4]))
            siblings = [{"rfilename": name} for name in names]
            facts = {"id": "/".join(parts[2:4]), "sha": "c" * 40, "siblings": siblings, "private": False, "tags": []}
            body = json.dumps(facts | {"downloads": 0, "modelId": facts["id"]}).encode()
            handler.reply(200 if names else 404, body, {"Content-Type": "application/json"})
        else:
            self.answer_file(handler, "/".join(parts[:2] + parts[4:]))

    def names(self, repository: str) -> list[str]:
        """The files of one repository."""
        return [name.removeprefix(repository + "/") for name in self.files if name.startswith(repository + "/")]

    def tree(self, repository: str) -> list[dict]:
        """The files of one repository as the hub lists them."""
        listed = []
        for name in self.names(repository):
            body = self.files[f"{repository}/{name}"]
            entry = {"type": "file", "path": name, "size": len(body), "oid": git_object(body)}
            listed.append(entry | ({"lfs": lfs_facts(body)} if name.endswith(BIG) else {}))
        return listed

    def answer_file(self, handler: Handler, name: str) -> None:
        """A file with the hub's headers: big ones are named by their SHA-256, text by its git object."""
        if name not in self.files:
            handler.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c" * 40})
            return
        body = self.files[name]
        big = name.endswith(BIG)
        etag = lfs_facts(body)["oid"] if big else git_object(body)
        facts = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        if big:
            facts |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        handler.send_file(body, self.fault(name) if handler.command == "GET" else None, facts)
