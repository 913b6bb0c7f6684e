"""The upload: files one by one, then one commit that holds them all or is not made."""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi

from expo.errors import HubError
from expo.publishing.hub_errors import CLIENT_ERRORS, explained, quiet_client, root, status_of
from expo.publishing.outgoing import Outgoing
from expo.publishing.repository import Remote, Target, compare, files_at, look
from expo.publishing.wire import post_commit

_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before a commit is tried again: what the client does for every other request."""

_LONGEST_PAUSE = 300.0
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


def preupload(api: HfApi, target: Target, files: Sequence[Outgoing]) -> None:
    """Send LFS objects ahead of the commit that will name them, hashed no second time. When it returns the Hub has
    them.

    Raises:
        HubError: the Hub does not take them.
        VerificationError: a file changed under way.
    """
    operations = [_addition(file) for file in files]
    what = files[0].name if len(files) == 1 else f"{len(files)} files"
    with explained(f"{what} to {target}"), quiet_client():
        api.preupload_lfs_files(
            target.repo_id,
            operations,
            revision=target.revision,
            create_pr=target.create_pr,
            gitignore_content="",  # as in `names_in_lfs`
        )
    for file in files:
        file.confirm()


def commit(
    api: HfApi,
    target: Target,
    send: Sequence[Outgoing],
    in_lfs: Collection[str],
    deleted: Iterable[str],
    *,
    parent: str,
    files: Sequence[Outgoing],
    message: str,
    description: str,
) -> Landed:
    """Make the one commit on top of `parent`: `send`, those `in_lfs` by their hash. An answer that does not come is
    looked up in the tree: where it holds `files` the commit was made.

    Raises:
        HubError: it was not made, or the branch has moved.
        VerificationError: a small file changed.
    """
    said = {"parent": parent, "message": message, "description": description}
    for pause in (*_PAUSES, None):
        try:
            return Landed(*post_commit(target, send, in_lfs, deleted, **said))
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
    file.confirm()
    operation = CommitOperationAdd(file.name, file.path if file.content is None else file.content)
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
