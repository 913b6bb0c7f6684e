"""Names of files as a folder, a server or an index gives them: what is no path below its root is refused."""

from pathlib import PurePosixPath

_LONGEST_PART, _LONGEST = 255, 4000  # bytes that a file system takes


def fault_of(name: object) -> str | None:
    """Why no file below a root can have this name; None where one can.

    Args:
        name: with `/` between its parts.
    """
    if not isinstance(name, str) or not name:
        return "is no name"
    try:
        parts = [len(part.encode()) for part in name.split("/")]
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    if "\0" in name or "\\" in name:
        return "holds a character that no name should"
    if max(parts) > _LONGEST_PART or sum(parts) > _LONGEST:
        return "is too long for a name"
    if str(PurePosixPath(name)) != name or name.startswith("/") or ".." in name.split("/"):
        return "is no path below its folder"
    return None
