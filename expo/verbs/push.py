"""`expo merge … --push`: a merge whose output goes to the Hub shard by shard, and never lies on this disk as a whole."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi

from expo.checkpoint.sidecars import MANIFEST
from expo.compute.inputs import fetch
from expo.compute.stream import Progress, Tuning
from expo.errors import CheckpointError, HubError, SpecError, VerificationError
from expo.output.durable import unwritable, write_file
from expo.output.folder import write_small_files
from expo.output.journal import fingerprint
from expo.output.manifest import Manifest
from expo.output.sink import FinishedShard
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.planning.report import report
from expo.publishing.hub_errors import explained
from expo.publishing.outgoing import Outgoing
from expo.publishing.preflight import Preflight, preflight
from expo.publishing.repository import Remote, Target, is_same, parse_target
from expo.publishing.sink import AT_ONCE, HubSink
from expo.publishing.upload import check_unmoved, open_branch, preupload
from expo.publishing.wire import lost, names_in_lfs
from expo.results import MergeResult, PublishResult, PushPlan, PushResult
from expo.spec.read import Spec, read_request
from expo.spec.request import Request
from expo.spec.stages import read_stages
from expo.temporary import temporary_folder
from expo.threads import DEFAULT_THREADS
from expo.verbs.manifests import streamed_manifest
from expo.verbs.producing import Run, produce, with_card
from expo.verbs.publish import send
from expo.verbs.running import check_plan, known_identities, merge_result
from expo.verification.check import GONE, UNREAD


@dataclass(frozen=True)
class Publication:
    """Where a push goes, and what `publish` would be asked for it."""

    target: Target
    public: bool = False
    licence: str | None = None
    name_ok: bool = False

    @property
    def place(self) -> Path:
        """What the staging directory is named after: it lies in the working directory."""
        name = str(self.target).replace("/", "--")
        return Path.cwd() / name

    def look(self, folder: Path, plan: Plan) -> Preflight:
        """Everything before the first byte of a folder that lacks the shards."""
        sent = {shard.file: shard.file_bytes for shard in plan.shards}
        return preflight(
            HfApi(),
            folder,
            self.target,
            public=self.public,
            licence=self.licence,
            name_ok=self.name_ok,
            sent=sent,
        )


def push(
    spec: Spec,
    repo_id: str,
    *,
    public: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    license: str | None = None,
    name_ok: bool = False,
    stream_inputs: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PushResult:
    """Run a merge spec (a YAML file, or a mapping of the same form) into the Hub repository `repo_id`, as one commit.

    What `publish` asks is asked before the first tensor is computed. A shard is sent when it is finished and then
    removed: no more than two of them are on this disk, in `.ORG--NAME.expo-staging` in the working directory. The
    same call resumes an interrupted one, and sends no shard twice.

    Args:
        public, revision, create_pr, license, name_ok: as in `publish`.
        stream_inputs: as in `extrapolate`: then the inputs need no disk either.
        device: as in `extrapolate`.
        progress: called with (bytes of shards sent, bytes in all).

    Raises:
        VerificationError: the model does not verify; nothing was committed.
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    target = parse_target(repo_id, revision=revision, create_pr=create_pr)
    request = replace(_request(spec), stream_inputs=stream_inputs)
    where = Publication(target, public, license, name_ok)
    tuning = Tuning.on(device)
    return push_plan(build_plan(request), where, tuning=tuning, progress=progress)


def _request(spec: Spec) -> Request:
    if not isinstance(spec, str | PathLike):
        return read_request(spec)
    stages = read_stages(Path(spec))
    check_single(len(stages))
    return stages[0].request({})


def check_single(documents: int) -> None:
    """Raises SpecError: a spec of several documents, whose earlier outputs would need the disk."""
    if documents > 1:
        raise SpecError(
            f"a push takes one document, the spec has {documents}: merge the earlier ones into directories first, or "
            "all into a directory, and `expo publish` it"
        )


def plan_push(plan: Plan, where: Publication, *, threads: int = DEFAULT_THREADS) -> PushPlan:
    """What a push would do. Asks the Hub, makes and sends nothing. Raises as `push`."""
    shown = report(plan, out=where.place, threads=threads, shards_at_once=AT_ONCE)
    ready = prepare(plan, where)
    staging = where.place.with_name(f".{where.place.name}.expo-staging")
    return PushPlan(shown, ready.plan, staging, plan.held_on_disk(AT_ONCE))


def prepare(plan: Plan, where: Publication) -> Preflight:
    """What `publish` would refuse, before anything is computed: asked of the small files, and of a manifest without
    figures.

    Raises:
        SpecError, CheckpointError, HubError: as `preflight`, or the plan cannot be run or pushed.
    """
    check_plan(plan)
    if plan.request.foreign is not None:
        raise SpecError(
            f"a push streams, and this merge takes mergekit's engine ({plan.request.foreign.reasons[0]}): merge into "
            "a directory and `expo publish` it"
        )
    with temporary_folder() as folder:
        hashes = write_small_files(plan, folder)
        shards = [FinishedShard(shard.file, shard.file_bytes, "") for shard in plan.shards]
        manifest = streamed_manifest(plan, "", {}, shards, hashes)
        write_file(folder / MANIFEST, manifest.to_json().encode())
        return where.look(folder, plan)


def push_plan(
    plan: Plan,
    where: Publication,
    *,
    hash_inputs: bool = False,
    verify: bool = True,
    tuning: Tuning = Tuning(),
    progress: Progress | None = None,
    checking: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> PushResult:
    """Merge to the Hub. Interrupted, the same call goes on from there.

    Args:
        progress: called with (bytes of shards sent, bytes in all).
        checking, say: as in `run_plans`.

    Raises: as `push`.
    """
    started = time.monotonic()
    check_plan(plan, hash_inputs=hash_inputs)
    ready = prepare(plan, where)
    fetch(plan)
    known = known_identities(plan, hash_inputs=hash_inputs)
    remote = _opened(plan, ready)
    with HubSink(where.place, partial(_send, where.target, remote)) as sink, _writing(sink):
        print_ = fingerprint(plan, known, tuning.backend)
        run = Run(plan, sink, print_, known, AT_ONCE)
        sink.forget(partial(_lost, where.target))
        with _refusing(sink):
            (manifest,) = produce(
                [run],
                tuning,
                verify=verify,
                progress=progress,
                checking=checking,
                say=say,
                engine=sink.stream,
            )
        _check_verified(manifest, where.target, say)
        receipt = _committed(run, manifest, where, remote)
        merged = merge_result(plan, sink.out, manifest, time.monotonic() - started)
        sink.discard()
    return _result(merged, receipt, where.target)


def _opened(plan: Plan, ready: Preflight) -> Remote:
    """The branch, made if need be, which takes shards as LFS objects."""
    target, shards = ready.target, plan.shards
    remote = open_branch(HfApi(), target, private=ready.plan.private)
    check_unmoved(target, ready.remote, remote, ready.files)
    heads = [Outgoing(s.file, Path(s.file), s.file_bytes, 0, "", s.header) for s in shards]
    with explained(f"the shards to {target}"):
        others = {shard.file for shard in shards} - names_in_lfs(target, heads)
    if others:
        raise HubError(
            f"{target} would keep {min(others)} in git, not in LFS: add `*.safetensors filter=lfs diff=lfs merge=lfs "
            "-text` to its .gitattributes"
        )
    return remote


def _send(target: Target, remote: Remote, file: Outgoing) -> None:
    """Have the Hub hold a shard, which the branch may name already."""
    if not is_same(file, remote.files.get(file.name)):
        preupload(HfApi(), target, [file])


def _lost(target: Target, objects: Sequence[tuple[str, int]]) -> set[str]:
    with explained(f"what was sent to {target}"):
        return lost(target, objects)


@contextmanager
def _refusing(sink: HubSink) -> Iterator[None]:
    """What a refused run leaves is of no use to another one; an interrupted one's is."""
    try:
        yield
    except (CheckpointError, SpecError, VerificationError):
        sink.discard()
        raise


@contextmanager
def _writing(sink: HubSink) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(error, sink.folder, kept="sent and finished shards") from error


def _check_verified(manifest: Manifest, target: Target, say: Callable[[str], None] | None) -> None:
    """Refuse before the commit, after each fault was said."""
    if manifest.verified is not False:
        return
    tell = say or (lambda _: None)
    found = manifest.verification or ()
    faults = [check for status in ("error", "warning") for check in found if check.status == status]
    for check in faults:
        tell(f"{check.status} {check.name}: {check.message}; {check.cure}")
    first, more = faults[0], len(faults) - 1
    others = f" ({more} more)" if more else ""
    raise VerificationError(
        f"{target} got no commit, the model does not verify: {first.message.splitlines()[0]}{others}: correct the "
        "models or the spec and run the same command again, or merge into a directory, mend it there and "
        "`expo publish` it"
    )


def _committed(run: Run, manifest: Manifest, where: Publication, before: Remote) -> PublishResult:
    """The one commit, of what `publish` would make of the same folder."""
    run.staging.commit(with_card(run, manifest))
    ready = where.look(run.staging.folder, run.plan)
    check_unmoved(where.target, before, ready.remote, ready.files)
    return send(ready)


def _result(merged: MergeResult, receipt: PublishResult, target: Target) -> PushResult:
    unread = [c.name for c in merged.checks if c.message.startswith((GONE, UNREAD))]
    return PushResult(replace(merged, out=Path(target.repo_id)), receipt, tuple(unread))
