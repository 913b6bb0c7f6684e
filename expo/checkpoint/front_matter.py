"""What a model's own card says of it: the YAML block at the top of its README.md."""

import re
from dataclasses import dataclass

from expo.checkpoint.files import Files
from expo.checkpoint.parsing import MOST_BYTES
from expo.checkpoint.sidecars import CARD
from expo.errors import SpecError

_BLOCK = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.S)


@dataclass(frozen=True)
class FrontMatter:
    """The keys that a model made from this one inherits. What a card does not say is None or empty."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    pipeline_tag: str | None = None


def read_front_matter(files: Files) -> FrontMatter | None:
    """Of the README.md among `files`; None where there is none, or it says nothing that can be read.

    Raises:
        CheckpointError, HubError: the file cannot be read.
    """
    if files.sizes.get(CARD, MOST_BYTES) >= MOST_BYTES:
        return None
    said = front_matter(files.read(CARD).decode(errors="replace"))
    if said is None:
        return None
    return FrontMatter(
        license=_text(said.get("license")),
        license_name=_text(said.get("license_name")),
        license_link=_text(said.get("license_link")),
        language=_texts(said.get("language")),
        datasets=_texts(said.get("datasets")),
        pipeline_tag=_text(said.get("pipeline_tag")),
    )


def front_matter(text: str) -> dict | None:
    """The mapping at the top of a card; None where there is none."""
    from expo.checkpoint.yaml_values import load_yaml

    found = _BLOCK.match(text)
    if found is None:
        return None
    try:
        said, *more = load_yaml(found[1], CARD)
    except SpecError:
        return None
    return said.value if isinstance(said.value, dict) and not more else None


def _text(value: object) -> str | None:
    """The first of a list: the Hub takes `license: [mit]` too."""
    return next(iter(_texts(value)), None)


def _texts(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str) and item)
