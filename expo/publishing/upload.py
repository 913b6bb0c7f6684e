"""The upload: files one by one, then one commit that holds them all or is not made."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from expo.errors import HubError
from expo.publishing.hub_errors import CLIENT_ERRORS, explained, root, status_of
from expo.publishing.outgoing import Outgoing
from expo.publishing.repository import Remote, Target, compare, files_at, look

_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before a commit is tried again: what the client does for every other request."""

_LONGEST_PAUSE = 300.0
_IN_MEMORY = 10 << 20
_RECENT = 10


@dataclass(frozen=True)
class Landed:
    """A commit on the Hub; `pull_request` is its URL where one was opened."""

    commit: str
    pull_request: str | None = None


def open_branch(api: HfApi, target: Target, *, private: bool) -> Remote:
    """Make what does not exist yet, the repository or the branch, and say what is there now.

    Raises:
        HubError: it cannot be made.
    """
    remote = look(api, target)
    if remote.head is None:
        with explained(f"{target} cannot be created"):
            api.create_repo(target.repo_id, private=private, exist_ok=True)
        remote = look(api, target)
    if remote.has_branch or target.create_pr:
        return remote
    with explained(f"{target} cannot be created"):
        api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
    return look(api, target)


def preupload(api: HfApi, target: Target, files: Sequence[Outgoing]) -> list[CommitOperationAdd]:
    """Send the content of files ahead of the commit that will name them, hashed no second time.

    Raises:
        HubError: the Hub does not take them.
        VerificationError: a file changed under way.
    """
    operations = [_addition(file) for file in files]
    what = files[0].name if len(files) == 1 else f"{len(files)} files"
    with explained(f"{what} to {target}"), _quiet_client():
        api.preupload_lfs_files(
            target.repo_id,
            operations,
            revision=target.revision,
            create_pr=target.create_pr,
            free_memory=False,
            gitignore_content="",  # a .gitignore on the branch must not thin the model out
        )
    for file in files:
        file.confirm()
    return operations


def commit(
    api: HfApi,
    target: Target,
    operations: Iterable[CommitOperationAdd | CommitOperationDelete],
    *,
    parent: str,
    files: Sequence[Outgoing],
    message: str,
    description: str,
) -> Landed:
    """Make the one commit on top of `parent`. An answer that does not come is looked up in the tree: where it holds
    `files` the commit was made.

    Raises:
        HubError: it was not made, or the branch has moved.
    """
    operations = list(operations)
    for pause in (*_PAUSES, None):
        try:
            with _quiet_client():
                made = api.create_commit(
                    target.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=target.revision,
                    create_pr=target.create_pr,
                    parent_commit=parent,
                )
            return Landed(made.oid, made.pr_url)
        except CLIENT_ERRORS as error:
            if landed := find(api, target, files, parent=parent):
                return landed
            if pause is None or not _may_pass(error):
                with explained(f"the commit to {target}"):
                    raise
            time.sleep(_pause(error, pause))
    raise AssertionError("the last attempt returns or raises")


def find(
    api: HfApi, target: Target, files: Sequence[Outgoing], *, parent: str | None
) -> Landed | None:
    """The commit that holds the files and no other weights, if it has been made.

    Raises:
        HubError: no answer, or the branch is neither that nor at `parent`.
    """
    if target.create_pr:
        return _pull_request(api, target, files)
    remote = look(api, target)
    if remote.head and compare(files, remote.files).is_empty:
        return Landed(remote.head)
    if parent is not None and remote.head != parent:
        raise _moved(target)
    return None


def check_unmoved(target: Target, before: Remote, now: Remote, files: Sequence[Outgoing]) -> None:
    """That a branch is the one that was looked at, or one that was made since and holds no other model.

    Raises:
        HubError: somebody else has written to it.
    """
    if now.head != before.head if before.head else compare(files, now.files).delete:
        raise _moved(target)


def _moved(target: Target) -> HubError:
    return HubError(
        f"{target} got other commits since it was looked at: run the same command again, what was "
        "sent is not sent twice"
    )


def _pull_request(api: HfApi, target: Target, files: Sequence[Outgoing]) -> Landed | None:
    """One of the last pull requests, if it holds the files."""
    with explained(str(target)):
        refs = api.list_repo_refs(target.repo_id, include_pull_requests=True).pull_requests or []
        numbered = sorted(((int(ref.ref.rsplit("/", 1)[1]), ref) for ref in refs), reverse=True, key=lambda pair: pair[0])  # fmt: skip
        for number, ref in numbered[:_RECENT]:
            if compare(files, files_at(api, target.repo_id, ref.target_commit)).is_empty:
                return Landed(ref.target_commit, f"{target.url}/discussions/{number}")
    return None


def _addition(file: Outgoing) -> CommitOperationAdd:
    """A small file is read now, because those that are not in LFS travel with the commit itself."""
    if file.nbytes < _IN_MEMORY:
        return CommitOperationAdd(file.name, file.read())
    file.confirm()
    operation = CommitOperationAdd(file.name, file.path)
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no answer, too many requests, a fault of the server."""
    status = status_of(error)
    return status is None or status in (408, 429) or status >= 500


def _pause(error: Exception, otherwise: float) -> float:
    response = getattr(root(error), "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), _LONGEST_PAUSE) if asked.isdigit() else otherwise


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Without the client's own bars and warnings, which name signed addresses."""
    verbosity, has_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if has_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            enable_progress_bars()
