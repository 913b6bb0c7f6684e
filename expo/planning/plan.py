"""The plan: every tensor job of a merge with its bytes, and all that the user should know first."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.files import Files
from expo.checkpoint.headers import layout
from expo.planning.jobs import Blend, TensorJob
from expo.planning.noise import noise_refusal
from expo.results import CodingNoise
from expo.spec.request import Request


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
    index_name: str | None = None
    """Of the shards; None where there is one file, or the donor has none either."""
    noise: CodingNoise | None = None
    """Of quantized inputs of an extrapolation, over the change."""

    @property
    def labels(self) -> tuple[str, ...]:
        """How messages name the models, in the order of `request.references()`."""
        by_reference = {checkpoint.reference: checkpoint for checkpoint in self.sources.values()}
        return tuple(by_reference[reference].label for reference in self.request.references())

    @property
    def jobs(self) -> Iterator[TensorJob]:
        return (job for shard in self.shards for job in shard.jobs)

    @property
    def alpha_range(self) -> tuple[float, float] | None:
        """The lowest and the highest α of what is extrapolated; None where none is given."""
        if self.request.method != "expo" or not self.request.gives_alpha:
            return None
        blends = [job.rule for job in self.jobs if isinstance(job.rule, Blend)]
        alphas = [alpha for blend in blends for alpha in blend.alphas]
        return (min(alphas), max(alphas)) if alphas else None

    @property
    def gated(self) -> tuple[str, ...]:
        """Why noise stands against the α of what is blended from codes."""
        if self.noise is None or not self.request.gives_alpha:
            return ()
        rules = [job.rule for job in self.jobs if job.is_coded]
        alphas = {alpha for rule in rules if isinstance(rule, Blend) for alpha in rule.alphas}
        return noise_refusal(self.noise, tuple(alphas), force=self.request.force)

    @property
    def read_bytes(self) -> int:
        return sum(info.nbytes for job in self.jobs for w in job.inputs for _, info in w.parts)

    @property
    def write_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards)

    def held_on_disk(self, at_once: int | None = None, done: Collection[str] = ()) -> int:
        """What the output takes of the disk while no more than so many shards are on it at a time (None: all of
        them), without those that are `done`."""
        left = [shard.file_bytes for shard in self.shards if shard.file not in done]
        return sum(sorted(left, reverse=True)[:at_once])

    def preparation_bytes(self, threads: int) -> int:
        """What tensors take that have to be looked at whole, one a worker, and matrices that are edited."""
        whole = [4 * job.count for job in self.jobs if _needs_whole(job)]
        edited = [matrix.working_bytes for job in self.jobs for matrix in job.matrices]
        return threads * (max(whole, default=0) + max(edited, default=0))

    def held_bytes(self, threads: int) -> int:
        """What streaming keeps of tensors that are looked at whole, one a worker, so that they are fetched once."""
        whole = (job for job in self.jobs if job.is_held_whole)
        held = (sum(i.nbytes for w in job.inputs for _, i in w.parts) for job in whole)
        return threads * max(held, default=0)

    def codes_bytes(self, threads: int) -> int:
        """What workers hold of scales, and of codes of which one element takes a whole matrix."""
        codes = ((w.codes for w in job.inputs if w.codes is not None) for job in self.jobs)
        return threads * max((sum(c.held_bytes for c in each) for each in codes), default=0)

    @property
    def download_bytes(self) -> int:
        return sum(
            shard.file_bytes
            for checkpoint in self.sources.values()
            for files, shard in checkpoint.inputs()
            if not files.is_local(shard.file) and not files.streams
        )

    @cached_property
    def stream_bytes(self) -> int:
        """What is read by range from the Hub or a store, each byte once."""
        remote = {(id(files), shard.file) for checkpoint in self.sources.values()
                  for files, shard in checkpoint.inputs()
                  if files.streams and not files.is_local(shard.file)}  # fmt: skip
        stored = {
            (id(files), info.file, info.begin): info.nbytes
            for job in self.jobs
            for weight in job.inputs
            for files, info in weight.parts
            if (id(files), info.file) in remote
        }
        return sum(stored.values())

    def at(self, alpha: float) -> "Plan":
        """The same plan for another α of every model; what is left alone stays so. Opens nothing.

        Raises:
            SpecError: the method is not ExPO, or α is not finite.
        """
        request = self.request.at(alpha)
        shards = (replace(s, jobs=tuple(_at(job, alpha) for job in s.jobs)) for s in self.shards)
        mine = alpha_warnings(self.request)
        others = tuple(warning for warning in self.warnings if warning not in mine)
        warnings = (*others, *alpha_warnings(request))
        made = replace(self, request=request, shards=tuple(shards), warnings=warnings)
        kept = (refusal for refusal in self.refusals if refusal not in self.gated)
        return replace(made, refusals=(*kept, *made.gated))


def alpha_warnings(request: Request) -> tuple[str, ...]:
    """What there is to say about α itself."""
    if request.alpha is None or request.alpha >= 0:
        return ()
    return (f"alpha {request.alpha:g} is negative: it walks away from the aligned model",)


def _at(job: TensorJob, alpha: float) -> TensorJob:
    return replace(job, rule=job.rule.at(alpha)) if isinstance(job.rule, Blend) else job


def _needs_whole(job: TensorJob) -> bool:
    return isinstance(job.rule, Blend) and job.rule.needs_whole
