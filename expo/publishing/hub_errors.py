"""What the Hub's client raises, as one line each. Its own text, which may hold signed addresses, stays behind."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx or httpx2, by version
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from expo.checkpoint.hub import shown_endpoint
from expo.checkpoint.shown import without_secrets
from expo.errors import HubError

CLIENT_ERRORS = (
    HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip
"""Whatever a request may end with; HfHubHTTPError and the transfer's own errors are among them, and what its reading of
a strange answer comes to."""

_AGAIN = "run the same command again, it goes on from there"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the client's errors into one line that begins with `what` and ends with the cure."""
    try:
        yield
    except CLIENT_ERRORS as error:
        raise HubError(f"{what}: {reason(error)}") from _quiet(error)


def reason(error: Exception) -> str:
    """What happened and the cure."""
    error = root(error)
    match error:
        case LocalTokenNotFoundError():
            return "there is no token: `hf auth login`, or set HF_TOKEN"
        case GatedRepoError():
            return "is gated: open its page with the account of this token and ask for access"
        case RevisionNotFoundError():
            return "the repository has no such branch"
        case RepositoryNotFoundError():
            return "is not on the Hub, or this token may not see it: check the name and the token"
        case OfflineModeIsEnabled():
            return "the Hub may not be asked while HF_HUB_OFFLINE is set: unset it"
        case HFValidationError():
            return "is not a valid Hub id: name it ORG/NAME"
        case HfHubHTTPError() if error.response is not None:
            return _by_status(error.response.status_code)
    return f"the connection to {shown_endpoint()} broke ({type(error).__name__}): {_AGAIN}"


def root(error: Exception) -> Exception:
    """The request's error inside of one that the client has wrapped around it."""
    while not isinstance(error, HTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def status_of(error: Exception) -> int | None:
    """The status that the Hub answered, None where no answer came."""
    error = root(error)
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return None
    return error.response.status_code


def _by_status(status: int) -> str:
    match status:
        case 401:
            return "the token is invalid or has expired: `hf auth login`, or set HF_TOKEN"
        case 403:
            page = f"{shown_endpoint()}/settings/tokens"
            return f"this token may not do that: take one with write access from {page}"
        case 429:
            return f"the Hub asks for fewer requests: wait a while, then {_AGAIN}"
        case 400 | 413 | 422:
            return f"the Hub refuses what was sent ({status}): add --debug to see what it says"
    return f"the Hub answered {status}: {_AGAIN}"


@contextmanager
def quiet_client() -> Iterator[None]:
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


class _ClientError(Exception):
    """What the client said, without the signatures of addresses; for `--debug`."""


def _quiet(error: Exception) -> _ClientError:
    error = root(error)
    return _ClientError(f"{type(error).__name__}: {without_secrets(str(error))}")
