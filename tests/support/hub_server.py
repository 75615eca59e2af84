"""A small hub: the part of the Hugging Face hub's HTTP API that models are written and read by, with faults on request."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretOfTheTest0123456789"  # the one that may write; no screen and no log may show it

Files = dict[str, bytes]


class Hub:
    """Repositories in memory: their branches, and the files of each commit."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Files] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.fault: str | None = None  # `503`, `torn` (a file breaks off), `hangs-up` (at the commit), `403` (for writers)
        self.asked: list[tuple[str, str]] = []
        self.address = ""

    def commit(self, repository: str, files: Files, branch: str = "main") -> str:
        """Make a commit of exactly these files and return its hash."""
        content = json.dumps([repository, sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())])
        sha = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches.setdefault(repository, {})[branch] = sha
        self.private.setdefault(repository, False)
        return sha

    def files(self, repository: str, branch: str = "main") -> Files:
        """Return the files of a branch."""
        return self.commits[self.branches[repository][branch]]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep the screen of the tests clean."""

    # --- answers --------------------------------------------------------------------------------------------------------------

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    @property
    def writer(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def commit_of(self, repository: str, revision: str) -> str | None:
        """Return the commit that is asked for, or answer why there is none."""
        hub = self.hub
        known = hub.branches.get(repository)
        if known is None or (hub.private[repository] and not self.writer):
            self.refuse(404 if self.writer else 401, "RepoNotFound", "Repository not found")
        elif repository in hub.gated and not self.writer:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
        elif revision in known:
            return known[revision]
        elif revision in hub.commits:
            return revision
        else:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return None

    # --- requests -------------------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if path == "/":
            self.answer(200, b"")
        elif self.hub.fault == "503":
            self.answer(503, {"error": "unavailable"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repository, revision = found[1], found[2] or "main"
            if (sha := self.commit_of(repository, revision)) is not None:
                siblings = [{"rfilename": name} for name in self.hub.commits[sha]]
                self.answer(200, {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings, "private": False})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            if (sha := self.commit_of(found[1], found[2])) is not None:
                files = self.hub.commits[sha].items()
                entries = [{"type": "file", "path": name, "size": len(data), "oid": _blob(data)} for name, data in files]
                self.answer(200, entries)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(found[1], found[2], found[3])
        else:
            self.answer(404, {"error": f"no such thing: {path}"})

    do_HEAD = do_GET  # noqa: N815  (the name is that of the library)

    def send_file(self, repository: str, revision: str, name: str) -> None:
        sha = self.commit_of(repository, revision)
        if sha is None:
            return
        data = self.hub.commits[sha].get(name)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        torn = self.hub.fault == "torn" and self.command == "GET"
        self.send_response(200)
        for header, value in (("ETag", f'"{_blob(data)}"'), ("X-Repo-Commit", sha), ("Content-Length", str(len(data)))):
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if torn else data)
        if torn:
            self.close_connection = True

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(("POST", path))
        body = self.body()
        if self.hub.fault == "503":
            self.answer(503, {"error": "unavailable"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif not self.writer:
            self.refuse(401, "", "Invalid username or password.")
        elif self.hub.fault == "403":
            self.refuse(403, "", "You don't have the rights to write here")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.hub.branches[found[1]]
            if found[2] in branches:
                self.answer(409, {"error": "reference exists"})
            else:
                branches[found[2]] = branches["main"]
                self.answer(201, {})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            if self.hub.fault == "hangs-up":
                self.close_connection = True
                return
            self.write(found[1], found[2], body)
        else:
            self.answer(404, {"error": f"no such thing: {path}"})

    def create(self, asked: dict[str, Any]) -> None:
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in self.hub.branches:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{repository}"})
            return
        self.hub.commit(repository, {".gitattributes": b""})
        self.hub.private[repository] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.answer(200, {"url": f"{self.hub.address}/{repository}", "id": repository})

    def write(self, repository: str, branch: str, body: bytes) -> None:
        files = dict(self.hub.files(repository, branch))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        sha = self.hub.commit(repository, files, branch)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{repository}/commit/{sha}", "commitOid": sha, "success": True})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def _blob(data: bytes) -> str:
    """Return the name git gives to a file of that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub at `address` of this machine for as long as it is needed."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
