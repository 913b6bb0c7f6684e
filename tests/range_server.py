"""A loopback server of files that lets things go wrong: plain, as the store behind a Hub, or before an S3 server."""

import http.client
import re
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("cut", "short", "429", "500", "200", "other range")
"""What may become of a request for a range."""


@dataclass(frozen=True)
class Sent:
    """Bytes begin … end of a path that went over the wire."""

    path: str
    begin: int
    end: int


@dataclass
class RangeServer:
    """Serves the folders by their names. `faults` are taken one by one by requests for ranges of weights.

    Behind a Hub a path is `/org/name/resolve/COMMIT/file`; with `upstream` (host, port) it is another server's.
    """

    folders: Mapping[str, Path] = field(default_factory=dict)
    upstream: tuple[str, int] | None = None
    faults: deque[str] = field(default_factory=deque)
    sent: list[Sent] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    tags: bool = True
    url: str = ""

    def start(self) -> ThreadingHTTPServer:
        outer = self

        class Handler(_Handler):
            state = outer

        server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def weights(self) -> dict[str, list[tuple[int, int]]]:
        """What was sent of every weight file, in the order of the file."""
        found: dict[str, list[tuple[int, int]]] = {}
        for one in sorted(self.sent, key=lambda one: (one.begin, one.end)):
            if one.path.endswith(".safetensors"):
                found.setdefault(one.path, []).append((one.begin, one.end))
        return found


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has enough hangs up
            super().handle_error(*address)


class _Handler(BaseHTTPRequestHandler):
    state: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if authorization := self.headers.get("Authorization"):
            self.state.authorizations.append(authorization)
        if self.state.upstream is not None:
            self._send(*self._forwarded(self.state.upstream))
            return
        path = self._path()
        if path is None or not path.is_file():
            self._send(404, {}, b"")
            return
        content = path.read_bytes()
        tags = {"ETag": f'"{sha256(content).hexdigest()[:32]}"'} if self.state.tags else {}
        tags["Last-Modified"] = "Wed, 21 Oct 2026 07:28:00 GMT"
        if self.headers.get("If-Match", tags.get("ETag")) != tags.get("ETag"):
            self._send(412, {}, b"")
        elif wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            part = content[int(wanted[1]) : int(wanted[2]) + 1]
            tags["Content-Range"] = (
                f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
            )
            self._send(206, tags, part, content)
        else:
            self._send(200, tags, content)

    def _path(self) -> Path | None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            folder, name = self.state.folders.get(found[1]), found[2]
        else:
            _, first, name = path.split("/", 2)
            folder = self.state.folders.get(first)
        return None if folder is None else folder / name

    def _forwarded(self, upstream: tuple[str, int]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*upstream, timeout=20)
        connection.request(self.command, self.path, headers=dict(self.headers))
        response = connection.getresponse()
        headers = {k.title(): v for k, v in response.getheaders() if k.lower() not in ("connection", "server", "date", "transfer-encoding")}  # fmt: skip
        body = response.read()
        connection.close()
        return response.status, headers, body

    def _send(self, status: int, headers: dict[str, str], body: bytes, whole: bytes = b"") -> None:
        fault = self._fault(status)
        if fault in ("403", "429", "500"):
            status, headers, body = int(fault), {"Retry-After": "0"} if fault == "429" else {}, b""
        elif fault == "200":
            headers, status, body = {}, 200, whole or body
        elif fault == "short":
            body = body[: len(body) // 2]
        elif fault == "other range":
            headers["Content-Range"] = re.sub(r"\d+-", "1-", headers["Content-Range"], count=1)
        lengths = {} if "Content-Length" in headers and self.command == "HEAD" else {"Content-Length": str(len(body))}  # fmt: skip
        self.send_response(status)
        for name, text in ({k: v for k, v in headers.items() if k.lower() != "content-length"} | lengths).items():  # fmt: skip
            self.send_header(name, text)
        if self.command == "HEAD" and "Content-Length" in headers:
            self.send_header("Content-Length", headers["Content-Length"])
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            body = body[: len(body) // 3]
            self.close_connection = True
        told: list[Sent] = []  # before it is sent: whoever has it may look at once
        if status == 206 and fault != "other range":
            begin = int(re.findall(r"\d+", headers["Content-Range"])[0])
            told = [Sent(self.path.split("?")[0], begin, begin + len(body))]
            self.state.sent += told
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # a reader that has enough hangs up
            for one in told:
                self.state.sent.remove(one)

    def _fault(self, status: int) -> str | None:
        of_weights = ".safetensors" in self.path and "json" not in self.path
        if status != 206 or not of_weights or not self.state.faults:
            return None
        return self.state.faults.popleft()
