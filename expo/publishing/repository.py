"""The remote side: a repository, one of its branches, and what lies there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from expo.checkpoint.hub import shown_endpoint
from expo.checkpoint.reference import HUB_ID
from expo.checkpoint.sidecars import is_weights
from expo.errors import SpecError
from expo.publishing.hub_errors import explained
from expo.publishing.outgoing import Outgoing


@dataclass(frozen=True)
class Target:
    """Where to publish: a branch, or a pull request to it."""

    repo_id: str
    revision: str = "main"
    create_pr: bool = False

    def __str__(self) -> str:
        return self.repo_id if self.revision == "main" else f"{self.repo_id}@{self.revision}"

    @property
    def url(self) -> str:
        return f"{shown_endpoint()}/{self.repo_id}"


@dataclass(frozen=True)
class Remote:
    """What a branch holds at `head`; None where the repository does not exist. A branch that does not exist
    yet starts where main is."""

    head: str | None = None
    private: bool = True
    has_branch: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """OUT against a branch: see `expo.results.PublishPlan`."""

    send: tuple[Outgoing, ...]
    skip: tuple[Outgoing, ...]
    delete: Mapping[str, int]
    keep: Mapping[str, int]

    @property
    def is_empty(self) -> bool:
        return not (self.send or self.delete)


def parse_target(text: str, *, revision: str = "main", create_pr: bool = False) -> Target:
    """Raises SpecError where `text` is no ORG/NAME."""
    repo_id = text.removeprefix("hf://")
    if not HUB_ID.fullmatch(repo_id):
        raise SpecError(f"{text} is not a Hub id: name it ORG/NAME")
    if create_pr and revision != "main":
        raise SpecError("--create-pr opens a pull request to main: leave --revision out")
    return Target(repo_id, revision, create_pr)


def look(api: HfApi, target: Target) -> Remote:
    """The branch as it is now.

    Raises:
        HubError: no answer, or none that this token may have.
    """
    with explained(str(target)):
        try:
            info = api.model_info(target.repo_id, revision=target.revision)
        except RevisionNotFoundError:
            info = api.model_info(target.repo_id)
            return Remote(
                info.sha, bool(info.private), files=files_at(api, target.repo_id, str(info.sha))
            )
        except RepositoryNotFoundError:
            return Remote()
        files = files_at(api, target.repo_id, str(info.sha))
        return Remote(info.sha, bool(info.private), has_branch=True, files=files)


def files_at(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """Every file of the repository at a revision."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def compare(files: Iterable[Outgoing], remote: Mapping[str, RepoFile]) -> Difference:
    """What has to be sent and deleted so that a branch holds the files and no other weights."""
    files = list(files)
    present = {file.name for file in files if is_same(file, remote.get(file.name))}
    others = {name: entry.size for name, entry in remote.items() if name not in {f.name for f in files}}  # fmt: skip
    return Difference(
        send=tuple(file for file in files if file.name not in present),
        skip=tuple(file for file in files if file.name in present),
        delete={name: size for name, size in others.items() if is_weights(name)},
        keep={name: size for name, size in others.items() if not is_weights(name)},
    )


def is_same(file: Outgoing, there: RepoFile | None) -> bool:
    """Whether the Hub's file has this content: by SHA-256 in LFS, else by git's hash."""
    if there is None or there.size != file.nbytes:
        return False
    return there.lfs.sha256 == file.sha256 if there.lfs else there.blob_id == file.blob_id
