"""The journal of a run: which shards are on the disk, whole, and what came out of them.

One JSON object a line: first the plan that the work belongs to, then every finished shard. A line
counts once it is complete, so a torn last line only costs the work of one shard.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from expo.checkpoint.checkpoint import Checkpoint, header_identity
from expo.operators.statistics import Sample, Sums
from expo.output.durable import sync_directory
from expo.output.manifest import Identities
from expo.output.sink import FinishedShard
from expo.planning.jobs import Copy, Rule
from expo.planning.plan import Plan
from expo.results import EditReport

FORMAT = 5  # of the journal and of the bytes of the output: a change starts every run afresh


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
        return ", ".join(name for name in names if self.parts.get(name) != other.get(name))


def fingerprint(plan: Plan, identities: Identities) -> Fingerprint:
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
        self._path.write_text(json.dumps({"plan": print_.parts}) + "\n")
        self._sync()

    def append(self, shard: FinishedShard) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(shard)) + "\n")
        self._sync()

    def read(self) -> tuple[dict[str, str], list[FinishedShard]] | None:
        """The plan and the finished shards; None where there is no journal worth reading."""
        try:
            lines = self._path.read_text().split("\n")[:-1]  # what follows the last \n is torn
            plan = json.loads(lines[0])["plan"]
            return plan, [_finished(json.loads(line)) for line in lines[1:]]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def trim(self) -> None:
        """Cut off a torn last line, so that the next one starts on its own."""
        content = self._path.read_bytes()
        os.truncate(self._path, content.rfind(b"\n") + 1)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _sync(self) -> None:
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        sync_directory(self._path.parent)


def _finished(entry: dict) -> FinishedShard:
    """A line of the journal."""
    sums = {name: Sums(*values) for name, values in entry["sums"].items()}
    samples = {name: Sample(*values) for name, values in entry["samples"].items()}
    edits = tuple(EditReport(**edit) for edit in entry["edits"])
    return FinishedShard(entry["file"], entry["file_bytes"], entry["sha256"], sums, samples, edits)
