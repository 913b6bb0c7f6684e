"""Three requests to the Hub that its client makes for files at hand only: which files go to LFS, which of those are
there, and the commit. Their form is that of huggingface_hub 2.4, in whose functions the content has to be given."""

import base64
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, http_backoff

from expo.publishing.hub_errors import quiet_client
from expo.publishing.outgoing import Outgoing
from expo.publishing.repository import Target

_AT_ONCE = 256
"""Files in a request: what the client asks of at a time."""


@quiet_client()
def names_in_lfs(target: Target, files: Sequence[Outgoing]) -> set[str]:
    """Which files the Hub takes as LFS objects; the others travel with the commit. Empty files always do.

    Raises: as the client.
    """
    found: set[str] = set()
    for part in _parts(files):
        asked = [{"path": f.name, "sample": _base64(f.sample), "size": f.nbytes} for f in part]
        response = http_backoff(
            "POST",
            _api(target, "preupload"),
            params=_how(target),
            headers=build_hf_headers(),
            # a .gitignore on the branch must not thin the model out
            json={"files": asked, "gitIgnore": ""},
        )
        hf_raise_for_status(response)
        said = response.json()["files"]
        found |= {file["path"] for file in said if file["uploadMode"] == "lfs"}
    return found - {file.name for file in files if not file.nbytes}


@quiet_client()
def lost(target: Target, objects: Sequence[tuple[str, int]]) -> set[str]:
    """Which LFS objects, (SHA-256, bytes), the Hub does not hold: it would have them uploaded. One that lies in Xet's
    store and that the Hub does not count before a commit is among them; sending it again costs no chunk.

    Raises: as the client.
    """
    missing: set[str] = set()
    for part in _parts(objects):
        infos = [UploadInfo(nbytes, b"", bytes.fromhex(sha256)) for sha256, nbytes in part]
        branch = None if target.create_pr else target.revision
        actions, errors, _ = post_lfs_batch_info(
            infos, token=None, repo_type="model", repo_id=target.repo_id, revision=branch
        )
        missing |= {one["oid"] for one in (*actions, *errors) if "actions" in one or "error" in one}
    return missing


@quiet_client()
def post_commit(
    target: Target,
    files: Iterable[Outgoing],
    in_lfs: Collection[str],
    deleted: Iterable[str],
    *,
    parent: str,
    message: str,
    description: str,
) -> tuple[str, str | None]:
    """Ask once for a commit on top of `parent`; its id, and the URL of its pull request.

    Raises: as the client, and as `Outgoing.read`.
    """
    header = {"summary": message, "description": description, "parentCommit": parent}
    lines = [{"key": "header", "value": header}]
    lines += [_pointer(file) if file.name in in_lfs else _content(file) for file in files]
    lines += [{"key": "deletedFile", "value": {"path": name}} for name in deleted]
    response = get_session().post(
        _api(target, "commit"),
        params=_how(target),
        headers=build_hf_headers() | {"Content-Type": "application/x-ndjson"},
        content=b"".join(json.dumps(line).encode() + b"\n" for line in lines),
    )
    hf_raise_for_status(response, endpoint_name="commit")
    said = response.json()
    return said["commitOid"], said["pullRequestUrl"] if target.create_pr else None


def _pointer(file: Outgoing) -> dict:
    value = {"path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.nbytes}
    return {"key": "lfsFile", "value": value}


def _content(file: Outgoing) -> dict:
    value = {"path": file.name, "content": _base64(file.read()), "encoding": "base64"}
    return {"key": "file", "value": value}


def _api(target: Target, verb: str) -> str:
    branch = quote(target.revision, safe="")
    return f"{constants.ENDPOINT}/api/models/{target.repo_id}/{verb}/{branch}"


def _how(target: Target) -> dict[str, str] | None:
    return {"create_pr": "1"} if target.create_pr else None


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _parts(items: Sequence) -> Iterator[Sequence]:
    return (items[at : at + _AT_ONCE] for at in range(0, len(items), _AT_ONCE))
