"""Everything that can be known before the first byte is sent."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from yaml import YAMLError

from expo.checkpoint.files import open_directory
from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import CARD, MANIFEST, SIGNATURE
from expo.errors import CheckpointError, SpecError, VerificationError
from expo.output.manifest import AdapterManifest, Manifest, read_manifest
from expo.output.scores import read_scores
from expo.publishing.account import Account, check_right, whose_token
from expo.publishing.hub_errors import explained, status_of
from expo.publishing.licences import Terms
from expo.publishing.licences import terms as terms_of
from expo.publishing.outgoing import Outgoing, replaced, snapshot
from expo.publishing.parents import gates, hub_parents, template_warning
from expo.publishing.presentation import presented
from expo.publishing.repository import Difference, Remote, Target, compare, look
from expo.publishing.signature import digests, is_signed
from expo.results import PublishPlan


@dataclass(frozen=True)
class Preflight:
    """What is known of OUT and of the branch; `plan` is its public face."""

    plan: PublishPlan
    out: Path
    target: Target
    manifest: Manifest | AdapterManifest
    files: tuple[Outgoing, ...]
    remote: Remote


def publishable(out: Path) -> Manifest | AdapterManifest:
    """The manifest of a folder that may be published.

    Raises:
        CheckpointError: there is none, or it is damaged.
        VerificationError: it says that the model does not verify.
    """
    manifest = read_manifest(out)
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
    signs: bool = False,
    sent: Mapping[str, int] = {},
) -> Preflight:
    """Ask the Hub and OUT all there is to ask; nothing is sent or written.

    Args:
        signs: OUT will be signed.
        sent: the bytes of those files of the manifest that lie on the Hub (or will, when this is asked before they
            are made), and not in `out`, by name.

    Raises:
        CheckpointError, VerificationError: OUT is not what its manifest says.
        SpecError: licence, name or results do not do, or a signature would not hold.
        HubError: no token, no right, a gated parent, or no answer.
    """
    manifest = publishable(out)
    measured = () if results is None else read_scores(results)
    terms = terms_of(manifest, licence)
    _check_name(target, terms, name_ok=name_ok)
    contents = presented(out, manifest, terms=terms, results=measured, repo_id=target.repo_id)
    files = replaced(snapshot(out, manifest, sent), out, contents)
    _check_copies(out, files, terms, is_pushed=bool(sent))
    _check_signature(out, files, signs=signs)
    account = whose_token(api)
    remote = look(api, target)
    check_right(api, target, remote, account)
    _check_card(files)
    parents = hub_parents(manifest)
    warnings = [*terms.warnings, *gates(api, parents), *_visibility(remote, public=public)]
    if warning := template_warning(open_directory(out), manifest, parents):
        warnings.append(warning)
    difference = compare(files, remote.files)
    if signs:
        warnings += _unsigned(difference)
    private = not public if remote.head is None else remote.private
    plan = _plan(out, target, remote, difference, account, private, terms.name, signs, warnings)
    return Preflight(plan, out, target, manifest, tuple(files), remote)


def _plan(
    out: Path,
    target: Target,
    remote: Remote,
    difference: Difference,
    account: Account,
    private: bool,
    licence: str,
    signs: bool,
    warnings: list[str],
) -> PublishPlan:
    send, skip = (
        {file.name: file.nbytes for file in files} for files in (difference.send, difference.skip)
    )
    left = _left_behind(out, (*send, *skip))
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
        leave=left,
        signs=signs,
        bytes_to_send=sum(send.values()),
        bytes_in_all=sum(send.values()) + sum(skip.values()),
        warnings=tuple(warnings),
    )


def _left_behind(out: Path, published: Iterable[str]) -> dict[str, int]:
    """What lies in OUT and is not published, with its bytes."""
    known = set(published)
    return {name: size for name, size in open_directory(out).sizes.items() if name not in known}


def _check_name(target: Target, terms: Terms, *, name_ok: bool) -> None:
    if not name_ok and not terms.allow_name(target.repo_id.split("/")[1]):
        raise SpecError(
            f"{target.repo_id}: the licence wants a name that begins with {terms.prefix}: rename it, "
            "or add --name-ok"
        )


def _check_copies(out: Path, files: Iterable[Outgoing], terms: Terms, *, is_pushed: bool) -> None:
    """That the texts which have to travel with the model are there."""
    names = [file.name.lower() for file in files]
    where = "the aligned model" if is_pushed else str(out)
    cure = "merge into a directory, put it there, and `expo publish` that" if is_pushed else "put it there"  # fmt: skip
    for pattern in terms.files:
        if not any(fnmatchcase(name, pattern.lower()) for name in names):
            raise CheckpointError(
                f"{where} has no {pattern.rstrip('*')} file, and its licence asks for a copy of the text: "
                f"{cure} ({terms.link})"
            )


def _check_signature(out: Path, files: Iterable[Outgoing], *, signs: bool) -> None:
    """That the signature, where there will be one, holds for what is published."""
    names = {file.name: file for file in files}
    if signs:
        left = sorted(filter(is_signed, _left_behind(out, names)))
        if left:
            raise SpecError(
                f"--sign signs every file of {out}, and {printable(left[0])} is not published: move it elsewhere"
            )
    elif SIGNATURE in names:
        signed = digests(out)
        for name, file in names.items():
            if is_signed(name) and signed.get(name) != file.sha256:
                why = (
                    "is not the file that was signed" if file.content is None else "is written anew"
                )
                raise SpecError(
                    f"{out / SIGNATURE} would not hold: {printable(name)} {why}: add --sign KEY, or remove it"
                )


def _unsigned(difference: Difference) -> Iterator[str]:
    """What of a download no signature would cover."""
    for name in filter(is_signed, difference.keep):
        yield f"{printable(name)} stays on the branch, and the signature does not cover it"


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
