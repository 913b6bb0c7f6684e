"""Where a run's bytes end: the port, and what a finished shard is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from expo.checkpoint.reader import Bytes
from expo.operators.statistics import Sample, Sums
from expo.output.manifest import Manifest
from expo.planning.plan import ShardPlan
from expo.results import EditReport


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is durable, with the sums of its tensors."""

    file: str
    file_bytes: int
    sha256: str
    sums: dict[str, Sums] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    edits: tuple[EditReport, ...] = ()


class ShardFile(Protocol):
    """A shard under way. Its header is the first thing that is written."""

    def write(self, offset: int, data: Bytes) -> None:
        """Whole pages at a multiple of ALIGNMENT; the last piece may be padded past the end."""
        ...

    def finish(self) -> None:
        """Make the bytes durable."""
        ...

    def close(self) -> None:
        """Let go of it, finished or not."""
        ...


class Sink(Protocol):
    """One output. What is not committed is not to be seen."""

    @property
    def folder(self) -> Path:
        """Where the small files go, on this disk."""
        ...

    def open(self, shard: ShardPlan) -> ShardFile: ...

    def record(self, shard: FinishedShard) -> None:
        """Note a shard whose file is finished, so that a resumed run does not make it again."""
        ...

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, and make the output appear, whole."""
        ...
