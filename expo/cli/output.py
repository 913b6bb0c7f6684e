"""The one place that prints: data to stdout, talk and progress to stderr."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

_LOG_SECONDS = 15.0


class Output:
    """Where a command's words go. `json` turns its data into JSON, `quiet` silences the talk."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def data(self, text: str) -> None:
        click.echo(text)

    def result(self, value: object, text: Callable[[], str]) -> None:
        """Print a dataclass as JSON, or as what `text` makes of it."""
        self.data(to_json(value) if self.json else text())

    def say(self, text: str) -> None:
        if not self.quiet:
            click.echo(text, err=True)

    @contextmanager
    def progress(self, label: str, *, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal, a line now and then elsewhere; called with (done, in all), in bytes
        unless another `unit` is named."""
        if self.quiet:
            yield lambda _done, _total: None
        elif sys.stderr.isatty():
            with _bar(label, unit) as update:
                yield update
        else:
            yield _log_lines(label, unit, self.say)


def to_json(value: object) -> str:
    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} has no JSON form")

    return json.dumps(value, default=plain, indent=2, ensure_ascii=False, allow_nan=False)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names: the first is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *rows)
    ]
    return "\n".join(lines)


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _log_lines(label: str, unit: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LOG_SECONDS:
            return
        last = now
        rate = done / (now - started)
        if unit != "B":
            say(f"{label}: {done} of {total} {unit}")
            return
        left = (total - done) / rate if rate else float("inf")
        say(
            f"{label}: {gigabytes(done)} of {gigabytes(total)}, {rate / 1e9:.2f} GB/s, {left:.0f} s left"
        )

    return update
