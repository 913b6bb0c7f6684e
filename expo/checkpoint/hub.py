"""A Hub repository at one commit: listed and read by range, downloaded through the Hub's cache."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelInfo, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx or httpx2, by version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from expo.checkpoint.files import Directory, open_directory, read_local
from expo.checkpoint.parsing import shown
from expo.checkpoint.places import fault_of
from expo.checkpoint.ranges import RangeReader, read_range
from expo.checkpoint.reader import FileReader, Reader
from expo.checkpoint.reference import Location
from expo.checkpoint.shown import without_secrets
from expo.errors import HubError

DEFAULT_ENDPOINT = "https://huggingface.co"
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{7,64}"), re.compile(r"[0-9a-f]{64}")
_MOST_FILE_BYTES = 1 << 60


@dataclass(frozen=True)
class Repository:
    """A model repository pinned to `commit`. The token goes to the configured endpoint only."""

    repo_id: str
    revision: str | None
    commit: str
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]
    """The LFS hash of each large file, from the repository's metadata."""
    streams: bool = False
    heads: dict[str, bytes] = field(default_factory=dict)
    """What was read of the start of a file: it need not be asked for again."""

    @property
    def label(self) -> str:
        return self.repo_id

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is None or self.is_local(name):
            return read_local(self.local_path(name), start, stop, f"{self.label}/{name}")
        end = min(stop, self.sizes[name])
        return read_range(self._remote(name), start, end, self.heads, name)

    def local_path(self, name: str) -> Path:
        cached = self._cached(name)
        if cached is not None:
            return cached
        with explained(f"{self.repo_id}/{name}"):
            # By the revision's name, not the commit: so the cache learns what the name stands for
            # and finds it again offline.
            path = Path(huggingface_hub.hf_hub_download(self.repo_id, name, revision=self.revision))
        if self.commit not in path.parts:
            raise HubError(f"{self.repo_id} got a new commit while it was read: run again")
        return path

    def is_local(self, name: str) -> bool:
        return self._cached(name) is not None

    def reader(self, name: str) -> Reader:
        if self.streams and not self.is_local(name):
            return self._remote(name)
        return FileReader(self.local_path(name), f"{self.label}/{name}")

    def _remote(self, name: str) -> RangeReader:
        from expo.checkpoint.hub_file import HubFile

        where = f"{self.repo_id}/{name}"
        url = huggingface_hub.hf_hub_url(self.repo_id, name, revision=self.commit)
        source = HubFile(url, where, self.sizes[name], self.sha256.get(name))
        return RangeReader(source, where, self.heads.get(name, b""))

    def _cached(self, name: str) -> Path | None:
        cached = huggingface_hub.try_to_load_from_cache(self.repo_id, name, revision=self.commit)
        return Path(cached) if isinstance(cached, str) else None

    def identity(self, name: str) -> dict[str, str | int]:
        identity: dict[str, str | int] = {"bytes": self.sizes[name], "commit": self.commit}
        return identity | ({"sha256": self.sha256[name]} if name in self.sha256 else {})


def open_repository(location: Location, *, streams: bool = False) -> Repository | Directory:
    """Pin `location` to a commit; where the Hub cannot be asked, take the snapshot that the cache holds.

    Args:
        streams: read what is not in the cache by range, where it lies.

    Raises:
        HubError: no such repository or revision, no access, or no answer and nothing in the cache.
    """
    repo_id = location.repo_id
    assert repo_id is not None
    with explained(str(location), instead="no such directory here, and "):
        if constants.HF_HUB_OFFLINE:
            return _cached_snapshot(repo_id, location.revision)
        try:
            info = _described(repo_id, location.revision)
        except (HTTPError, OSError) as error:
            if not _is_silence(error):
                raise
            return _without_the_hub(location, error)
    files = {file.rfilename: file for file in info.siblings or []}
    _check_described(repo_id, info)
    return Repository(
        repo_id,
        location.revision,
        str(info.sha),
        sizes={name: file.size or 0 for name, file in files.items()},
        sha256={name: file.lfs.sha256 for name, file in files.items() if file.lfs},
        streams=streams,
    )


def _described(repo_id: str, revision: str | None) -> ModelInfo:
    """What the Hub says of a repository, as its client understands it."""
    try:
        return huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except (HTTPError, OSError, HFValidationError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise HubError(_strange(repo_id, "no description of a repository")) from error


def _check_described(repo_id: str, info: ModelInfo) -> None:
    """Raises HubError: its commit, or the name, size or hash of a file is none."""
    if not _COMMIT.fullmatch(str(info.sha)):
        raise HubError(_strange(repo_id, f"the commit {shown(info.sha)}"))
    for file in info.siblings or []:
        if fault := fault_of(file.rfilename):
            raise HubError(_strange(repo_id, f"a file whose name {fault}: {shown(file.rfilename)}"))
        numbers = [file.size or 0, *([file.lfs.size] if file.lfs else [])]
        if not all(isinstance(n, int) and 0 <= n < _MOST_FILE_BYTES for n in numbers):
            raise HubError(_strange(repo_id, f"the size {shown(file.size)} of {file.rfilename}"))
        if file.lfs and not _SHA256.fullmatch(str(file.lfs.sha256)):
            raise HubError(_strange(repo_id, f"a hash of {file.rfilename} that is no SHA-256"))


def _strange(repo_id: str, what: str) -> str:
    return f"{repo_id}: the Hub at {constants.ENDPOINT} answered with {what}; check HF_ENDPOINT, or run again later"


def _is_silence(error: Exception) -> bool:
    """Whether the Hub has said nothing about the repository: out of reach, or ill."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


def _without_the_hub(location: Location, error: Exception) -> Directory:
    """What the cache holds, with a note that nobody looked for something newer."""
    repo_id, silence = str(location.repo_id), _silence(error)
    try:
        cached = _cached_snapshot(repo_id, location.revision)
    except LocalEntryNotFoundError:
        raise HubError(
            f"{location}: no such directory here, and {silence}; the local cache does not hold it either: "
            "check path and connection (with HF_HUB_OFFLINE=1 only the cache is looked at)"
        ) from error
    note = (
        f"{location}: {silence}; commit {cached.commit} of the local cache is used "
        "(HF_HUB_OFFLINE=1 does so without asking)"
    )
    return replace(cached, notes=(note,))


def _silence(error: Exception) -> str:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    why = type(error.__cause__ or error).__name__ if response is None else str(response.status_code)
    return f"the Hub at {shown_endpoint()} does not answer ({why})"


def shown_endpoint() -> str:
    """The address of the Hub, without the password that HF_ENDPOINT may hold."""
    return without_secrets(constants.ENDPOINT.rstrip("/"))


def endpoint_note() -> str | None:
    """A sentence for the plan where the Hub is not the public one."""
    endpoint = shown_endpoint()
    return None if endpoint == DEFAULT_ENDPOINT else f"Hub endpoint: {endpoint} (not the default)"


def _cached_snapshot(repo_id: str, revision: str | None) -> Directory:
    root = Path(
        huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True)
    )
    return open_directory(root, label=repo_id, commit=root.name)


@contextmanager
def explained(what: str, *, instead: str = "") -> Iterator[None]:
    """Turn the library's errors into one line each that names `what` and the cure.

    Args:
        instead: what else `what` could have been, and is not.
    """
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{what} is gated: ask for access on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what}: the repository has no such revision") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: {instead}no such repository on the Hub, or a private one: "
            "check the name, or `hf auth login`"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if not constants.HF_HUB_OFFLINE:  # a download that lost its connection says so too
            raise HubError(_unanswered(what, error)) from error
        raise HubError(
            f"{what}: {instead}not in the local cache, and HF_HUB_OFFLINE=1 forbids to ask the Hub: "
            "unset it, or `hf download` it while online"
        ) from error
    except HFValidationError as error:
        raise HubError(f"{what} is not a valid Hub id: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise HubError(f"{what}: the Hub answered {status}; try again later") from error
    except (HTTPError, OSError) as error:
        raise HubError(_unanswered(what, error)) from error


def _unanswered(what: str, error: Exception) -> str:
    return (
        f"{what}: {_silence(error)}: check the connection and run again, what is downloaded stays; "
        "with HF_HUB_OFFLINE=1 models of the local cache are used without asking"
    )
