"""Who publishes, and whether they may."""

from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from expo.checkpoint.hub import shown_endpoint
from expo.errors import HubError
from expo.publishing.hub_errors import explained, status_of
from expo.publishing.repository import Remote, Target

_TOKENS = "/settings/tokens"


@dataclass(frozen=True)
class Account:
    """Whose token it is, what it may do ("read", "write", "fineGrained"), and where it may create."""

    name: str
    role: str
    namespaces: frozenset[str]


def whose_token(api: HfApi) -> Account:
    """Raises HubError: there is no token, or it is invalid or expired."""
    with explained("the Hub's token"):
        said = api.whoami()
    token = said.get("auth", {}).get("accessToken") or {}
    spaces = [said["name"], *(org["name"] for org in said.get("orgs", ()))]
    return Account(said["name"], token.get("role", "write"), frozenset(spaces))


def check_right(api: HfApi, target: Target, remote: Remote, account: Account) -> None:
    """That the account may do what publishing to `target` takes.

    Raises:
        HubError: it may not, or there is nothing to open a pull request to.
    """
    if remote.head is None:
        _check_creation(target, account)
    elif not target.create_pr:
        _check_writing(api, target, account)


def _check_creation(target: Target, account: Account) -> None:
    if target.create_pr:
        raise HubError(f"{target} is not on the Hub: publish it without --create-pr first")
    namespace = target.repo_id.split("/")[0]
    if account.role == "read":
        raise HubError(f"{target} cannot be created: {_read_only(account)}")
    if account.role == "write" and namespace not in account.namespaces:
        raise HubError(
            f"{target} cannot be created: {account.name} is no member of {namespace}: name another "
            "ORG, or use a token of a member"
        )


def _check_writing(api: HfApi, target: Target, account: Account) -> None:
    if account.role == "read":
        raise HubError(f"{target} cannot be written: {_read_only(account)}")
    with explained(f"{target} cannot be written"):
        try:
            api.auth_check(target.repo_id, write=True)
        except RepositoryNotFoundError as error:
            raise HubError(_no_right(target, account)) from error
        except OSError as error:  # the client's errors are among them
            if status_of(error) != 403:
                raise
            raise HubError(_no_right(target, account)) from error


def _read_only(account: Account) -> str:
    page = f"{shown_endpoint()}{_TOKENS}"
    return (
        f"the token of {account.name} is for reading only: take one with write access from {page}"
    )


def _no_right(target: Target, account: Account) -> str:
    return (
        f"{target} cannot be written: {account.name} has no write access to it: ask its owner for it, "
        "or add --create-pr"
    )
