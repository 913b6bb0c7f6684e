"""Small pieces of Markdown. What comes from outside cannot break out of them."""

import re
from collections.abc import Iterable, Sequence

from expo.checkpoint.headers import printable
from expo.checkpoint.shown import visible
from expo.output.manifest import SourceEntry

HUB = "https://huggingface.co"


def code(text: str) -> str:
    """A name from outside, as code that cannot break out of its backticks."""
    return f"`{visible(printable(text)).replace('`', '')}`"


def model(name: str, commit: str | None) -> str:
    """A link to a model of the Hub; the name of a folder where it is not of the Hub."""
    return code(name) if commit is None else f"[{name}]({HUB}/{name})"


def revision(name: str, commit: str | None) -> str:
    """A link to what was read of it."""
    if commit is None:
        return "not from the Hub"
    return f"[{code(commit[:12])}]({HUB}/{name}/tree/{commit})"


def source(entry: SourceEntry) -> str:
    base = model(entry.model, entry.commit)
    if entry.adapter is None:
        return base
    return f"{base} + {model(entry.adapter, entry.adapter_commit)}"


def source_revision(entry: SourceEntry) -> str:
    base = revision(entry.model, entry.commit)
    if entry.adapter is None:
        return base
    return f"{base} + {revision(entry.adapter, entry.adapter_commit)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text.replace("\n", " "))


def block(text: str, language: str = "text") -> list[str]:
    """A fenced block whose fence is longer than any in its text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]


def number(value: float | None, form: str = ".4g") -> str:
    return "not defined" if value is None else format(value, form)


def percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.3g} %"
