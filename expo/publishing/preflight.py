"""Everything that can be known before the first byte is sent."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from yaml import YAMLError

from expo.checkpoint.files import open_directory
from expo.checkpoint.sidecars import CARD, MANIFEST
from expo.errors import CheckpointError, SpecError, VerificationError
from expo.output.manifest import Manifest
from expo.publishing import seam
from expo.publishing.account import Account, check_right, whose_token
from expo.publishing.hub_errors import explained, status_of
from expo.publishing.outgoing import Outgoing, replaced, snapshot
from expo.publishing.parents import gates, hub_parents, template_warning
from expo.publishing.repository import Difference, Remote, Target, compare, look
from expo.results import PublishPlan


@dataclass(frozen=True)
class Preflight:
    """What is known of OUT and of the branch; `plan` is its public face."""

    plan: PublishPlan
    out: Path
    target: Target
    manifest: Manifest
    files: tuple[Outgoing, ...]
    remote: Remote


def read_manifest(out: Path) -> Manifest:
    """The manifest of a folder that may be published.

    Raises:
        CheckpointError: there is none, or it is damaged.
        VerificationError: it says that the model does not verify.
    """
    if not (out / MANIFEST).is_file():
        raise CheckpointError(f"{out} has no {MANIFEST}: publish takes what expo has made")
    manifest = Manifest.from_json((out / MANIFEST).read_bytes())
    if manifest.verified is False:
        raise VerificationError(
            f'{out} is marked "verified": false by its {MANIFEST}: `expo verify {out}` says why; '
            "cure that and merge again"
        )
    return manifest


def preflight(
    api: HfApi,
    out: Path,
    target: Target,
    *,
    public: bool = False,
    licence: str | None = None,
    name_ok: bool = False,
    results: Path | None = None,
) -> Preflight:
    """Ask the Hub and OUT all there is to ask; nothing is sent or written.

    Raises:
        CheckpointError, VerificationError: OUT is not what its manifest says.
        SpecError: licence or name do not do.
        HubError: no token, no right, a gated parent, or no answer.
    """
    manifest = read_manifest(out)
    terms = seam.terms(manifest, licence)
    _check_name(target, terms, name_ok=name_ok)
    files = _with_card(snapshot(out, manifest), out, manifest, terms, results)
    account = whose_token(api)
    remote = look(api, target)
    check_right(api, target, remote, account)
    _check_card(files)
    parents = hub_parents(manifest)
    warnings = [*gates(api, parents), *_visibility(remote, public=public)]
    if warning := template_warning(open_directory(out), manifest, parents):
        warnings.append(warning)
    difference = compare(files, remote.files)
    private = not public if remote.head is None else remote.private
    plan = _plan(out, target, remote, difference, account, private, terms.licence, warnings)
    return Preflight(plan, out, target, manifest, tuple(files), remote)


def _plan(
    out: Path,
    target: Target,
    remote: Remote,
    difference: Difference,
    account: Account,
    private: bool,
    licence: str | None,
    warnings: list[str],
) -> PublishPlan:
    send, skip = (
        {file.name: file.nbytes for file in files} for files in (difference.send, difference.skip)
    )
    leave = {
        name: size
        for name, size in open_directory(out).sizes.items()
        if name not in send and name not in skip
    }
    return PublishPlan(
        repo_id=target.repo_id,
        url=target.url,
        revision=target.revision,
        is_new=remote.head is None,
        private=private,
        pull_request=target.create_pr,
        account=account.name,
        head=remote.head,
        licence=licence,
        send=send,
        skip=skip,
        delete=dict(difference.delete),
        keep=dict(difference.keep),
        leave=leave,
        bytes_to_send=sum(send.values()),
        bytes_in_all=sum(send.values()) + sum(skip.values()),
        warnings=tuple(warnings),
    )


def _check_name(target: Target, terms: seam.Terms, *, name_ok: bool) -> None:
    name = target.repo_id.split("/")[1]
    if terms.prefix and not name_ok and not _plain(name).startswith(_plain(terms.prefix)):
        raise SpecError(
            f"{target.repo_id}: the licence {terms.licence} wants a name that begins with "
            f"{terms.prefix}: rename it, or add --name-ok"
        )


def _plain(name: str) -> str:
    """Without what a Hub id cannot hold: `Llama 3` and `llama-3` are one name."""
    return re.sub(r"[\s_]+", "-", name).lower()


def _with_card(
    files: list[Outgoing], out: Path, manifest: Manifest, terms: seam.Terms, results: Path | None
) -> list[Outgoing]:
    """The files with the card as it will be; OUT itself is not touched yet."""
    path = out / CARD
    try:
        existing = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: mend or remove it") from error
    text = seam.readme(manifest, existing, terms, results)
    return files if text == existing else replaced(files, out, CARD, text.encode())


def _check_card(files: list[Outgoing]) -> None:
    """The Hub's own judgement on the card's front matter, before anything is sent."""
    card = next(file for file in files if file.name == CARD)
    text = card.path.read_text(encoding="utf-8") if card.content is None else card.content.decode()
    wrong = (
        f"{CARD}: its front matter is not valid: correct the lines between the --- of {card.path}"
    )
    with explained(f"{CARD} could not be checked"):
        try:
            RepoCard(text).validate(repo_type="model")
        except YAMLError as error:
            raise CheckpointError(wrong) from error
        except ValueError as error:
            if status_of(error) in (None, 400):
                raise CheckpointError(wrong) from error
            raise


def _visibility(remote: Remote, *, public: bool) -> Iterator[str]:
    if remote.head is not None and not remote.private and not public:
        yield "the repository is public: everybody will see the model"
    if remote.head is not None and remote.private and public:
        yield "the repository is private and stays so: --public is for new ones, change it in its settings"
