"""A prefix of an object store as a checkpoint's folder: listed once, read by range, never downloaded whole."""

import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.parsing import MOST_BYTES, parse_json, shown
from expo.checkpoint.places import fault_of
from expo.checkpoint.ranges import Again, RangeReader, changed, read_range
from expo.checkpoint.reader import Bytes
from expo.checkpoint.sidecars import MODEL, TOKENIZER
from expo.errors import CheckpointError, SpecError
from expo.temporary import temporary_folder
from expo.threads import side_by_side

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_MOST_FILES = 10_000
_RETRIES = 2  # of obstore itself, at once; RangeReader asks again after those
_PART_BYTES = 1 << 20
_REQUESTS = 8
_WEIGHTS = (".safetensors", ".bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = (
    "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_config.json",
    "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
    "NOTICE.txt", "USE_POLICY.md", "README.md",
)  # fmt: skip
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or AWS_SKIP_SIGNATURE=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


@dataclass(frozen=True)
class Listed:
    """One object as it was when the prefix was listed."""

    path: str
    file_bytes: int
    etag: str | None
    modified: str

    @classmethod
    def of(cls, meta: "ObjectMeta") -> "Listed":
        return cls(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"].isoformat())

    @property
    def identity(self) -> dict[str, str | int]:
        named = {"modified": self.modified} if self.etag is None else {"etag": self.etag.strip('"')}
        return {"bytes": self.file_bytes, **named}

    @property
    def options(self) -> "GetOptions":
        """What makes a store refuse where the object is another one by now; a weak tag cannot."""
        strong = self.etag is not None and not self.etag.startswith("W/")
        return {"if_match": self.etag} if strong else {}


@dataclass(frozen=True)
class Store:
    """The objects below a prefix, as `Files`. Credentials come from the environment, by obstore's rules, and
    no text of its errors is shown: addresses may be signed."""

    label: str
    store: "ObjectStore"
    listed: Mapping[str, Listed]
    commit: None = None
    streams: bool = True
    heads: dict[str, bytes] = field(default_factory=dict)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: entry.file_bytes for name, entry in self.listed.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        end = self._entry(name).file_bytes if stop is None else min(stop, self.sizes[name])
        return read_range(self.reader(name), start, end, self.heads, name)

    def local_path(self, name: str) -> Path:
        """A small file, downloaded to a folder that goes with this object."""
        if name.endswith(_WEIGHTS):
            cure = "bring the model to this disk first"
            raise CheckpointError(f"{self.label}/{name} is only read by range: {cure}")
        path = self._folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return path

    def is_local(self, name: str) -> bool:
        return False

    def reader(self, name: str) -> RangeReader:
        source = _Object(self.store, self._entry(name), f"{self.label}/{name}")
        return RangeReader(source, f"{self.label}/{name}", self.heads.get(name, b""))

    def identity(self, name: str) -> dict[str, str | int]:
        """As it was listed, if it still is.

        Raises:
            CheckpointError: it has changed.
        """
        import obstore

        entry = self._entry(name)
        with _explained(f"{self.label}/{name}"):
            now = Listed.of(obstore.head(self.store, entry.path))
        if now.identity != entry.identity:
            raise changed(f"{self.label}/{name}")
        return entry.identity

    @cached_property
    def _folder(self) -> Path:
        life = ExitStack()
        weakref.finalize(self, life.close)
        return life.enter_context(temporary_folder())

    def _entry(self, name: str) -> Listed:
        if name not in self.listed:
            raise CheckpointError(f"{self.label} has no file {name}")
        return self.listed[name]


class _Object:
    """A `Source`. obstore itself asks again after 429, 5xx and lost connections."""

    def __init__(self, store: "ObjectStore", entry: Listed, name: str) -> None:
        self._store, self._entry, self._name = store, entry, name

    def request(self, begin: int, target: Bytes) -> Iterator[int]:
        """As `Source`."""
        import obstore

        options: GetOptions = {**self._entry.options, "range": (begin, begin + target.size)}
        with _explained(self._name), _asked_again():
            result = obstore.get(self._store, self._entry.path, options=options)
            self._check(result, begin)
            done = 0
            for block in result.stream(min_chunk_size=_PART_BYTES):
                part = np.frombuffer(block, dtype=np.uint8)
                target[done : done + part.size] = part
                done += part.size
                yield part.size

    def _check(self, result: "GetResult", begin: int) -> None:
        meta, known = result.meta, self._entry
        if (meta["size"], meta["e_tag"]) != (known.file_bytes, known.etag):
            raise changed(self._name)
        if result.range[0] != begin:
            raise Again("the answer is of another range")


def open_store(url: str) -> Store:
    """List what lies below `url`: whole where the store can, by the usual names at a plain web server.

    Raises:
        SpecError: obstore is not installed.
        CheckpointError: it cannot be listed, or holds nothing.
    """
    if find_spec("obstore") is None:
        install = "pip install 'expo-merge[remote]'"
        raise SpecError(f"{url}: object stores need obstore: {install}")
    with _explained(url):
        store = _connected(url)
        entries = _probed(store) if url.startswith("http") else list(_listed(store, url))
    if not entries:
        raise CheckpointError(f"{url} holds no file of a model: check the prefix")
    return Store(url, store, {entry.path: entry for entry in entries})


def _connected(url: str) -> "ObjectStore":
    from obstore import store

    retries: RetryConfig = {"max_retries": _RETRIES}
    match url.partition("://")[0]:
        case "s3":
            return store.S3Store.from_url(url, retry_config=retries)
        case "gs":
            return store.GCSStore.from_url(url, retry_config=retries)
        case "az":
            return store.AzureStore.from_url(url, retry_config=retries)
        case scheme:
            client: ClientConfig = {"allow_http": scheme == "http"}
            return store.HTTPStore.from_url(url, client_options=client, retry_config=retries)


def _listed(store: "ObjectStore", url: str) -> Iterator[Listed]:
    import obstore

    for number, meta in enumerate(chain.from_iterable(obstore.list(store))):
        if number == _MOST_FILES:
            raise CheckpointError(
                f"{url} holds more than {_MOST_FILES} files: name the model's own prefix"
            )
        entry = Listed.of(meta)
        if fault := fault_of(entry.path):
            raise CheckpointError(f"{url} lists a file whose name {fault}: {shown(entry.path)}")
        yield entry


def _probed(store: "ObjectStore") -> list[Listed]:
    """What a web server has of the names that models use, and the files that an index names."""
    known = [name for name in (*TOKENIZER, *MODEL) if "*" not in name]
    found = _heads(store, [*known, *_SINGLES, *_INDEXES])
    index = next((entry for entry in found if entry.path in _INDEXES), None)
    return found if index is None else [*found, *_heads(store, _shards(store, index))]


def _shards(store: "ObjectStore", index: Listed) -> list[str]:
    """The files that an index names; what is wrong with it is said when it is read."""
    import obstore

    if index.file_bytes > MOST_BYTES:
        return []
    try:
        match parse_json(bytes(obstore.get(store, index.path).bytes())):
            case {"weight_map": dict(named)}:
                return sorted(name for name in {*map(str, named.values())} if not fault_of(name))
    except ValueError:
        pass
    return []


def _heads(store: "ObjectStore", names: list[str]) -> list[Listed]:
    import obstore
    from obstore.exceptions import PermissionDeniedError

    def head(name: str) -> Listed | None:
        try:
            return Listed.of(obstore.head(store, name))
        except (FileNotFoundError, PermissionDeniedError):  # some say 403 of what is not there
            return None

    return [entry for entry in side_by_side(head, names, _REQUESTS) if entry is not None]


@contextmanager
def _asked_again() -> Iterator[None]:
    """Tell what another request may cure: what obstore gave up on after a few of its own, and wrong answers."""
    from obstore import exceptions

    try:
        yield
    except exceptions.NotSupportedError:
        cure = "bring the model to this disk first"
        raise Again("the server sends whole files, no ranges", cure=cure) from None
    except exceptions.GenericError as error:
        status = _status(error)
        if status is not None and status < 500 and status not in (408, 429):
            raise
        said = "the answer did not come, or is of another range"
        raise Again(f"the store answered {status}" if status else said) from None


def _status(error: Exception) -> int | None:
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn obstore's errors into one line each, without their text."""
    from obstore import exceptions

    try:
        yield
    except exceptions.PreconditionError:
        raise changed(what) from None
    except FileNotFoundError:
        raise CheckpointError(f"{what} is not there: check the name") from None
    except (exceptions.BaseError, ValueError) as error:
        status = _status(error)
        said = f"the store answered {status}" if status else "the store cannot be reached"
        cure = _CREDENTIALS.get(what.partition("://")[0].lower())
        hint = f", and {cure}" if cure else ""
        raise CheckpointError(f"{what} cannot be read: {said}; check the name{hint}") from None
