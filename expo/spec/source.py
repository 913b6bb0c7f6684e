"""YAML with positions: every value knows its line, duplicate keys are errors, `1e-4` is a number."""

import re
from pathlib import Path

import yaml

from expo.errors import SpecError

Path_ = tuple[str | int, ...]
Position = tuple[int, int]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: only true/false are booleans, no dates, no octal 0777."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class attribute


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _characters = [c if c != "\0" else "" for c in _first]
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _characters
    )


def load_yaml(text: str, name: str) -> list[tuple[object, dict[Path_, Position]]]:
    """Every document's value, and (line, column) of every key and list item by its path.

    Raises:
        SpecError: not YAML, empty, a duplicate key, an alias or a custom tag.
    """
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=_Loader) if node is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise SpecError(f"{at}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{name}: not valid YAML: {error}") from error
    if not nodes:
        raise SpecError(f"{name}:1:1: the spec is empty")
    documents = []
    for node in nodes:
        positions: dict[Path_, Position] = {}
        documents.append((_value(node, (), positions, name), positions))
    return documents


def _value(node: yaml.Node, path: Path_, positions: dict[Path_, Position], name: str) -> object:
    at = (node.start_mark.line + 1, node.start_mark.column + 1)
    positions.setdefault(path, at)
    match node:
        case yaml.MappingNode():
            result: dict[str, object] = {}
            for key_node, value_node in node.value:
                where = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
                key = str(key_node.value)
                if key in result:
                    line, column = where
                    shown = ".".join(map(str, (*path, key)))
                    raise SpecError(f"{name}:{line}:{column}: {shown}: the key is given twice")
                positions[(*path, key)] = where
                result[key] = _value(value_node, (*path, key), positions, name)
            return result
        case yaml.SequenceNode():
            return [
                _value(item, (*path, index), positions, name)
                for index, item in enumerate(node.value)
            ]
        case _:
            return _scalar(node, name)


def _scalar(node: yaml.Node, name: str) -> object:
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        raise SpecError(f"{name}:{line}:{column}: {node.value!r} cannot be read") from error


def read_text(path: Path) -> str:
    """The text of a spec file.

    Raises:
        SpecError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 text") from error
