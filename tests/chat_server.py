"""A loopback server that speaks OpenAI's chat protocol, and fails as it is told to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What one request gets in place of an answer. Status 0: the connection is dropped."""

    status: int
    body: str = '{"error": {"message": "as told"}}'
    headers: tuple[tuple[str, str], ...] = ()


def echo(body: dict) -> str:
    """The last words, upper case, and how many messages there were."""
    return f"{body['messages'][-1]['content'].upper()} ({len(body['messages'])})"


@dataclass
class Chat:
    """`faults` meet the next chat requests, in order; what was asked is recorded."""

    reply: Callable[[dict], str] = echo
    faults: list[Fault] = field(default_factory=list)
    names: tuple[str, ...] = ("toy",)
    models_status: int = 200
    asked: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    drip_seconds: float = 0.0  # between two bytes
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@contextmanager
def serving(chat: Chat) -> Iterator[Chat]:
    class Handler(_Handler):
        state = chat

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Chat
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.state.keys.append(self.headers.get("Authorization"))
        names = [{"id": name, "object": "model"} for name in self.state.names]
        self._send(self.state.models_status, json.dumps({"object": "list", "data": names}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.lock:
            self.state.keys.append(self.headers.get("Authorization"))
            fault = self.state.faults.pop(0) if self.state.faults else None
            if fault is None:
                self.state.asked.append(body)
        if fault is not None and fault.status == 0:
            self.close_connection = True
            self.connection.close()
        elif fault is not None:
            self._send(fault.status, fault.body, fault.headers)
        else:
            self._send(200, json.dumps(self._answer(body)))

    def _answer(self, body: dict) -> dict:
        text = self.state.reply(body)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"completion_tokens": len(text.split())}}

    def _send(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        raw = text.encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), *headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if not self.state.drip_seconds:
            self.wfile.write(raw)
            return
        with suppress(OSError):  # the client has left
            for byte in raw:
                time.sleep(self.state.drip_seconds)
                self.wfile.write(bytes([byte]))
