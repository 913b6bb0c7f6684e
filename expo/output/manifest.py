"""`expo.json`: how a model was made, and the SHA-256 of every file beside it. The one type that writes it,
reads it, verifies against it and makes the card from it."""

import errno
import json
import stat
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from expo.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from expo.checkpoint.checkpoint import Checkpoint, hash_file, read_shard
from expo.checkpoint.files import Files, open_directory
from expo.checkpoint.front_matter import FrontMatter, read_front_matter
from expo.checkpoint.headers import printable
from expo.checkpoint.placing import settle
from expo.checkpoint.sidecars import MANIFEST, manifest_path
from expo.errors import CheckpointError
from expo.results import (
    AdaptedModule,
    Alternative,
    CheckResult,
    CodingNoise,
    EditReport,
    OtherTensor,
    Statistics,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = "expo.manifest/1"
ADAPTER_SCHEMA = "expo.adapter/2"

Identities = dict[str, dict[str, str | int]]
"""Every input by `role model/file`, with what tells it from a changed one."""


@dataclass(frozen=True)
class SourceEntry:
    """A model that went in: a Hub id or a folder's name, never a path; and what its card says."""

    model: str
    commit: str | None
    adapter: str | None
    adapter_commit: str | None
    said: FrontMatter | None = None
    adapter_said: FrontMatter | None = None

    @property
    def label(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


@dataclass(frozen=True)
class Example:
    """What the chat template makes of messages (role, content), with the generation prompt."""

    messages: tuple[tuple[str, str], ...]
    rendered: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of an output.

    `plan` is the fingerprint of everything that decided its bytes. `alpha` is None where it differs between
    tensors or models, or the method is not ExPO, `alpha_range` the lowest and the highest. `files` is the model,
    `beside` what tells of it and may change (`is_apart`): SHA-256 by name. Of what mergekit's engine computed (`engine`, and why:
    `reasons`) statistics are of no element. `donor` is None where mergekit made the tokenizer. `verified` is
    None where nobody looked. `flags` are those of the command line that the spec does not hold. Where nothing says
    that transformers loads it, neither does the card (`is_of_transformers`). `backend` is what it was computed on,
    which decides the last bits of edited matrices; `noise` is that of quantized inputs.
    """

    schema: str = SCHEMA
    plan: str
    method: str
    engine: Literal["expo", "mergekit"] = "expo"
    reasons: tuple[str, ...] = ()
    spec: dict[str, object] = field(default_factory=dict)
    mergekit_spec: dict[str, object] | None = None
    alpha: float | None = None
    paper_alpha: float | None = None
    alpha_range: tuple[float, float] | None = None
    sources: dict[str, SourceEntry]
    donor: str | None = None
    inputs: Identities
    dtypes: tuple[str, ...] = ()
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int
    statistics: Statistics
    alternative: Alternative | None = None
    modules: dict[str, Statistics] = field(default_factory=dict)
    tensors: dict[str, Statistics] = field(default_factory=dict)
    edits: tuple[EditReport, ...] = ()
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str]
    beside: dict[str, str] = field(default_factory=dict)
    verified: bool | None = None
    verification: tuple[CheckResult, ...] | None = None
    flags: tuple[str, ...] = ()
    example: Example | None = None
    is_of_transformers: bool = True
    backend: str = "cpu"
    noise: CodingNoise | None = None

    @property
    def listed(self) -> dict[str, str]:
        """SHA-256 of every file that was written, by name."""
        return self.files | self.beside

    def to_json(self) -> str:
        return _json(asdict(self))

    @classmethod
    def from_json(cls, raw: str | bytes) -> "Manifest":
        """Read a manifest.

        Raises:
            CheckpointError: it is not JSON, of another schema, or a field is missing or of another kind.
        """
        read = _read(cls, raw, SCHEMA)
        if (read.alpha is None) != (read.paper_alpha is None):
            raise CheckpointError(f"{MANIFEST} is damaged: it has one of alpha and paper_alpha")
        if read.method == "expo" and "sft" not in read.sources:
            raise CheckpointError(f"{MANIFEST} is damaged: sources has no sft")
        return read

    @classmethod
    def of_folder(cls, folder: Path) -> "Manifest | None":
        """The manifest in a folder; None where there is none that can be read."""
        known = manifest_of(folder)
        return known if isinstance(known, cls) else None


@dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """What is known of an adapter: `scale` is its α, `sources` are the SFT and the aligned model.

    Of one that was made from a change `energy` is the share of it that it holds, with an error for every
    module; one that was an adapter before holds all of it, and `modules` is empty.
    """

    schema: str = ADAPTER_SCHEMA
    sources: dict[str, SourceEntry]
    scale: float
    energy: float
    modules: tuple[AdaptedModule, ...]
    others: tuple[OtherTensor, ...]
    warnings: tuple[str, ...] = ()
    versions: dict[str, str]
    files: dict[str, str]
    inputs: Identities
    command: tuple[str, ...] = ()
    backend: str = "cpu"
    beside: dict[str, str] = field(default_factory=dict)
    verified: bool | None = None
    verification: tuple[CheckResult, ...] | None = None
    example: Example | None = None

    @property
    def listed(self) -> dict[str, str]:
        """SHA-256 of every file that was written, by name."""
        return self.files | self.beside

    def to_json(self) -> str:
        return _json(asdict(self))

    @classmethod
    def from_json(cls, raw: str | bytes) -> "AdapterManifest":
        """Read a manifest. Raises as `Manifest.from_json`."""
        read = _read(cls, raw, ADAPTER_SCHEMA)
        if not {"sft", "aligned"} <= read.sources.keys():
            raise CheckpointError(f"{MANIFEST} is damaged: sources has no sft or no aligned")
        return read


def read_manifest(folder: Path) -> Manifest | AdapterManifest:
    """The manifest of a model or an adapter, or of a model in one file. One that a power cut has kept from its place is placed first.

    Raises:
        CheckpointError: there is none, it cannot be read, is damaged, or of another schema.
        OutputError: another run is placing it now.
    """
    path = manifest_path(folder)
    try:
        settle(folder)
        raw = read_bounded(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {path.name}: expo did not make it; `expo verify {folder}` checks any model"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return AdapterManifest.from_json(raw) if is_adapter(folder) else Manifest.from_json(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def manifest_of(folder: Path) -> Manifest | AdapterManifest | None:
    """The manifest in a folder; None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a model."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists()


def is_whole(folder: Path, manifest: Manifest | AdapterManifest) -> bool:
    """Whether every file that a manifest names is there: weights in the size that their header says, all others
    with their hash."""
    try:
        files = open_directory(folder)
        return all(_is_there(files, *entry) for entry in manifest.listed.items())
    except CheckpointError:
        return False


def _is_there(files: Files, name: str, sha256: str) -> bool:
    if name not in files.sizes:
        return False
    if name.endswith(".safetensors"):
        return bool(read_shard(files, name))  # which compares the sizes
    return hash_file(files, name) == sha256


_Kind = TypeVar("_Kind")
_Known = TypeVar("_Known", bound=Manifest | AdapterManifest)

_MOST_BYTES = 256 << 20


def read_bounded(path: Path) -> bytes:
    """A file that expo has written, whole.

    Raises:
        OSError: it cannot be read, is no file, or larger than any that expo writes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no file")
    if status.st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes are more than expo writes")
    return path.read_bytes()


def read_as(kind: type[_Kind], raw: str | bytes) -> _Kind:
    """JSON of a dataclass, strictly.

    Raises:
        ValueError: it is not JSON, or a field is missing or of another kind.
    """
    return _types(kind).validate_json(raw, strict=True)


def _read(kind: type[_Known], raw: str | bytes, schema: str) -> _Known:
    try:
        manifest = read_as(kind, raw)
        manifest.to_json().encode()  # what we write has no NaN and no half characters
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {_fault(error)}") from error
    if manifest.schema != schema:
        found = printable(manifest.schema, 40)
        raise CheckpointError(f"{MANIFEST} is of schema {found!r}, not {schema}")
    if strange := [name for name in manifest.listed if not _is_plain(name)]:
        raise CheckpointError(
            f"{MANIFEST} is damaged: it lists {printable(strange[0])}, which is no file of its folder"
        )
    return manifest


def _fault(error: ValueError) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return "it holds numbers or letters that no JSON has"
    first = error.errors(include_url=False, include_input=False)[0]
    where = printable(".".join(map(str, first["loc"])), 80) or "the file"
    return f"{where}: {printable(first['msg'])}"


def _is_plain(name: str) -> bool:
    """Whether a name is a path that stays below its folder, on any system."""
    parts = name.split("/")
    return not {"", ".", ".."} & {*parts} and not set("\\\0") & set(name)


@cache
def _types(kind: type[_Kind]) -> "TypeAdapter[_Kind]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _json(values: dict) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def source_entry(checkpoint: Checkpoint) -> SourceEntry:
    """What a manifest says of a model.

    Raises:
        CheckpointError, HubError: its card cannot be read.
    """
    adapter = checkpoint.adapter
    return SourceEntry(
        model=checkpoint.files.label,
        commit=checkpoint.files.commit,
        adapter=adapter.files.label if adapter else None,
        adapter_commit=adapter.files.commit if adapter else None,
        said=read_front_matter(checkpoint.files),
        adapter_said=read_front_matter(adapter.files) if adapter else None,
    )


def versions(*packages: str) -> dict[str, str]:
    """expo's version and those of packages, without importing them."""
    import expo

    found = {"expo": expo.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
