"""From a plan and its staging directory to a verified model there, with card and manifest: by the stream, or by
mergekit's engine."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from expo.checkpoint.sidecars import CARD, is_apart, is_one_file
from expo.compute.stream import Progress, Tuning, stream
from expo.errors import CheckpointError, OutputError
from expo.output.durable import copy_file, write_file
from expo.output.folder import write_small_files
from expo.output.journal import Fingerprint, identities
from expo.output.manifest import Identities, Manifest
from expo.output.sink import FinishedShard
from expo.output.staging import Staging
from expo.planning.findings import room
from expo.planning.plan import Plan
from expo.publishing.card import card
from expo.verbs.manifests import foreign_manifest, streamed_manifest, sums_by_tensor

if TYPE_CHECKING:  # YAML, schemas and checks are imported by those that need them
    from expo.verification.golden import Golden
    from expo.verification.run import Children


class Engine(Protocol):
    """Whatever runs plans into their sinks as `stream` does."""

    def __call__(
        self,
        plans: Sequence[Plan],
        sinks: Sequence[Staging],
        *,
        finished: Sequence[Sequence[FinishedShard]],
        tuning: Tuning,
        progress: Progress | None,
    ) -> list[list[FinishedShard]]: ...


@dataclass(frozen=True)
class Run:
    """One plan on its way to its OUT. `shards_at_once` are on this disk at a time, None for all of them."""

    plan: Plan
    staging: Staging
    print_: Fingerprint
    known: Identities
    shards_at_once: int | None = None


def produce(
    runs: Sequence[Run],
    tuning: Tuning,
    *,
    verify: bool,
    progress: Progress | None,
    checking: Progress | None,
    say: Callable[[str], None] | None,
    engine: Engine = stream,
) -> list[Manifest]:
    """Everything up to the placement: the manifests, which are written last."""
    manifests = [run.staging.complete_manifest(run.print_) for run in runs]
    left = [run for run, known in zip(runs, manifests, strict=True) if known is None]
    if not left:
        made = []
    elif left[0].plan.request.foreign is not None:
        made = [_foreign(run, verify=verify) for run in left]
    else:
        made = _streamed(
            left, tuning, engine, verify=verify, progress=progress, checking=checking, say=say
        )
    following = iter(made)
    return [known if known is not None else next(following) for known in manifests]


def _streamed(
    runs: Sequence[Run],
    tuning: Tuning,
    engine: Engine,
    *,
    verify: bool,
    progress: Progress | None,
    checking: Progress | None,
    say: Callable[[str], None] | None,
) -> list[Manifest]:
    finished = [_resumed(run, say) for run in runs]
    _check_space(runs, finished)
    hashes = [write_small_files(run.plan, run.staging.folder) for run in runs]
    with ExitStack() as stack:
        # They need no weights, so they work while the weights stream; all outputs have the same files.
        children = stack.enter_context(_children(runs[0])) if verify else None
        done = engine(
            [run.plan for run in runs],
            [run.staging for run in runs],
            finished=finished,
            tuning=tuning,
            progress=progress,
        )
        if changed := _changed(runs[0].known, identities(runs[0].plan)):
            raise CheckpointError(f"{changed} changed while it was read: run again")
        manifests = [
            streamed_manifest(run.plan, run.print_.digest, run.known, shards, files, tuning.backend)
            for run, shards, files in zip(runs, done, hashes, strict=True)
        ]
        if children is None:
            return manifests
        together = zip(runs, manifests, done, strict=True)
        return [_verified(*one, children, checking) for one in together]


def _resumed(run: Run, say: Callable[[str], None] | None) -> list[FinishedShard]:
    """The shards that an earlier run left."""
    finished, reason = run.staging.resume(run.print_)
    if say and (reason or finished):
        done = f"{len(finished)} of {len(run.plan.shards)} shards done for {run.staging.out.name}"
        say(reason or f"resuming: {done}")
    return finished


def _verified(
    run: Run,
    manifest: Manifest,
    finished: Sequence[FinishedShard],
    children: "Children",
    checking: Progress | None,
) -> Manifest:
    """The checks, with what the stream knows: it wrote no NaN, and zeros only where both had them."""
    from expo.verification.run import verify_stream
    from expo.verification.subject import TensorFacts

    plan = run.plan
    sums = sums_by_tensor(finished)
    zero = {
        name for name, s in sums.items() if s.elements and not (s.base_square or s.delta_square)
    }
    sft = plan.sources.get("sft")
    folder = run.staging.folder
    gone = {
        shard.file: (shard.header, shard.file_bytes)
        for shard in plan.shards
        if not (folder / shard.file).exists()
    }
    found = verify_stream(
        folder,
        children,
        TensorFacts({shard.file: shard.sha256 for shard in finished}, zero=frozenset(zero)),
        gone=gone,
        aligned=plan.donor,
        sft=None if sft is None else sft.tokenizer_files,
        asked_dtype=plan.request.dtype,
        golden=_golden(plan),
        stop_at=plan.request.stop_at,
        checking=checking,
    )
    return replace(
        manifest, verified=found.ok, verification=found.checks, example=children.example()
    )


def _foreign(run: Run, *, verify: bool) -> Manifest:
    """Everything up to the placement by mergekit's engine.

    There is no resume: an interrupted run starts afresh.
    """
    from expo.compute.foreign import merge_with_mergekit
    from expo.verification.run import children_of, verify_folder

    plan, folder = run.plan, run.staging.folder
    run.staging.start_afresh(run.print_)
    merge_with_mergekit(plan, folder)
    for sidecar in plan.sidecars:
        copy_file(sidecar.files.local_path(sidecar.name), folder / sidecar.name)
    files = run.staging.seal()
    manifest = foreign_manifest(plan, run.print_.digest, run.known, folder, files)
    if not verify:
        return manifest
    # without the donor: layers and vocabulary may differ from every model's on purpose
    golden, stop_at = _golden(plan), plan.request.stop_at
    with children_of(folder, golden=golden) as children:
        found = verify_folder(folder, golden=golden, quick=True, stop_at=stop_at, children=children)
        example = children.example()
    return replace(manifest, verified=found.ok, verification=found.checks, example=example)


def with_card(run: Run, manifest: Manifest) -> Manifest:
    """The manifest with the model card, written unless an earlier run came as far."""
    if CARD in manifest.beside or is_one_file(run.staging.out):
        return manifest
    written = write_file(run.staging.folder / CARD, card(manifest).encode())
    known = sorted((manifest.files | {CARD: written}).items())
    files, beside = (
        {name: sha256 for name, sha256 in known if is_apart(name) is apart}
        for apart in (False, True)
    )
    return replace(manifest, files=files, beside=beside)


def _children(run: Run) -> "Children":
    from expo.verification.run import Children

    plan = run.plan
    shapes = {job.name: (job.dtype, job.shape) for job in plan.jobs}
    loads = (run.staging.folder / "config.json").exists() and plan.donor.is_of_transformers
    known = shapes if loads else None
    return Children(run.staging.folder, plan.donor, _golden(plan), known)


def _golden(plan: Plan) -> "Golden | None":
    from expo.verification.golden import read_golden

    return None if plan.request.vectors is None else read_golden(plan.request.vectors)


def _changed(before: Identities, after: Identities) -> str | None:
    """The first input whose identity is no longer what it was."""
    for name, identity in after.items():
        if any(before[name].get(key) != value for key, value in identity.items()):
            return name
    return None


def needed_bytes(plan: Plan, done: Collection[str], at_once: int | None = None) -> int:
    """What an output still takes of its disk, with `at_once` shards there at a time."""
    beside = sum(sidecar.files.sizes[sidecar.name] for sidecar in plan.sidecars)
    return plan.held_on_disk(at_once, done) + beside


def check_space(
    needs: Sequence[tuple[Staging, int]], cure: str = "name an OUT on another disk"
) -> None:
    """Whether outputs have room together, each of them so many bytes.

    Raises:
        OutputError: a disk has not so much left.
    """
    by_disk: Counter[int] = Counter()
    for staging, nbytes in needs:
        by_disk[staging.disk] += nbytes
    for staging, _ in needs:
        needed, free = by_disk[staging.disk], staging.free_bytes()
        if needed > free:
            raise OutputError(
                f"the disk of {staging.out} is too full: {room(needed, free)}; make room, or {cure}"
            )


def _check_space(runs: Sequence[Run], finished: Sequence[Sequence[FinishedShard]]) -> None:
    """As `check_space`; what has nothing finished is removed."""
    done = [{shard.file for shard in shards} for shards in finished]
    needs = [
        (run.staging, needed_bytes(run.plan, files, run.shards_at_once))
        for run, files in zip(runs, done, strict=True)
    ]
    where = "name an OUT" if runs[0].shards_at_once is None else "run it in a directory"
    try:
        check_space(needs, f"{where} on another disk")
    except OutputError:
        for run, files in zip(runs, done, strict=True):
            if not files:
                run.staging.discard()
        raise
