"""The chat templates that lie in a folder, and which of them is in force.

As transformers 5 reads them: a tokenizer takes `chat_template.jinja` with the named ones of
`additional_chat_templates/`, else the entry in `tokenizer_config.json` (one, or a list of named
ones), which is all that older readers know. A processor takes `chat_template.json` before the
`.jinja` files; tokenizers ignore it.
"""

from pathlib import PurePosixPath

from expo.checkpoint.files import Files, load_json, read_whole

FILE = "chat_template.jinja"
ADDITIONAL = "additional_chat_templates/"
PROCESSORS_OWN = "chat_template.json"
DEFAULT = "default"

Templates = dict[str, str]
"""Jinja sources by name; the one that is used unless another is asked for is `DEFAULT`."""


def read_templates(files: Files) -> dict[str, Templates]:
    """Every place in `files` that holds templates, the one that a tokenizer takes first.

    Raises:
        ValueError, TypeError, KeyError: a file that should hold one is damaged.
        CheckpointError: it cannot be read.
    """
    places: dict[str, Templates] = {}
    if own := _jinja_files(files):
        places[FILE if FILE in files.sizes else ADDITIONAL] = own
    for name in ("tokenizer_config.json", PROCESSORS_OWN):
        if name in files.sizes:
            value = _entry(files, name)
            if value is not None:
                places[name] = _by_name(value)
    return places


def templates_in_force(files: Files) -> Templates:
    """The templates that a tokenizer applies, or where it has none the processor's."""
    places = read_templates(files)
    first = next(iter(places), None)
    if first is None or (first == PROCESSORS_OWN and not has_processor(files)):
        return {}
    return places[first]


def template_in_force(files: Files) -> str | None:
    """The template that is applied unless another is asked for."""
    return templates_in_force(files).get(DEFAULT)


def has_processor(files: Files) -> bool:
    return any("/" not in name and name.endswith("processor_config.json") for name in files.sizes)


def _jinja_files(files: Files) -> Templates:
    names = {FILE: DEFAULT} | {
        name: PurePosixPath(name).stem
        for name in files.sizes
        if name.startswith(ADDITIONAL) and name.endswith(".jinja")
    }
    return {names[name]: read_whole(files, name).decode() for name in names if name in files.sizes}


def _entry(files: Files, name: str) -> object:
    value = load_json(files, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no JSON object")
    return value.get("chat_template")


def _by_name(value: object) -> Templates:
    match value:
        case str():
            return {DEFAULT: value}
        case list():
            return {entry["name"]: entry["template"] for entry in value}
        case dict():
            return value
    raise ValueError("a chat_template is text, or a list of named ones")
