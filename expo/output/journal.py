"""The journal of a run: which shards are on the disk, whole, and what came out of them.

One JSON object a line, after its own hash: first the plan that the work belongs to, then every finished shard.
Lines count up to the first that does not hold: a torn last one costs the work of one shard.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from expo import disk
from expo.checkpoint.checkpoint import Checkpoint, header_identity
from expo.checkpoint.headers import printable
from expo.output.durable import write_all, write_file
from expo.output.manifest import Identities, read_as, read_bounded
from expo.output.sink import FinishedShard
from expo.planning.findings import listing
from expo.planning.jobs import Copy, Rule
from expo.planning.plan import Plan

FORMAT = 5  # of the journal and of the bytes of the output: a change starts every run afresh

_IN_WORDS = {"values": "alpha or other numbers", "files": "names of other files"}
"""Of parts whose own names would say less."""


@dataclass(frozen=True)
class Fingerprint:
    """What decides the bytes of the output: two runs with one fingerprint may share their shards."""

    parts: dict[str, str]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def difference(self, other: dict[str, str]) -> str:
        """The names of the parts that changed, for a message."""
        names = sorted(self.parts.keys() | other.keys())
        changed = (name for name in names if self.parts.get(name) != other.get(name))
        return listing(printable(_IN_WORDS.get(name, name)) for name in changed)


def fingerprint(plan: Plan, identities: Identities, backend: str = "cpu") -> Fingerprint:
    """Of a plan and its inputs, where `backend` takes edited matrices apart."""
    request = plan.request
    parts = {
        "format": str(FORMAT),
        "method": request.method,
        "mergekit": repr(request.foreign),
        "values": hashlib.sha256(_values(plan).encode()).hexdigest(),
        "rounding": request.rounding,
        "seed": str(request.seed),
        "layout": hashlib.sha256(b"".join(shard.header for shard in plan.shards)).hexdigest(),
        "shards": json.dumps([shard.file for shard in plan.shards]),
        "files": json.dumps([sidecar.name for sidecar in plan.sidecars]),
        "rows": hashlib.sha256(repr([job.rows for job in plan.jobs]).encode()).hexdigest(),
        "backend": backend,
    }
    return Fingerprint(parts | {name: json.dumps(value) for name, value in identities.items()})


def _values(plan: Plan) -> str:
    """Every number that decides what becomes of every tensor."""
    return repr([[job.name, *_rule_values(job.rule), *map(str, job.matrices)] for job in plan.jobs])


def _rule_values(rule: Rule) -> list[object]:
    if isinstance(rule, Copy):
        return ["copy", len(rule.equal)]
    terms = [(term.weight.files.label, term.parameters) for term in rule.terms]
    return [rule.method, rule.sparsifier, rule.elects_sign, terms, rule.shared]


def identities(plan: Plan) -> Identities:
    """Every input of a run, named `side/file`, with what tells it from a changed one."""

    def of(side: str, checkpoint: Checkpoint) -> Identities:
        return {
            f"{side} {files.label}/{shard.file}": dict(header_identity(files, shard))
            for files, shard in checkpoint.inputs()
        }

    sidecars = {
        f"file {sidecar.name}": sidecar.files.identity(sidecar.name) for sidecar in plan.sidecars
    }
    known: Identities = {}
    for side, checkpoint in plan.sources.items():
        known |= of(side, checkpoint)
    return known | sidecars


class Journal:
    """An append-only file; a shard is entered after its bytes are durable."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, print_: Fingerprint) -> None:
        write_file(self._path, _line(print_))

    def go_on(self, print_: Fingerprint) -> None:
        """Make ready for more lines, after those that hold; `start` where there is none."""
        if self._lines():
            self._trim()
        else:
            self.start(print_)

    def append(self, shard: FinishedShard) -> None:
        with self._opened() as fd:
            write_all(fd, _line(shard), os.fstat(fd).st_size)
            disk.sync(fd)

    def read(self) -> tuple[dict[str, str], list[FinishedShard]] | None:
        """The plan and the finished shards; None where there is no journal that can be read."""
        first, *rest = self._lines() or [b""]
        try:
            plan = read_as(Fingerprint, first)
            return plan.parts, [read_as(FinishedShard, line) for line in rest]
        except ValueError:
            return None

    def _trim(self) -> None:
        """Cut off what does not hold, so that the next line starts on its own."""
        with self._opened() as fd:
            disk.resize(fd, sum(_DIGEST + len(line) + 1 for line in self._lines()))
            disk.sync(fd)

    def remove(self) -> None:
        disk.remove_file(self._path)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def _lines(self) -> list[bytes]:
        """What the lines say, up to the first that does not hold."""
        try:
            content = read_bounded(self._path)
        except OSError:
            return []
        lines: list[bytes] = []
        for line in content.split(b"\n")[:-1]:  # what follows the last \n is torn
            digest, body = line[:_DIGEST], line[_DIGEST:]
            if digest != _digest(body):
                break
            lines.append(body)
        return lines


_DIGEST = 16


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_DIGEST].encode()


def _line(entry: Fingerprint | FinishedShard) -> bytes:
    body = json.dumps(asdict(entry)).encode()
    return _digest(body) + body + b"\n"
