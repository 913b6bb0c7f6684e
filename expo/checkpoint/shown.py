"""Text from outside as it may be shown: it does nothing but show, and tells no secret of an address."""

import re

_SHAPELESS = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)
"""What Unicode counts among letters and marks, and nobody sees: joiners, fillers, selectors of variants."""

_WHO = re.compile(r"\b((?:https?|socks\w*)://)[^\s/?#]*@", re.I)
_QUERY = re.compile(r"\b(https?://[^\s?'\"<>]*\?)[^\s'\"<>]+", re.I)


def visible(text: str) -> str:
    """A piece of one line: control characters, marks of direction, separators and what has no shape as escapes."""
    if text.isprintable() and text.isascii():
        return text
    return "".join(c if c.isprintable() and c not in _SHAPELESS else ascii(c)[1:-1] for c in text)


def without_secrets(text: str) -> str:
    """A text with `***` for the name and password of every address in it, and `…` for its query."""
    return _QUERY.sub(r"\1…", _WHO.sub(r"\1***@", text))
