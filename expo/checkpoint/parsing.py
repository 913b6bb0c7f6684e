"""JSON from outside, within limits: what is larger, deeper or wider than any model's is not parsed."""

import json
import re
import reprlib
from collections.abc import Callable
from itertools import chain

MOST_BYTES = 64 << 20
"""Of a file that is read whole: twice the largest tokenizer on the Hub."""
_MOST_VALUES = 4_000_000  # a vocabulary of a million pieces has 2.7 million
_MOST_LEVELS = 100
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 4, 4
_SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 80, 40, 80


def shown(value: object) -> str:
    """A value from outside as Python writes it, short: the middle of what is long is left out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"


def parse_json(
    raw: bytes, *, pairs: Callable[[list[tuple[str, object]]], object] | None = None
) -> object:
    """Any JSON value. NaN and Infinity are numbers, as configurations have them.

    Args:
        pairs: makes an object of its keys and values, in their order.

    Raises:
        ValueError: it is not JSON, not UTF-8, holds half a character, or is beyond the limits.
    """
    if len(raw) > MOST_BYTES:
        raise ValueError(f"{len(raw)} bytes, at most {MOST_BYTES} are read")
    values = sum(map(raw.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES:
        raise ValueError(f"{values} values, at most {_MOST_VALUES} are read")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
        if _HALF_CHARACTER.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half of a character (a lone surrogate)") from None
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        if not level:
            return
        within = chain.from_iterable(c.values() if isinstance(c, dict) else c for c in level)
        level = [item for item in within if isinstance(item, dict | list)]
    raise ValueError(f"nested deeper than {_MOST_LEVELS} levels")
