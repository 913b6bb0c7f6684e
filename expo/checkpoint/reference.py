"""What a user may write for a model: a path, `org/name@revision`, `s3://bucket/prefix`, `model+adapter`."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import ONE_FILE
from expo.errors import SpecError

STORES = ("s3", "gs", "az", "https", "http")
"""The schemes of object stores."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Location:
    """One place that holds files: a local directory (or a single weight file), a Hub repository at a revision,
    or a prefix of an object store."""

    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    url: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        if self.url is not None:
            return self.url
        return f"{self.repo_id}@{self.revision}" if self.revision else str(self.repo_id)


@dataclass(frozen=True)
class Reference:
    """A model, and the LoRA adapter to add to it, if any."""

    model: Location
    adapter: Location | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" if self.adapter else str(self.model)


def parse_reference(text: str, *, role: str = "model") -> Reference:
    """Read what the user wrote. What exists as a path is a path; `hf://` and `./` force it.

    Raises:
        SpecError: it is neither an existing directory, nor a Hub id, nor the address of a store.
    """
    if not text:
        raise SpecError(f"{role}: is empty; name a directory or a Hub id")
    if _exists(text):
        return Reference(_location(text, role))
    # A '+' may be part of a directory's name, so the longest existing path wins.
    for cut in reversed([at for at, char in enumerate(text) if char == "+"]):
        model, adapter = text[:cut], text[cut + 1 :]
        if model and adapter and _is_known(model) and _is_known(adapter):
            adapter_at = _location(adapter, f"{role} adapter")
            _refuse_file(adapter_at, f"{role} adapter", "adapter")
            return Reference(_location(model, role), adapter_at)
    return Reference(_location(text, role))


def parse_loadable(text: str, *, role: str) -> Location:
    """A model that transformers loads by itself: a directory, or a Hub repository.

    Raises:
        SpecError: it is neither, or it is an adapter, or lies in an object store.
    """
    reference = parse_reference(text, role=role)
    if reference.adapter is not None:
        raise SpecError(
            f"{role}: {text} is a model with an adapter, and whole models are loaded: merge it first "
            f"(expo extrapolate {reference.model} {text} OUT --alpha 1)"
        )
    if reference.model.url is not None:
        raise SpecError(f"{role}: {text} lies in an object store: bring it to this disk first")
    _refuse_file(reference.model, role, "model")
    return reference.model


def _refuse_file(location: Location, role: str, what: str) -> None:
    if location.path is not None and not location.path.is_dir():
        raise SpecError(f"{role}: {location} is a file; name the directory that holds the {what}")


def _is_known(text: str) -> bool:
    named = _hub_parts(text) is not None or _scheme(text) in STORES
    return named or _exists(text)


def local_path(text: str) -> Path:
    """The path that the text is; `~` and `~user` stand for homes where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody's home
        return Path(text)


def _exists(text: str) -> bool:
    try:
        return local_path(text).exists()
    except OSError:  # longer than any name can be
        return False


def _scheme(text: str) -> str | None:
    return text.partition("://")[0].lower() if "://" in text else None


def _hub_parts(text: str) -> tuple[str, str | None] | None:
    name, _, revision = text.removeprefix("hf://").partition("@")
    if text.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name) or text.endswith("@"):
        return None
    if any(part.strip(".") == "" for part in name.split("/")):
        return None
    return name, revision or None


def _location(text: str, role: str) -> Location:
    path = local_path(text)
    if _scheme(text) in STORES:
        return Location(url=_checked_url(text, role))
    if not text.startswith("hf://") and _exists(text):
        if not path.is_dir() and path.suffix != ONE_FILE:
            raise SpecError(
                f"{role}: {printable(text)} is a file; name the directory that holds the model, or a {ONE_FILE} file"
            )
        return Location(path=path)
    if parts := _hub_parts(text):
        return Location(repo_id=parts[0], revision=parts[1])
    raise SpecError(
        f"{role}: {printable(text)} is neither an existing directory nor a Hub id (org/name[@revision])"
    )


def _checked_url(text: str, role: str) -> str:
    """The address of a prefix, as messages and the manifest may show it."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise SpecError(f"{role}: {printable(text)} is no address: {error}") from error
    shown = printable(f"{parts.scheme}://{parts.hostname or ''}{parts.path.rstrip('/')}")
    if not parts.hostname:
        raise SpecError(
            f"{role}: {shown} names no bucket or host: write {parts.scheme}://NAME/PREFIX"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        cure = "credentials come from the environment, and a model is a prefix"
        raise SpecError(f"{role}: {shown} may have no user, password or query: {cure}")
    return f"{parts.scheme}{text[len(parts.scheme) :]}".rstrip("/")
