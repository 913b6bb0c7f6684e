"""What a file turns out to be by its first bytes, where a download has left something else under its name."""

import re

FIRST_BYTES = 512
"""How much of a file is enough to tell."""

_BLANK = b"\xef\xbb\xbf \t\r\n"
_AGAIN = "download it again"
_MISTAKEN = (
    # (how it begins, what it is, the cure)
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer", "run `git lfs pull` in its folder"),
    (rb"(?i)<!doctype html|<html|<head", "a web page (HTML)",
     f"{_AGAIN}; on the Hub the link with /resolve/, not /blob/"),
    (rb"<\?xml", "an XML message of a server's", _AGAIN),
    (rb"Entry not found|Repository not found|Invalid username or password|Access to model |Unauthorized",
     "an error message of the Hub's", f"`hf auth login` where the model is gated, then {_AGAIN}"),
)  # fmt: skip


def mistaken(first: bytes) -> str | None:
    """What a file that begins so is in place of a model's file, and the cure; None where nothing shows.

    Args:
        first: its first bytes, `FIRST_BYTES` of them or more.
    """
    text = first[:FIRST_BYTES].lstrip(_BLANK)
    for pattern, what, cure in _MISTAKEN:
        if re.match(pattern, text):
            return f"is {what}, not the file itself: {cure}"
    return None
