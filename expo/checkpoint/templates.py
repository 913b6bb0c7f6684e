"""The chat templates that lie in a folder, and which of them is in force.

transformers ≥ 4.44 takes `chat_template.jinja` (with `additional_chat_templates/`) before the entry
in `tokenizer_config.json`, which is all that older readers know. Tokenizers ignore
`chat_template.json`; processors read it.
"""

import json
from pathlib import PurePosixPath

from expo.checkpoint.files import Files

FILE = "chat_template.jinja"
DEFAULT = "default"

Templates = dict[str, str]
"""Jinja sources by name; the one that is used unless another is asked for is `DEFAULT`."""


def read_templates(files: Files) -> dict[str, Templates]:
    """Every place in `files` that holds templates, the one in force first.

    Raises:
        ValueError, TypeError, KeyError: a file that should hold one is damaged.
        CheckpointError: it cannot be read.
    """
    places: dict[str, Templates] = {}
    if FILE in files.sizes:
        places[FILE] = {DEFAULT: files.read(FILE).decode()} | _additional(files)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name in files.sizes:
            value = json.loads(files.read(name)).get("chat_template")
            if value is not None:
                places[name] = _by_name(value)
    return places


def template_in_force(files: Files) -> str | None:
    """The template that a tokenizer applies by default."""
    places = read_templates(files)
    places.pop("chat_template.json", None)
    return next(iter(places.values()), {}).get(DEFAULT)


def _additional(files: Files) -> Templates:
    return {
        PurePosixPath(name).stem: files.read(name).decode()
        for name in files.sizes
        if name.startswith("additional_chat_templates/") and name.endswith(".jinja")
    }


def _by_name(value: str | list | dict) -> Templates:
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return dict(value)
