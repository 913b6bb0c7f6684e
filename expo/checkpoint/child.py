"""Starting `confined.py`, and asking it."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from expo.checkpoint.headers import printable
from expo.checkpoint.parsing import MOST_BYTES, parse_json, shown

_PROGRAM = Path(__file__).with_name("confined.py")
_MEMORY_BYTES, _CPU_SECONDS = 512 << 20, 2
_PATIENCE_SECONDS = 8  # where the processor is shared, computing takes longer
_MOST_READ = 1 << 30


def search(patterns: Sequence[str], texts: Sequence[str]) -> list[frozenset[str]]:
    """Of every regular expression the texts that it is found in, as `re.search` finds.

    Raises:
        ValueError: one is none, or does not come to an end; the message names it.
    """
    request = json.dumps({"patterns": patterns, "texts": texts})
    with _started("match") as process:
        try:
            out, _ = process.communicate(request.encode(), _PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    answers = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    for pattern, answer in zip(patterns, answers, strict=False):
        if isinstance(answer, str):
            raise ValueError(f"{shown(pattern)} is not a regular expression: {printable(answer)}")
    if len(answers) < len(patterns):
        what = shown(patterns[len(answers)])
        raise ValueError(f"{what} does not come to an end on these names: write it simpler")
    return [frozenset(texts[int(number)] for number in answer) for answer in answers]


def unpickle(read: Callable[[int, int], bytes], size: int) -> object:
    """What `confined.py` finds in a `.bin` file of `size` bytes: a list of tensors, or a text that says why none.

    Args:
        read: the bytes from one place of the file to another.

    Raises:
        ValueError: the child died of it.
    """
    try:
        with _started("unpickle") as process:
            return _answered(process, read, size)
    except (BrokenPipeError, ValueError):
        raise ValueError("the process that read it died of it") from None


def _answered(
    process: subprocess.Popen[bytes], read: Callable[[int, int], bytes], size: int
) -> object:
    """What the child says in the end, its requests for ranges served until then."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"%d\n" % size)
    left = _MOST_READ
    while left > 0:
        process.stdin.flush()
        match parse_json(process.stdout.readline(MOST_BYTES)):
            case {"read": [int(begin), int(end)]} if 0 <= begin <= end <= begin + MOST_BYTES:
                content = read(begin, end)
                process.stdin.write(struct.pack("<Q", len(content)) + content)
                left -= len(content)
            case answer:
                return answer
    raise ValueError("it asks for more than any layout needs")


def _started(task: str) -> subprocess.Popen[bytes]:
    # -I -S: no variable, no folder and no package of the user's
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_PROGRAM), task, str(_MEMORY_BYTES), str(_CPU_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
    )
