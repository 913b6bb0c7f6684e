"""The models that went in: may this account read them, and is the chat template still the donor's."""

from collections.abc import Iterator

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from expo.checkpoint.files import Files
from expo.checkpoint.headers import printable
from expo.checkpoint.hub import open_repository, shown_endpoint
from expo.checkpoint.reference import Location
from expo.checkpoint.templates import templates_in_force
from expo.errors import CheckpointError, HubError
from expo.output.manifest import AdapterManifest, Manifest
from expo.publishing.hub_errors import explained, status_of


def hub_parents(manifest: Manifest | AdapterManifest) -> dict[str, str]:
    """Every Hub repository that went in, with its commit."""
    sources = manifest.sources.values()
    pairs = [(source.model, source.commit) for source in sources]
    pairs += [(str(source.adapter), source.adapter_commit) for source in sources]
    return {name: commit for name, commit in pairs if commit}


def gates(api: HfApi, parents: dict[str, str]) -> Iterator[str]:
    """What a reader of the card should be warned of.

    Raises:
        HubError: a parent is gated, and this account has not been let in.
    """
    for parent in map(printable, parents):
        page = f"{shown_endpoint()}/{parent}"
        with explained(f"the parent {parent} ({page})"):
            try:
                api.auth_check(parent)
                info = api.model_info(parent)
            except GatedRepoError:
                raise HubError(_gated(parent, page)) from None
            except RepositoryNotFoundError:
                yield f"the parent {parent} is not on the Hub, or not for this account: no link to it will open"
                continue
            except OSError as error:  # the client's errors are among them
                if status_of(error) not in (401, 403):
                    raise
                raise HubError(_gated(parent, page)) from None
        if info.private:
            yield f"the parent {parent} is private: readers cannot open the card's link to it"
        elif info.gated:
            yield f"the parent {parent} is gated, OUT will not be: see whether its licence lets you"


def template_warning(
    out: Files, manifest: Manifest | AdapterManifest, parents: dict[str, str]
) -> str | None:
    """A sentence where OUT's chat template is not the donor's; None where it is, or the donor is not on the Hub,
    or OUT is an adapter: it may have none."""
    donor = manifest.donor if isinstance(manifest, Manifest) else None
    if donor is None or donor not in parents:
        return None
    try:
        theirs = templates_in_force(
            open_repository(Location(repo_id=donor, revision=parents[donor]))
        )
        mine = templates_in_force(out)
    except (HubError, CheckpointError, ValueError, TypeError, KeyError):
        return f"the chat template could not be compared with that of {printable(donor)}"
    return None if mine == theirs else f"the chat template is not that of {printable(donor)}"


def _gated(parent: str, page: str) -> str:
    return (
        f"the parent {parent} is gated: open {page} with the account of this token and ask for access, "
        "its terms hold for OUT too"
    )
