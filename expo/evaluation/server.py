"""Asking a server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, transformers serve."""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from urllib.parse import SplitResult, urlsplit

from expo.checkpoint.parsing import MOST_BYTES
from expo.errors import EndpointError, SpecError
from expo.evaluation.answers import FinishReason, Reply
from expo.sampling.decoding import PRESETS
from expo.sampling.prompts import Prompt
from expo.threads import pause

KEY = "OPENAI_API_KEY"
TRIES = 6
SECONDS = 600.0
"""How long one answer may take."""

_RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
_OF_ONE_PROMPT = frozenset({400, 413, 422})
"""What a server says to a prompt that is too long or that its template refuses, though it takes others."""

_LONGEST_WAIT = 60.0
_BLOCK_BYTES = 1 << 16
_LEFT = 5  # characters of a word or an escape that is cut
_MOST_TOKENS = 1 << 40
_SHOWN = 300
_SECRET = 8  # the shortest key that is one: local servers are sent "none" and "EMPTY"
_NAMES = {"max_new_tokens": "max_tokens"}
_SEED_BITS = 31


@dataclass(frozen=True)
class Endpoint:
    """A server and the model of that `name` there, asked by several threads at once.

    `key` is sent as a bearer token, to this server only. `wait` sleeps between tries.
    """

    url: str
    name: str
    preset: str | None = None
    threads: int = 8
    key: str | None = field(default=None, repr=False)
    wait: Callable[[float], None] = pause
    batch_size: int = 1

    @property
    def parts(self) -> dict[str, str]:
        """What of it decides the answers."""
        return {"endpoint": self.url, "model": self.name, "preset": str(self.preset)}

    def ask(
        self, prompts: Sequence[Prompt], *, settings: Mapping[str, float], seed: int
    ) -> list[Reply]:
        """One answer to every prompt. What `settings` leaves out is the server's choice.

        Raises:
            EndpointError: the server refuses, or does not answer after six tries.
        """
        return [self._ask(prompt, settings, seed) for prompt in prompts]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """A server says what it does not take when it is asked."""

    def close(self) -> None:
        """Nothing is held between requests."""

    def _ask(self, prompt: Prompt, settings: Mapping[str, float], seed: int) -> Reply:
        given = {**(PRESETS[self.preset] if self.preset else {}), **settings}
        body = {"model": self.name, "messages": [*map(dict, prompt.messages)]}
        body |= {_NAMES.get(name, name): value for name, value in given.items()}
        try:
            found = self._patient(body | {"seed": request_seed(seed, prompt.id)})
        except _Refused as refused:
            if refused.code in _OF_ONE_PROMPT:
                raise EndpointError(f"prompt {prompt.id}: {refused}") from refused
            raise
        try:
            (choice, *_) = found["choices"]
            return Reply(
                _whole(choice["message"]["content"] or ""),
                _count((found.get("usage") or {}).get("completion_tokens")),
                _finish(choice.get("finish_reason")),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            said = _short(found, self.key)
            raise EndpointError(
                f"{self.url} does not answer as OpenAI's chat completions do: {said}"
            ) from error

    def models(self) -> tuple[str, ...]:
        """The models that the server names; none where it has no such list.

        Raises:
            EndpointError: nobody answers.
        """
        try:
            found = _sent(f"{self.url}/models", None, self.key)
            return tuple(str(entry["id"]) for entry in found["data"])
        except _Busy as busy:
            if busy.is_away:
                raise EndpointError(
                    f"{self.url} does not answer: {busy}; start the server, or correct --endpoint"
                ) from busy
            return ()
        except (LookupError, TypeError, _Refused):
            return ()

    def _patient(self, body: dict) -> dict:
        """The JSON that the server answers, asked again while it is busy or away."""
        for tries in range(1, TRIES + 1):
            try:
                return _sent(f"{self.url}/chat/completions", body, self.key)
            except _Busy as busy:
                if tries == TRIES:
                    raise EndpointError(
                        f"{self.url} does not answer after {TRIES} tries: {busy}; when it does, run the "
                        "same command again: what is answered is kept"
                    ) from busy
                self.wait(min(busy.wait or 2.0 ** (tries - 1), _LONGEST_WAIT))
        raise AssertionError


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key is for the server that was named."""

    def redirect_request(
        self, req: object, fp: object, code: object, msg: object, headers: object, newurl: object
    ) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


class _Busy(Exception):
    """Worth another try, after `wait` seconds where the server says so. `is_away`: nobody answered."""

    def __init__(self, why: str, *, wait: float | None = None, is_away: bool = False) -> None:
        super().__init__(why)
        self.wait, self.is_away = wait, is_away


class _Refused(EndpointError):
    """The server understood, and will not; `code` is its status where it gave one."""

    def __init__(self, why: str, code: int | None = None) -> None:
        super().__init__(why)
        self.code = code


def open_endpoint(
    url: str, name: str | None, *, preset: str | None = None, threads: int = 8
) -> Endpoint:
    """The server at `url` (with or without `/v1`), and the model named or its only one.

    Raises:
        SpecError: the address is none, or the server has several models and none is named.
        EndpointError: nobody answers there.
    """
    parts = _address(url)
    if "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        raise SpecError(
            f"the address of the server at {host} holds a name or a password: leave it out, and put the key "
            f"into the environment variable {KEY}"
        )
    base = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
    endpoint = Endpoint(base, name or "", preset, threads, _key())
    known = endpoint.models()
    if name is not None:
        return endpoint
    if len(known) != 1:
        names = ", ".join(known) or "no model by name"
        raise SpecError(f"{base} serves {names}: say which with --model NAME")
    return replace(endpoint, name=known[0])


def _address(url: str) -> SplitResult:
    """The parts of an address that others can be hung onto.

    Raises:
        SpecError: it is none.
    """
    is_plain = url.isprintable() and not {" ", "?", "#"} & {*url}
    with suppress(ValueError):  # of the port, or of a bracket
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if is_plain and is_server:
            return parts
    shown = _short(url.partition("?")[0])  # what follows may be a key
    raise SpecError(f"{shown} is no address of a server: give one like http://localhost:8000/v1")


def _key() -> str | None:
    """The user's key, as it can stand in a header."""
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable():
        raise SpecError(
            f"the environment variable {KEY} holds characters that no key has: set it anew"
        )
    return key or None


def request_seed(seed: int, name: str) -> int:
    """The seed of one request: 31 bits of the SHA-256 of seed and prompt, the same for every model."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & ((1 << _SEED_BITS) - 1)


def _sent(url: str, body: dict | None, key: str | None) -> dict:
    """One request.

    Raises:
        _Busy, _Refused: by what the server said, or did not.
    """
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data=data, headers=headers)
        with _OPENER.open(request, timeout=SECONDS) as response:
            return json.loads(_content(response, time.monotonic() + SECONDS))
    except urllib.error.HTTPError as error:
        said = _message(error, key)
        if error.code in _RETRIED:
            wait = _seconds(error.headers.get("Retry-After"))
            raise _Busy(f"{error.code} {said}", wait=wait) from error
        raise _Refused(_refusal(url, error.code, said), error.code) from error
    except (OSError, http.client.HTTPException) as error:
        why = _short(str(getattr(error, "reason", None) or error)) or type(error).__name__
        raise _Busy(why, is_away=True) from error
    except (ValueError, RecursionError) as error:
        if _is_cut(error):
            raise _Busy("the answer is cut short", is_away=True) from error
        raise _Refused(
            f"{url} does not answer with JSON: is it the address of a server?"
        ) from error


def _content(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole answer: each wait of a socket is limited, this limits their sum.

    Raises:
        TimeoutError, http.client.HTTPException: it takes too long, or ends too early.
        ValueError: there is no end of it.
    """
    parts: list[bytes] = []
    left = MOST_BYTES
    while block := response.read1(_BLOCK_BYTES):
        parts.append(block)
        left -= len(block)
        if left < 0:
            raise ValueError("longer than any answer")
        if time.monotonic() > until:
            raise TimeoutError(f"not done after {SECONDS:.0f} s")
    if response.length:
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _is_cut(error: Exception) -> bool:
    """Whether an object of JSON ends before its end: a connection that breaks where nobody said how long it is."""
    if not isinstance(error, json.JSONDecodeError) or not error.doc.lstrip().startswith("{"):
        return False
    left = len(error.doc.rstrip()) - error.pos
    return left <= _LEFT or error.msg.startswith("Unterminated string")


def _refusal(url: str, code: int, said: str) -> str:
    cures = {
        401: f"put the key into the environment variable {KEY}",
        403: f"put a key that may into the environment variable {KEY}",
        404: "check --endpoint (it mostly ends in /v1) and --model",
        **dict.fromkeys(range(300, 400), "give --endpoint the address that it leads to"),
    }
    cure = cures.get(code, "leave out what this server does not take")
    return f"{url} refuses with {code}: {said}; {cure}"


def _message(error: urllib.error.HTTPError, key: str | None) -> str:
    """What a server says of an error, in one line."""
    raw = ""
    try:
        raw = error.read(10_000).decode("utf-8", "replace")
        found = json.loads(raw)
        inner = found.get("error", found)
        said = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    except (ValueError, RecursionError, AttributeError, OSError, http.client.HTTPException):
        said = raw
    return _short(said or error.reason, key)


def _short(said: object, key: str | None = None) -> str:
    """One line of what a server says, without what steers terminals, and without the key."""
    text = said if isinstance(said, str) else json.dumps(said)
    if key and len(key) >= _SECRET:
        text = text.replace(key, "(the key)")
    plain = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(plain.split())[:_SHOWN]


def _seconds(header: str | None) -> float | None:
    try:
        wait = float(header) if header else 0.0
    except ValueError:  # a date
        return None
    return wait if wait > 0 else None  # neither is NaN


def _count(said: object) -> int | None:
    return said if isinstance(said, int) and 0 <= said <= _MOST_TOKENS else None


def _finish(said: object) -> FinishReason:
    return said if said in ("length", "content_filter") else "stop"  # pyright: ignore


def _whole(text: str) -> str:
    """Without halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
