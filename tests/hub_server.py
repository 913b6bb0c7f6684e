"""A loopback server that speaks as much of the Hub's protocol as reading models needs."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by id, each a local folder, all at one commit; what was asked is recorded."""

    repositories: dict[str, Path] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    honours_ranges: bool = True
    redirects_to: str | None = None
    is_ill: bool = False
    url: str = ""

    def ranges(self) -> list[str]:
        """The Range headers of the weight files that were asked for."""
        return [
            r or "whole"
            for m, path, r, _ in self.requests
            if m == "GET" and path.endswith((".safetensors", ".bin"))
        ]

    def handler(self) -> type["Handler"]:
        return Handler

    def start(self) -> ThreadingHTTPServer:
        hub = self

        class Serving(self.handler()):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Serving)
        self.url = f"http://127.0.0.1:{server.server_port}"
        # ends soon after it is told to: half a second a test otherwise
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's delayed ACK

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.state.requests.append(
            (self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if self.state.is_ill:
            self._json(503, {"error": "unavailable"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._metadata(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self._tree(found[1])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[3], body=body)
        else:
            self._json(404, {"error": "not found"})

    def _folder(self, repository: str) -> Path | None:
        folder = self.state.repositories.get(repository)
        if folder is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return folder

    def _metadata(self, repository: str, revision: str) -> None:
        if revision == "gated":
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
            self._json(403, {"error": "gated"}, headers)
        elif revision not in ("main", COMMIT):
            self._json(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif folder := self._folder(repository):
            siblings = [self._sibling(folder, path) for path in _files(folder)]
            self._json(200, {"id": repository, "sha": COMMIT, "siblings": siblings})

    def _sibling(self, folder: Path, path: Path) -> dict:
        entry: dict = {
            "rfilename": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
        }
        if path.suffix in (".safetensors", ".bin"):
            sha256 = _sha256(path)
            entry["lfs"] = {"sha256": sha256, "size": path.stat().st_size, "pointerSize": 130}
        return entry

    def _tree(self, repository: str) -> None:
        if folder := self._folder(repository):
            entries = [
                {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
                for p in _files(folder)
            ]  # fmt: skip
            self._json(200, entries)

    def _file(self, repository: str, name: str, *, body: bool) -> None:
        folder = self._folder(repository)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            self._json(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
            return
        if self.state.redirects_to and body:
            self.send_response(302)
            self.send_header("Location", f"{self.state.redirects_to}{self.path}")
            self.send_header("X-Linked-Etag", f'"{_sha256(path)}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._content(path.read_bytes(), COMMIT, body=body)

    def _content(self, content: bytes, commit: str, *, body: bool) -> None:
        """A file at a commit, or the range of it that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        part = content
        if wanted and self.state.honours_ranges:
            last = int(wanted[2]) if wanted[2] else len(content) - 1
            part = content[int(wanted[1]) : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {wanted[1]}-{last}/{len(content)}")
        else:
            self.send_response(200)
        sha256 = hashlib.sha256(content).hexdigest()
        self.send_header("Content-Length", str(len(part)))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{sha256}"')
        self.send_header("X-Linked-Etag", f'"{sha256}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            try:
                self.wfile.write(part)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # a reader that has enough hangs up

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns)


@cache
def _hashed(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
