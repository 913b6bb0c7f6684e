"""A model's signature: an OpenSSF Model Signing bundle over a folder, by an elliptic-curve key, without network."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import SIGNATURE
from expo.errors import ExpoError, SpecError
from expo.output.durable import seal_file, unwritable
from expo.results import CheckResult
from expo.temporary import temporary_folder

if TYPE_CHECKING:
    from model_signing import hashing

_IGNORED = (SIGNATURE, ".cache", ".git", ".gitattributes", ".gitignore", ".github")
"""The signature itself, and what git and the Hub's client put into a folder."""

_FAULTS = (
    (r"Hash mismatch for '([^']+)'", "{} is not the file that was signed"),
    (r"Missing files in model '[^']*': ([^\"]+)", "{} was signed and is missing"),
    (r"Extra files found in model '[^']*': ([^\"]+)", "{} was not signed"),
)
_CURE = "restore the files, or have the folder signed again by whom you trust"


def sign(folder: Path, key: Path) -> Path:
    """Sign every file of `folder` but the signature, which is written there (`model.sig`) and returned.

    A signature that holds already is left as it is, so that signing again changes nothing.

    Args:
        key: an EC private key (P-256, P-384 or P-521) in PEM, without a password.

    Raises:
        SpecError: `key` is none.
        OutputError: the signature cannot be written.
        ExpoError: the extra `sign` is not installed.
    """
    check_extra()
    from model_signing import signing

    target = folder / SIGNATURE
    with _public_half(key) as public:
        if target.exists() and not faults(folder, public):
            return target
    config = signing.Config().set_hashing_config(_hashing())
    try:
        config.use_elliptic_key_signer(private_key=key).sign(folder, target)
        seal_file(target)
    except OSError as error:
        raise unwritable(error, folder) from error
    return target


def check_key(key: Path) -> None:
    """That `key` can sign. Raises as `sign`."""
    check_extra()
    with _public_half(key):
        pass


def check_signature(folder: Path, key: Path) -> CheckResult:
    """Whether the folder is what was signed, as a check of `expo verify`.

    Args:
        key: the EC public key in PEM.

    Raises:
        SpecError: `key` is none.
        ExpoError: the extra `sign` is not installed.
    """
    check_extra()
    if not (folder / SIGNATURE).exists():
        return CheckResult("signature", "error", f"there is no {SIGNATURE}", _CURE)
    found = faults(folder, key)
    if found:
        return CheckResult("signature", "error", "; ".join(found), _CURE)
    return CheckResult("signature", "pass", "the files are those that this key has signed", "")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of what was signed, as the signature says it; who signed is `check_signature`'s to say.

    Raises:
        SpecError: it is no signature over files.
    """
    path = folder / SIGNATURE
    try:
        payload = json.loads(path.read_bytes())["dsseEnvelope"]["payload"]
        resources = json.loads(base64.b64decode(payload))["predicate"]["resources"]
        return {str(one["name"]): str(one["digest"]) for one in resources}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SpecError(
            f"{path} is no signature over a model's files: add --sign KEY, or remove it"
        ) from error


def is_signed(name: str) -> bool:
    """Whether a signature covers the file of this name."""
    return name.split("/")[0] not in _IGNORED


def check_extra() -> None:
    """Raises ExpoError: the extra `sign` is not installed."""
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise ExpoError(
            f"signatures need model-signing (no module {error.name}): pip install 'expo-merge[sign]'"
        ) from error


def faults(folder: Path, key: Path) -> list[str]:
    """What is not as it was signed; empty where all is.

    Raises:
        SpecError: `key` is no EC public key.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _no_key(key, "public", error) from error
    try:
        config.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
    except InvalidSignature:
        return [f"{SIGNATURE} was not made by this key"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return _told(str(error))
    return []


def _told(message: str) -> list[str]:
    """The library's message, file by file."""
    if "Key mismatch" in message:
        return [f"{SIGNATURE} was made by another key"]
    message = message.replace("\\'", "'")  # it is the text of a list
    found = [
        words.format(printable(name))
        for pattern, words in _FAULTS
        for names in re.findall(pattern, message)
        for name in names.split(", ")
    ]
    first = message.strip().splitlines()[0] if message.strip() else "no reason given"
    return found or [f"{SIGNATURE} cannot be checked: {printable(first)}"]


def _hashing() -> "hashing.Config":
    """SHA-256 of every file. The Hub's cache holds links, so links are followed."""
    from model_signing import hashing

    config = hashing.Config().use_file_serialization().set_allow_symlinks(True)
    return config.set_ignored_paths(paths=_IGNORED)


@contextmanager
def _public_half(key: Path) -> Iterator[Path]:
    """The public key that belongs to a private one, in a file."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise _no_key(key, "private", error) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise SpecError(f"{key} is no elliptic-curve key: openssl ecparam -name prime256v1 -genkey")
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    with temporary_folder() as folder:
        public = folder / "key.pub"
        public.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, kind))
        yield public


def _no_key(key: Path, kind: str, error: Exception) -> SpecError:
    """No word of the key's content: only why it cannot be used."""
    why = error.strerror if isinstance(error, OSError) else "not one, or it has a password"
    return SpecError(f"{key} cannot be used as a {kind} EC key in PEM: {why}")
