"""What the system refuses, in words: one line with the cure."""

import errno

from expo.checkpoint.headers import printable

_MEMORY = "there is not enough memory: close other programs, raise the limit (ulimit -v), or take fewer --threads"
_PROCESSES = "no more processes can be started: raise the limit (ulimit -u)"
_CURES = {
    errno.ENFILE: "close other programs",
    errno.EACCES: "check its mode and owner",
    errno.EPERM: "check its mode and owner",
    errno.EROFS: "name a place on another disk",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room on that disk",
    errno.EIO: "the disk or its connection fails, see dmesg",
    errno.ESTALE: "the disk or its connection fails, see dmesg",
}
_SAID = {
    "can't start new thread": _PROCESSES,
    "Resource temporarily unavailable": _PROCESSES,
    "Too many open files": "too many files are open: raise the limit (ulimit -n 4096)",
    "can't allocate memory": _MEMORY,  # torch's
    "Cannot allocate memory": _MEMORY,
    "failed to map segment": _MEMORY,
}

SYSTEM_FAULTS = (OSError, MemoryError, ImportError, RuntimeError)


def in_words(fault: Exception) -> str | None:
    """What has failed and the cure; None where it is no fault of the system."""
    if isinstance(fault, MemoryError):
        return _MEMORY
    said = next((words for sign, words in _SAID.items() if sign in str(fault)), None)
    if isinstance(fault, ImportError) and said is None:
        return f"a library cannot be loaded ({_first_line(fault)}): install expo again"
    if isinstance(fault, OSError) and said is None:
        where = f"{printable(fault.filename)}: " if isinstance(fault.filename, str) else ""
        cure = _CURES.get(fault.errno or 0)
        return f"{where}{fault.strerror or _first_line(fault)}" + (f": {cure}" if cure else "")
    return said


def _first_line(fault: Exception) -> str:
    return printable((str(fault).strip().splitlines() or [type(fault).__name__])[0])
