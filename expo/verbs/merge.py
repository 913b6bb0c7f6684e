"""Run a plan: claim OUT, stream the shards, add what lies beside them, place it all at once."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from expo.checkpoint.checkpoint import hash_file
from expo.checkpoint.reader import aligned_buffer
from expo.checkpoint.sidecars import CARD
from expo.compute.combining import Made
from expo.compute.cuts import EditReport
from expo.compute.foreign import produce_foreign
from expo.compute.inputs import OpenFiles, Sources, fetch
from expo.compute.pipeline import Pipeline, Sealed
from expo.compute.preparations import Preparations
from expo.compute.summary import Alternative, Statistics, alternative, by_module, statistics, total
from expo.compute.worker import Kernel, PieceResult, Sample
from expo.errors import CheckpointError, OutputError, SpecError
from expo.operators.statistics import Sums
from expo.output.claim import check_out
from expo.output.journal import Fingerprint, FinishedShard, fingerprint, identities
from expo.output.outputs import card, manifest, write_file, write_manifest, write_sidecars
from expo.output.staging import Staging, claimed
from expo.output.writer import ShardWriter
from expo.planning.chunks import (
    BLOCK_ELEMENTS,
    CHUNK_BYTES,
    DEFAULT_THREADS,
    Chunk,
    buffer_bytes,
    cut,
)
from expo.planning.plan import Plan
from expo.verification.check import CheckResult, VerifyResult
from expo.verification.golden import Golden, read_golden
from expo.verification.run import Tokenizers, verify_stream
from expo.verification.subject import TensorFacts

Identities = dict[str, dict[str, str | int]]
Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""


@dataclass(frozen=True)
class Tuning:
    """How to run; nothing here changes a byte of the output.

    Without `statistics` an input's NaN is still found, an overflow of the output dtype is not.
    """

    threads: int = DEFAULT_THREADS
    chunk_bytes: int = CHUNK_BYTES
    block_elements: int = BLOCK_ELEMENTS
    statistics: bool = True
    hashing: bool = True


@dataclass(frozen=True)
class MergeResult:
    """A placed output; `modules` holds the parts of `statistics`.

    `edits` are the matrices that were cut, in the order of the files.
    `alpha` is None where it differs between tensors or models, or the method is not ExPO;
    `verified` is None where the verification was skipped, else whether no check found an error.
    """

    out: Path
    method: str
    alpha: float | None
    paper_alpha: float | None
    statistics: Statistics
    alternative: Alternative | None
    modules: dict[str, Statistics]
    edits: tuple[EditReport, ...]
    written_bytes: int
    seconds: float
    warnings: tuple[str, ...]
    verified: bool | None
    checks: tuple[CheckResult, ...]


def run_plan(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    hash_inputs: bool = False,
    verify: bool = False,
    tuning: Tuning = Tuning(),
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> MergeResult:
    """Write the merged model to `out`.

    An interrupted run (KeyboardInterrupt and the like, a full disk) leaves its staging directory
    and the same call resumes it. A refused one leaves nothing.

    Args:
        verify: run the quick checks on the output before it is placed. What they find is in the
            result and in the manifest; the output is placed either way.
        progress: called with (bytes written, bytes in all) a few times a second.
        say: called with each remark about resuming.

    Raises:
        SpecError: the plan has no alpha.
        CheckpointError: the plan refuses, an input holds NaN or Inf, or changed under way.
        OutputError: `out` is taken, or the disk is full.
    """
    started = time.monotonic()
    _check_plan(plan)
    check_out(out, plan.request, overwrite=overwrite)
    fetch(plan)
    known = _identities(plan, hash_inputs=hash_inputs)
    print_ = fingerprint(plan, known)
    with claimed(out, plan.request, overwrite=overwrite) as staging:
        try:
            content = staging.complete_manifest(print_)
            if content is None:
                work = _Work(plan, staging, print_, known, tuning)
                content = _produce(work, verify=verify, progress=progress, say=say)
            staging.place()
        except (CheckpointError, SpecError):
            staging.discard()
            raise
        except OSError as error:
            raise _explained(error, staging) from error
    written = plan.write_bytes
    if plan.request.foreign is not None:  # only now it is known
        written = sum((staging.out / name).stat().st_size for name in content["files"])
    return _result(content, staging.out, written, time.monotonic() - started)


@dataclass(frozen=True)
class _Work:
    """What all steps of one run share."""

    plan: Plan
    staging: Staging
    print_: Fingerprint
    known: Identities
    tuning: Tuning


def _produce(
    work: _Work, *, verify: bool, progress: Progress | None, say: Callable[[str], None] | None
) -> dict:
    """Everything up to the placement; returns the manifest."""
    plan, staging = work.plan, work.staging
    if plan.request.foreign is not None:
        staging.start_afresh(work.print_)
        return produce_foreign(plan, staging, work.print_.digest, work.known, verify=verify)
    finished, reason = staging.resume(work.print_)
    if say and (reason or finished):
        say(reason or f"resuming: {len(finished)} of {len(plan.shards)} shards done")
    _check_space(plan, staging, finished)
    hashes = write_sidecars(plan, staging.path)
    with ExitStack() as stack:
        # The tokenizers need no weights: they are tried while the weights stream.
        tokenizers = (
            stack.enter_context(Tokenizers(staging.path, plan.donor, _golden(plan)))
            if verify
            else None
        )
        finished = _stream(plan, staging, finished, work.tuning, progress)
        if changed := _changed(work.known, identities(plan)):
            raise CheckpointError(f"{changed} changed while it was read: run again")
        content = _manifest(work, finished, hashes)
        if tokenizers is not None:
            found = _verify(work, tokenizers, finished)
            content |= {"verified": found.ok, "verification": [asdict(c) for c in found.checks]}
    content["files"][CARD] = write_file(staging.path / CARD, card(content).encode())
    write_manifest(staging.path, content)
    return content


def _verify(work: _Work, tokenizers: Tokenizers, finished: list[FinishedShard]) -> VerifyResult:
    """The checks, with what the stream knows: it wrote no NaN, and zeros only where both had them."""
    sums = {name: value for shard in finished for name, value in shard.sums.items()}
    zero = {
        name for name, s in sums.items() if s.elements and not (s.base_square or s.delta_square)
    }
    hashes = {shard.file: shard.sha256 for shard in finished}
    facts = TensorFacts(hashes, zero=frozenset(zero))
    sft = work.plan.sources.get("sft")
    return verify_stream(
        work.staging.path,
        tokenizers,
        facts,
        aligned=work.plan.donor,
        sft=None if sft is None else sft.tokenizer_files,
        asked_dtype=work.plan.request.dtype,
        golden=_golden(work.plan),
        stop_at=work.plan.request.stop_at,
    )


def _golden(plan: Plan) -> Golden | None:
    return None if plan.request.vectors is None else read_golden(plan.request.vectors)


@dataclass
class _ShardSink:
    """The writer's end of the pipeline: pages to the disk, sums to the journal."""

    plan: Plan
    staging: Staging
    finished: list[FinishedShard]
    written_bytes: int = 0
    _writer: ShardWriter | None = None
    _sums: dict[str, Sums] = field(default_factory=dict)
    _samples: dict[str, Sample] = field(default_factory=dict)
    _edits: list[EditReport] = field(default_factory=list)

    def write(self, sealed: Sealed) -> None:
        shard = self.plan.shards[sealed.computed.chunk.shard]
        if self._writer is None:
            self._writer = ShardWriter(self.staging.temporary(shard.file), shard.file_bytes)
            self._writer.write(0, _in_pages(shard.header))
            self._sums, self._samples, self._edits = {}, {}, []
        self._writer.write(sealed.offset, sealed.pages)
        self.written_bytes += sealed.computed.chunk.nbytes
        for result in sealed.computed.results:
            self._add(result)
        if sealed.sha256 is not None:
            self._writer.finish()
            self._writer = None
            done = FinishedShard(
                shard.file,
                shard.file_bytes,
                sealed.sha256,
                self._sums,
                self._samples,
                self._edits,
            )
            self.staging.record(done)
            self.finished.append(done)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, result: PieceResult) -> None:
        name = result.job.name
        for block in result.blocks:
            self._sums[name] = self._sums.get(name, Sums()).plus(block)
        if result.sample is not None:
            self._samples[name] = result.sample
        self._edits += result.edits


def _stream(
    plan: Plan,
    staging: Staging,
    finished: list[FinishedShard],
    tuning: Tuning,
    progress: Progress | None,
) -> list[FinishedShard]:
    """Run the pipeline over the shards that are not finished yet; all of them, in plan order."""
    done = {shard.file for shard in finished}
    sink = _ShardSink(plan, staging, list(finished))
    skipped_bytes = sum(shard.file_bytes for shard in finished)
    files = OpenFiles()
    left = (job for shard in plan.shards if shard.file not in done for job in shard.jobs)
    preparations: Preparations[Made] = Preparations(left, ahead=tuning.threads - 1)
    kernels = [_kernel(plan, files, tuning, preparations) for _ in range(tuning.threads)]

    def tick() -> None:
        if progress:
            progress(skipped_bytes + sink.written_bytes, plan.write_bytes)

    pipeline = Pipeline(
        _chunks(plan, done, tuning),
        lambda number: plan.shards[number].header,
        kernels,
        sink.write,
        chunk_bytes=tuning.chunk_bytes,
        hashing=tuning.hashing,
    )
    try:
        pipeline.run(tick)
    finally:
        sink.close()
        files.close()
    by_file = {shard.file: shard for shard in sink.finished}
    return [by_file[shard.file] for shard in plan.shards]


def _kernel(
    plan: Plan, files: OpenFiles, tuning: Tuning, preparations: Preparations[Made]
) -> Kernel:
    return Kernel(
        Sources(files, buffer_bytes(tuning.chunk_bytes)),
        rounding=plan.request.rounding,
        seed=plan.request.seed,
        statistics=tuning.statistics,
        block_elements=tuning.block_elements,
        preparations=preparations,
    )


def _chunks(plan: Plan, done: set[str], tuning: Tuning) -> Iterator[Chunk]:
    sizes = {"chunk_bytes": tuning.chunk_bytes, "block_elements": tuning.block_elements}
    for number, shard in enumerate(plan.shards):
        if shard.file not in done:
            yield from cut(shard, number, **sizes)


def _manifest(work: _Work, finished: list[FinishedShard], hashes: dict[str, str]) -> dict:
    plan = work.plan
    sums = {name: value for shard in finished for name, value in shard.sums.items()}
    samples = {name: value for shard in finished for name, value in shard.samples.items()}
    other = alternative(sums, samples, plan.request.rounding) if samples else None
    return manifest(
        plan,
        work.print_,
        work.known,
        hashes | {shard.file: shard.sha256 for shard in finished},
        statistics(total(sums.values())),
        other,
        {name: statistics(value) for name, value in sums.items()},
        {name: statistics(value) for name, value in by_module(sums).items()},
        [edit for shard in finished for edit in shard.edits],
    )


def _result(content: dict, out: Path, written_bytes: int, seconds: float) -> MergeResult:
    other = content["alternative"]
    return MergeResult(
        out=out,
        method=content["method"],
        alpha=content["alpha"],
        paper_alpha=content["paper_alpha"],
        statistics=Statistics(**content["statistics"]),
        alternative=Alternative(**other) if other else None,
        modules={name: Statistics(**value) for name, value in content["modules"].items()},
        edits=tuple(EditReport(**edit) for edit in content["edits"]),
        written_bytes=written_bytes,
        seconds=seconds,
        warnings=tuple(content["warnings"]),
        verified=content["verified"],
        checks=tuple(CheckResult(**check) for check in content["verification"] or ()),
    )


def _check_plan(plan: Plan) -> None:
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    if not plan.request.gives_alpha:
        raise SpecError(
            "give alpha (θ_sft + α·Δ) or paper alpha (= alpha − 1); neither has a default"
        )


def _identities(plan: Plan, *, hash_inputs: bool) -> Identities:
    known = identities(plan)
    if hash_inputs:
        for side, checkpoint in plan.sources.items():
            for files, shard in checkpoint.inputs():
                known[f"{side} {files.label}/{shard.file}"]["sha256"] = hash_file(files, shard.file)
    return known


def _changed(before: Identities, after: Identities) -> str | None:
    """The first input whose identity is no longer what it was."""
    for name, identity in after.items():
        if any(before[name].get(key) != value for key, value in identity.items()):
            return name
    return None


def _check_space(plan: Plan, staging: Staging, finished: list[FinishedShard]) -> None:
    beside = sum(sidecar.files.sizes[sidecar.name] for sidecar in plan.sidecars)
    needed = plan.write_bytes - sum(shard.file_bytes for shard in finished) + beside
    free = staging.free_bytes()
    if needed > free:
        if not finished:
            staging.discard()
        raise OutputError(
            f"{staging.out} needs {needed / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free: "
            "make room, or name an OUT on another disk"
        )


def _explained(error: OSError, staging: Staging) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk of {staging.out} is full: finished shards are kept, "
            "make room and run the same command again"
        )
    where = f" ({error.filename})" if error.filename else ""
    return OutputError(f"{staging.out} cannot be written: {error.strerror}{where}")


def _in_pages(header: bytes) -> np.ndarray:
    pages = aligned_buffer(len(header))
    pages[:] = np.frombuffer(header, dtype=np.uint8)
    return pages
