"""The check that files are what their names say, and how faults that files share are said once."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

from expo.checkpoint.files import check_contents
from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import MANIFEST, is_legal, is_model_sidecar, is_tokenizer_file
from expo.errors import MistakenFileError
from expo.verification.check import Check, Skipped
from expo.verification.subject import Subject

_SHOWN = 3  # names in a sentence before "and N more"
_LOADED = ("*.safetensors", "*.bin", "*.json", MANIFEST)


def strangers(s: Subject) -> dict[str, str]:
    """By name, what else a file is that a loader would read."""
    found: dict[str, str] = {}
    for name in s.out.sizes:
        loaded = is_tokenizer_file(name) or (is_model_sidecar(name) and not is_legal(name))
        if loaded or any(fnmatch(name, pattern) for pattern in _LOADED):
            try:
                check_contents(s.out, name)
            except MistakenFileError as error:
                found[name] = str(error).removeprefix(f"{s.out.label}/{printable(name)} ")
    return found


def contents(s: Subject) -> Iterator[str]:
    if not s.out.sizes:
        raise Skipped("there are no files")
    yield from together(strangers(s))


def together(faults: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each fault, with all the files that have it."""
    files: dict[str, list[str]] = {}
    for name, fault in faults.items():
        files.setdefault(fault, []).append(printable(name))
    for fault, names in files.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        each = ": each" if len(names) > 1 else ""
        yield f"{', '.join(names[:_SHOWN])}{more}{each} {fault}"


CHECKS = (
    Check("contents", "error", "files are what their names say", "fetch the files themselves, then verify again", contents),
)  # fmt: skip
