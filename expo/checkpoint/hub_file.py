"""One file of a Hub repository at a commit, asked for by range at the address that the Hub redirects to."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

import numpy as np
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx or httpx2, by version
    Response,  # pyright: ignore[reportPrivateImportUsage]
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from expo.checkpoint.hub import explained
from expo.checkpoint.ranges import Again, changed
from expo.checkpoint.reader import Bytes

_MOST_REDIRECTS = 5
_TIMEOUT_SECONDS = 20
_SKIPPABLE = 1 << 20  # bytes that may be passed over where a server knows no ranges
_LATER = {408, 429}


class HubFile:
    """A `Source`. The address where the file lies is asked for once and kept until it expires: it is signed,
    so it is shown to nobody, and the token goes to the Hub alone."""

    def __init__(self, url: str, name: str, file_bytes: int, sha256: str | None) -> None:
        self._url, self._name, self._file_bytes, self._sha256 = url, name, file_bytes, sha256
        self._moved: str | None = None
        self._etag: tuple[str, str] | None = None

    def request(self, begin: int, target: Bytes) -> Iterator[int]:
        """As `Source`."""
        url = self._moved or self._url
        for _ in range(_MOST_REDIRECTS):
            with self._get(url, begin, begin + target.size) as response:
                self._check_hash(response, url)
                if not response.has_redirect_location:
                    self._check_status(response, url)
                    self._moved = url
                    skipped = self._skipped(response, begin, target.size)
                    yield from _fill(response, skipped, target)
                    return
                url = urljoin(url, response.headers["Location"])
        raise Again("it redirects without end")

    @contextmanager
    def _get(self, url: str, begin: int, end: int) -> Iterator[Response]:
        headers = build_hf_headers(token=None if self._is_hub(url) else False)
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream(
                "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=False
            ) as response:
                yield response
        except HTTPError as error:  # its text may hold the signed address
            raise Again(f"the connection failed ({type(error).__name__})") from None

    def _is_hub(self, url: str) -> bool:
        return urlsplit(url)[:2] == urlsplit(self._url)[:2]

    def _check_status(self, response: Response, url: str) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status in _LATER or status >= 500:
            raise Again(f"the Hub answered {status}", _seconds(response.headers.get("Retry-After")))
        if url != self._url:
            self._moved = None  # a signed address lives for an hour or so
            raise Again(f"the store behind the Hub answered {status}", 0.0)
        with explained(self._name):
            hf_raise_for_status(response)

    def _check_hash(self, response: Response, url: str) -> None:
        """The Hub names the hash of what it redirects to; a store says the same of one address each time."""
        linked = (response.headers.get("X-Linked-Etag") or "").strip('"')
        if self._is_hub(url) and linked and self._sha256 not in (None, linked):
            raise changed(self._name)
        if response.status_code == 206 and (etag := response.headers.get("ETag")):
            known, self._etag = self._etag, (url, etag)
            if known is not None and known[0] == url and known[1] != etag:
                raise changed(self._name)

    def _skipped(self, response: Response, begin: int, nbytes: int) -> int:
        """How many bytes of the answer come before those that were asked for."""
        if response.status_code == 200:
            if begin + nbytes > _SKIPPABLE:
                cure = "leave out --stream-inputs, so that it is downloaded"
                raise Again("the server sends whole files, no ranges", cure=cure)
            return begin
        content = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if content is not None and int(content[2]) != self._file_bytes:
            raise changed(self._name)
        if content is None or int(content[1]) != begin:
            raise Again("the answer is of another range")
        return 0


def _fill(response: Response, skipped: int, target: Bytes) -> Iterator[int]:
    done = -skipped
    for block in response.iter_raw():
        part = np.frombuffer(block, dtype=np.uint8)[max(-done, 0) : target.size - done]
        start = max(done, 0)
        target[start : start + part.size] = part
        done += len(block)
        if part.size:
            yield part.size
        if done >= target.size:
            return


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and re.fullmatch(r"\d+(\.\d+)?", retry_after) else None
