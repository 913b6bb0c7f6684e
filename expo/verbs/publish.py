"""`expo publish`: verify, upload, one commit, check what came to lie on the Hub."""

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi

from expo.checkpoint.sidecars import MANIFEST
from expo.errors import VerificationError
from expo.output.manifest import AdapterManifest, Manifest
from expo.publishing import signature
from expo.publishing.hub_errors import explained
from expo.publishing.outgoing import Outgoing, signed, written
from expo.publishing.preflight import Preflight, preflight
from expo.publishing.presentation import present
from expo.publishing.receipt import check_commit, receipt
from expo.publishing.repository import Difference, Remote, Target, compare, parse_target
from expo.publishing.upload import (
    Landed,
    check_unmoved,
    commit,
    find,
    open_branch,
    preupload,
)
from expo.publishing.watch import watched
from expo.publishing.wire import names_in_lfs
from expo.results import PublishResult, VerifyResult
from expo.spec.request import both_conventions
from expo.verification.run import check_directory, verify_folder

Progress = Callable[[int, int], None]

_SMALL = 1 << 20
"""Bytes below which files travel together."""


def publish(
    out: str | PathLike[str],
    repo_id: str,
    *,
    results: str | PathLike[str] | None = None,
    sign: str | PathLike[str] | None = None,
    public: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    license: str | None = None,
    name_ok: bool = False,
    progress: Progress | None = None,
) -> PublishResult:
    """Publish the model directory `out`, which expo has made, as one commit to the Hub repository `repo_id`.

    It is verified first. What the branch has already is not sent again; weights there that the manifest does not
    name are deleted in the same commit, other files stay. The token is HF_TOKEN's or the login's.

    Args:
        results: a file of evaluation results (`expo.results/1`), for the card.
        sign: an EC private key (PEM) to sign `out` with, last.
        public: whether a new repository is to be seen by everybody; what exists stays as it is.
        revision: the branch, made where there is none.
        create_pr: open a pull request to main instead.
        license: a Hub id; by default the most restrictive of the models that went in.
        name_ok: leave out the name prefix that a licence wants.
        progress: called with (bytes sent, bytes to send).

    Raises:
        VerificationError: `out` does not verify, or changed since its manifest was written.
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    ready = prepare(
        Path(out),
        repo_id,
        results=None if results is None else Path(results),
        sign=None if sign is None else Path(sign),
        public=public,
        revision=revision,
        create_pr=create_pr,
        licence=license,
        name_ok=name_ok,
    )
    return send(ready, sign=None if sign is None else Path(sign), progress=progress)


def prepare(
    out: Path,
    repo_id: str,
    *,
    results: Path | None = None,
    sign: Path | None = None,
    public: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    licence: str | None = None,
    name_ok: bool = False,
    progress: Progress | None = None,
) -> Preflight:
    """Everything before the first byte, for `send`: what is soon known first, the whole verification last.

    Args:
        progress: called with (bytes verified, bytes in all).

    Raises: as `publish`.
    """
    check_directory(out)
    target = parse_target(repo_id, revision=revision, create_pr=create_pr)
    if sign is not None:
        signature.check_key(sign)
    ready = preflight(
        HfApi(),
        out,
        target,
        public=public,
        licence=licence,
        name_ok=name_ok,
        results=results,
        signs=sign is not None,
    )
    found = verify_folder(out, progress=progress)
    if not found.ok:
        raise _unverified(out, found)
    return ready


def send(
    ready: Preflight, *, sign: Path | None = None, progress: Progress | None = None
) -> PublishResult:
    """Upload what `ready` holds, make the commit and check it.

    Args:
        progress: called with (bytes sent, bytes to send).

    Raises:
        HubError: the Hub does not take it, or the branch has moved. Run again, it goes on from there.
        VerificationError: a file changed since it was verified.
    """
    api, target = HfApi(), ready.target
    files = _completed(ready, sign)
    remote = open_branch(api, target, private=ready.plan.private)
    check_unmoved(target, ready.remote, remote, files)
    difference = compare(files, remote.files)
    landed = _existing(api, ready, files, remote, difference)
    if landed is None:
        in_lfs = _in_lfs(target, difference.send)
        _upload(api, target, difference.send, in_lfs, progress)
        message, description = _message(ready.manifest, files)
        landed = commit(
            api,
            target,
            difference.send,
            in_lfs,
            difference.delete,
            parent=str(remote.head),
            files=files,
            message=message,
            description=description,
        )
    check_commit(api, target, landed, files)
    return receipt(target, landed, files, difference)


def _completed(ready: Preflight, sign: Path | None) -> list[Outgoing]:
    """The files with card and signature, which are written to OUT now."""
    present(ready.out, {f.name: f.content for f in ready.files if f.content is not None})
    files = [file if file.content is None else written(file) for file in ready.files]
    if sign is None:
        return files
    signature.sign(ready.out, sign)
    return signed(files, ready.out)


def _existing(
    api: HfApi, ready: Preflight, files: Sequence[Outgoing], remote: Remote, difference: Difference
) -> Landed | None:
    """The commit of an earlier run, where it holds the same."""
    if difference.is_empty:
        return Landed(str(remote.head))
    return find(api, ready.target, files, parent=None) if ready.target.create_pr else None


def _in_lfs(target: Target, files: Sequence[Outgoing]) -> set[str]:
    """The names of the LFS objects among the files: those that are sent are some."""
    with explained(f"{len(files)} files to {target}"):
        here = [file for file in files if not file.is_sent]
        return names_in_lfs(target, here) | {file.name for file in files if file.is_sent}


def _upload(
    api: HfApi,
    target: Target,
    files: Sequence[Outgoing],
    in_lfs: set[str],
    progress: Progress | None,
) -> None:
    """The LFS objects that are not there yet, the small ones together, then the large ones one by one."""
    tell = progress or (lambda _done, _total: None)
    objects = [file for file in files if file.name in in_lfs and not file.is_sent]
    small = [file for file in objects if file.nbytes < _SMALL]
    large = [[file] for file in objects if file.nbytes >= _SMALL]
    total = sum(file.nbytes for file in files)
    done = total - sum(file.nbytes for file in objects)
    tell(done, total)
    for batch in [small, *large] if small else large:
        nbytes = sum(file.nbytes for file in batch)
        with watched(batch[0].path, partial(_tell_of_part, tell, done, nbytes, total)):
            preupload(api, target, batch)
        done += nbytes
        tell(done, total)


def _tell_of_part(tell: Progress, done: int, nbytes: int, total: int, part: int) -> None:
    tell(done + min(part, nbytes), total)


def _message(manifest: Manifest | AdapterManifest, files: Sequence[Outgoing]) -> tuple[str, str]:
    """Of the commit: a function of the manifest alone."""
    if isinstance(manifest, AdapterManifest):
        what = f"Adapter, {both_conventions(manifest.scale)}"
    elif manifest.method == "expo":
        what = "ExPO" if manifest.alpha is None else f"ExPO, {both_conventions(manifest.alpha)}"
    else:
        what = f"{manifest.method} merge"
    sha256 = next(file.sha256 for file in files if file.name == MANIFEST)
    return what, f"expo {manifest.versions.get('expo', '')}, {MANIFEST} {sha256}"


def _unverified(out: Path, found: VerifyResult) -> VerificationError:
    errors = [check for check in found.checks if check.status == "error"]
    first, more = errors[0], len(errors) - 1
    others = f" ({more} more: `expo verify {out}`)" if more else ""
    fault = first.message.splitlines()[0]
    return VerificationError(f"{out} does not verify: {fault}: {first.cure}{others}")
