"""After the commit: does the Hub hold what was sent, and the receipt."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from expo.errors import HubError, OutputError
from expo.publishing.hub_errors import explained
from expo.publishing.outgoing import Outgoing
from expo.publishing.repository import Difference, Target, files_at, is_same
from expo.publishing.upload import Landed
from expo.results import PublishResult


def check_commit(api: HfApi, target: Target, landed: Landed, files: Sequence[Outgoing]) -> None:
    """Every size and hash at the commit against the manifest's.

    Raises:
        HubError: a file is missing there, or another one.
    """
    with explained(f"{target} was published at {landed.commit} but could not be checked"):
        there = files_at(api, target.repo_id, landed.commit)
    for file in files:
        if not is_same(file, there.get(file.name)):
            raise HubError(
                f"{target} at {landed.commit}: {file.name} {_fault(file, there.get(file.name))}: do not "
                "use that commit, run the same command again to replace it"
            )


def receipt(
    target: Target, landed: Landed, files: Sequence[Outgoing], difference: Difference
) -> PublishResult:
    return PublishResult(
        url=f"{target.url}/commit/{landed.commit}",
        commit=landed.commit,
        files={file.name: file.sha256 for file in files},
        bytes_sent=sum(file.nbytes for file in difference.send),
        bytes_skipped=sum(file.nbytes for file in difference.skip),
        deleted=tuple(difference.delete),
        pull_request=landed.pull_request,
    )


def check_receipt_path(path: Path) -> None:
    """That a receipt can be written, before anything is published."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: name a file in a folder that exists")


def _fault(file: Outgoing, there: RepoFile | None) -> str:
    if there is None:
        return "is missing"
    if there.size != file.nbytes:
        return f"has {there.size} bytes, not {file.nbytes}"
    mine, theirs = (file.sha256, there.lfs.sha256) if there.lfs else (file.blob_id, there.blob_id)
    return f"has the hash {theirs[:12]}…, not {mine[:12]}…"
