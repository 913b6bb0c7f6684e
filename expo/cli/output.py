"""The one place that prints: data to stdout, talk and progress to stderr."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from expo.checkpoint.shown import visible, without_secrets
from expo.planning.findings import gigabytes

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG_SECONDS = 15.0

STEPS = "steps"
"""A unit whose parts take very different times: there is no telling when it ends."""

WRITTEN: list[Path] = []
"""What this process has put in its place, for the message where that cannot be printed."""


class Output:
    """Where a command's words go. `json` turns its data into JSON, `quiet` silences the talk, `verbose` asks
    for all that is known."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose

    def data(self, text: str) -> None:
        _print(text, sys.stdout)

    def result(self, value: object, text: Callable[[], str]) -> None:
        """Print a dataclass as JSON, or as what `text` makes of it."""
        self.data(to_json(value) if self.json else without_secrets(text()))

    def say(self, text: str) -> None:
        if not self.quiet:
            _print(text, sys.stderr)

    def wrote(self, path: Path, what: str) -> None:
        """Say what is in its place by now."""
        WRITTEN.append(path)
        self.say(f"{path}: {what}")

    @contextmanager
    def progress(self, label: str, *, unit: str = "B") -> "Iterator[Meter]":
        """A bar on a terminal, a line now and then elsewhere; called with (done, in all), in bytes
        unless another `unit` is named."""
        if self.quiet:
            yield Meter(lambda *_: None)
        elif sys.stderr.isatty():
            bar = _Bar(label, unit)
            try:
                yield Meter(bar)
            finally:
                bar.close()
        else:
            yield Meter(_log_lines(label, unit, self.say))


class Meter:
    """The progress of one step, shown by `show`(done, in all, rate).

    It counts from its first call on: what was there before, and the wait until then, are no part of
    the rate.
    """

    def __init__(self, show: Callable[[int, int, float], None]) -> None:
        self._show = show
        self._first = self._last = (0.0, 0)

    def __call__(self, done: int, total: int) -> None:
        self._last = time.monotonic(), done
        if self._first == (0.0, 0):
            self._first = self._last
        self._show(done, total, self.rate)

    @property
    def seconds(self) -> float:
        return self._last[0] - self._first[0]

    @property
    def done(self) -> int:
        """What was done since the first call."""
        return self._last[1] - self._first[1]

    @property
    def rate(self) -> float:
        """Done a second."""
        return self.done / self.seconds if self.seconds else 0.0


def to_json(value: object) -> str:
    """ASCII alone, which means the same in every encoding and does nothing to a terminal."""

    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} has no JSON form")

    return json.dumps(value, default=plain, indent=2, allow_nan=False)


def speed(rate: float) -> str:
    """Of bytes a second."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.1f} MB/s"


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names: the first is flush left, the others flush right."""
    rows = [[*map(visible, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *rows)
    ]
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, str]], *, width: int = 10) -> str:
    """A line each: its name, and what there is to say, which may hold no line of its own."""
    return "\n".join(visible(f"{name:<{width}} {text}") for name, text in pairs)


def _print(text: str, stream: TextIO) -> None:
    """In one piece, at once."""
    stream.write(f"{text}\n")
    stream.flush()


class _Bar:
    """tqdm's bar, from the first sign of work until it is done: the next step's comes in its place."""

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, _rate: float) -> None:
        if self._bar is None:
            self._bar = self._open(done, total)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _open(self, done: int, total: int) -> "tqdm":
        from tqdm import tqdm

        unit = "B" if self._unit == "B" else f" {self._unit}"
        return tqdm(
            desc=visible(self._label),
            unit=unit,
            unit_scale=self._unit == "B",
            initial=done,
            total=total,
            leave=False,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}]"
            if self._unit == STEPS
            else None,
            file=sys.stderr,
        )


def _log_lines(
    label: str, unit: str, say: Callable[[str], None]
) -> Callable[[int, int, float], None]:
    last = time.monotonic()

    def show(done: int, total: int, rate: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LOG_SECONDS:
            return
        last = now
        if unit != "B":
            say(f"{label}: {done} of {total} {unit}")
            return
        far = f"{label}: {gigabytes(done)} of {gigabytes(total)}"
        left = f", {speed(rate)}, {(total - done) / rate:.0f} s left" if rate else " so far"
        say(far + left)

    return show
