"""The plan: every tensor job of a merge with its bytes, and all that the user should know first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from expo.checkpoint.checkpoint import Checkpoint, Weight
from expo.checkpoint.dtypes import ITEM_BYTES
from expo.checkpoint.files import Files
from expo.checkpoint.headers import layout
from expo.operators.rules import Keep
from expo.planning.rows import RowRun
from expo.spec.request import MatrixEdit, Request

Action = Literal["extrapolate", "combine", "copy", "copy_if_equal"]


@dataclass(frozen=True, slots=True)
class Term:
    """One model's tensor in a combination, with its parameters (α or weight, density, …)."""

    weight: Weight
    parameters: dict[str, float]


@dataclass(frozen=True, slots=True)
class Combination:
    """Everything but the plain ExPO of a pair: a method over the tensors of several models.

    `start` is what increments are added to, `base` what deltas are counted from. `sparsifier` says
    how elements of every Δ are chosen, `elects_sign` whether the models agree on signs (TIES).
    """

    method: str
    terms: tuple[Term, ...]
    base: Weight | None = None
    start: Weight | None = None
    shared: dict[str, float] = field(default_factory=dict)
    sparsifier: str | None = None
    elects_sign: bool = False

    @property
    def needs_whole(self) -> bool:
        """Whether something about whole tensors has to be known before the first block."""
        dense = all(term.parameters.get("density", 1.0) >= 1 for term in self.terms)
        return self.method in ("slerp", "nuslerp") or (self.sparsifier is not None and not dense)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every tensor that is read, each once."""
        named = (self.base, self.start, *(term.weight for term in self.terms))
        return tuple({id(weight): weight for weight in named if weight is not None}.values())


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A matrix in a tensor, rows × columns elements from `begin`, of which only a part is kept.

    `delta` says how much of every Δ, `result` how much of what comes out, one after the other.
    """

    label: str
    begin: int
    shape: tuple[int, int]
    delta: MatrixEdit | None = None
    result: tuple[Keep, ...] = ()

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def working_bytes(self) -> int:
        """What one takes: five float32 copies, and three Gram matrices in float64."""
        return 4 * 5 * self.count + 8 * 3 * min(self.shape) ** 2


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the output.

    `copy` takes the donor's tensor (`aligned`); `copy_if_equal` (integers, booleans) does so when
    both sides agree and refuses when they do not; `combine` does what `combination` says. `rows` is
    empty where element i matches element i. `matrices`, in order, are those that are edited.
    """

    name: str
    action: Action
    dtype: str
    aligned: Weight
    base: Weight | None
    alpha: float = 1.0
    rows: tuple[RowRun, ...] = ()
    combination: Combination | None = None
    matrices: tuple[MatrixJob, ...] = ()

    @property
    def inputs(self) -> tuple[Weight, ...]:
        """Every tensor that this one is made of."""
        if self.combination is not None:
            return self.combination.weights
        return tuple(weight for weight in (self.aligned, self.base) if weight is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aligned.shape

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]

    def runs(self) -> Iterator[tuple[int, int | None, int]]:
        """(first aligned element, first base element or None, count) of each contiguous stretch."""
        if not self.rows:
            yield 0, (None if self.base is None else 0), self.count
            return
        width = math.prod(self.shape[1:])
        for run in self.rows:
            base = None if run.base is None else run.base * width
            yield run.aligned * width, base, run.count * width


@dataclass(frozen=True)
class ShardPlan:
    """One file of the output."""

    file: str
    metadata: dict[str, str]
    jobs: tuple[TensorJob, ...]

    @cached_property
    def header(self) -> bytes:
        return layout(((j.name, j.dtype, j.shape) for j in self.jobs), self.metadata)[0]

    @property
    def data_bytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Sidecar:
    """A file copied byte for byte from the donor."""

    name: str
    files: Files


@dataclass(frozen=True)
class Plan:
    """What a merge would do. With `refusals` it will not run; `warnings` and `notes` inform.

    `sources` are all models by their role; the `donor`, one of them, gives shapes, dtypes, shards,
    configuration, tokenizer and template.
    """

    request: Request
    sources: dict[str, Checkpoint]
    donor: Checkpoint
    shards: tuple[ShardPlan, ...]
    sidecars: tuple[Sidecar, ...]
    left_behind: dict[str, int]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """How messages name the models, in the order of `request.references()`."""
        by_reference = {checkpoint.reference: checkpoint for checkpoint in self.sources.values()}
        return tuple(by_reference[reference].label for reference in self.request.references())

    @property
    def jobs(self) -> Iterator[TensorJob]:
        return (job for shard in self.shards for job in shard.jobs)

    @property
    def read_bytes(self) -> int:
        return sum(weight.stored.nbytes for job in self.jobs for weight in job.inputs)

    @property
    def write_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards)

    def preparation_bytes(self, threads: int) -> int:
        """What the largest tensor takes that has to be looked at whole: four float32 copies; and what
        the matrices take that are edited side by side."""
        whole = [job for job in self.jobs if job.combination and job.combination.needs_whole]
        edited = [matrix.working_bytes for job in self.jobs for matrix in job.matrices]
        return max((4 * 4 * j.count for j in whole), default=0) + threads * max(edited, default=0)

    @property
    def download_bytes(self) -> int:
        return sum(
            shard.file_bytes
            for checkpoint in self.sources.values()
            for files, shard in checkpoint.inputs()
            if not files.is_local(shard.file)
        )
