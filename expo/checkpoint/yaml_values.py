"""YAML with positions, within limits: every value knows its line, no key has two values, `1e-4` is a number."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from expo.checkpoint.contents import mistaken
from expo.checkpoint.headers import printable
from expo.checkpoint.parsing import shown
from expo.errors import SpecError

Path_ = tuple[str | int, ...]
Position = tuple[int, int]


_MOST_BYTES = 2_000_000
_MOST_NODES, _MOST_LEVELS = 50_000, 100
"""Of a document as it is written, and again with every alias in its place: aliases of aliases can stand for more
than a memory holds, and an alias can hold itself."""
_SCALARS = ("str", "int", "float", "bool", "null")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: only true/false are booleans, no dates, no octal 0777."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class attribute
    _nodes = _levels = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """PyYAML's, which a deep document would take beyond Python's stack."""
        self._nodes, self._levels = self._nodes + 1, self._levels + 1
        if self._nodes > _MOST_NODES or self._levels > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(
                problem=_too_much(), problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)  # pyright: ignore[reportArgumentType]
        self._levels -= 1
        return node


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


@dataclass(frozen=True)
class Yaml:
    """One document: its value, where each key and list item stands, the keys that are given twice with
    one value."""

    value: object
    positions: dict[Path_, Position]
    repeated: tuple[Path_, ...] = ()


def load_yaml(text: str, name: str) -> list[Yaml]:
    """Every document that holds something. Anchors, aliases and merge keys (`<<`) are followed.

    Raises:
        SpecError: not YAML, empty, a key with two values, a custom tag, or a value that holds itself.
    """
    if len(text) > _MOST_BYTES:
        raise SpecError(f"{name} has {len(text)} characters, at most {_MOST_BYTES} are read")
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=_Loader) if node is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise SpecError(f"{at}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        at = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        what = f"a character that YAML does not allow (U+{ord(text[error.position]):04X})"
        raise SpecError(f"{at}: not valid YAML: {what}") from error
    if not nodes:
        raise SpecError(f"{name}:1:1: the spec is empty")
    return [_Builder(name).document(node) for node in nodes]


def _too_much() -> str:
    return (
        f"more than {_MOST_NODES} values, or more than {_MOST_LEVELS} within each other: an alias that holds "
        "itself, or too many of them"
    )


class _Builder:
    """Makes plain values of one document's nodes and remembers their places."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._positions: dict[Path_, Position] = {}
        self._repeated: list[Path_] = []
        self._nodes = 0
        self._scalars = _Loader("")

    def document(self, node: yaml.Node) -> Yaml:
        value = self._value(node, ())
        return Yaml(value, self._positions, tuple(self._repeated))

    def _value(self, node: yaml.Node, path: Path_) -> object:
        self._nodes += 1
        if self._nodes > _MOST_NODES or len(path) > _MOST_LEVELS:
            raise self._error(node, _too_much())
        self._positions.setdefault(path, _position(node))
        match node:
            case yaml.MappingNode():
                return self._mapping(node, path)
            case yaml.SequenceNode():
                return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
            case _:
                return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, object]:
        """Keys of the mapping itself win over those that `<<` merges into it."""
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.value == "<<" and not key_node.style:
                merged = self._merged(value_node, path) | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key is text, not a list or a mapping")
            where = (*path, str(key_node.value))
            self._positions[where] = _position(key_node)
            value = self._value(value_node, where)
            if where[-1] in own:
                self._again(key_node, where, own[where[-1]] == value)
            own[where[-1]] = value
        return merged | own

    def _merged(self, node: yaml.Node, path: Path_) -> dict[str, object]:
        """What `<<` names: a mapping, or several, of which the first one wins."""
        found: dict[str, object] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise self._error(source, "<< takes mappings")
            value = self._value(source, path)
            found = value | found if isinstance(value, dict) else found
        return found

    def _again(self, key: yaml.Node, path: Path_, same: bool) -> None:
        if not same:
            where = printable(".".join(map(str, path)))
            raise self._error(key, f"{where}: the key is given twice, with two values")
        self._repeated.append(path)

    def _scalar(self, node: yaml.Node) -> object:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        try:
            if kind in _SCALARS:
                value = self._scalars.construct_object(node)
                str(value).encode()  # half a character is none
                return value
        except (yaml.YAMLError, ValueError, LookupError):
            pass
        raise self._error(node, f"{shown(node.value)} cannot be read as {printable(kind)}")

    def _error(self, node: yaml.Node, what: str) -> SpecError:
        line, column = _position(node)
        return SpecError(f"{self._name}:{line}:{column}: {what}")


def _position(node: yaml.Node) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def read_text(path: Path) -> str:
    """The text of a spec file.

    Raises:
        SpecError: it cannot be read, or is not UTF-8, or begins as no spec does.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    if fault := mistaken(text.encode()):
        raise SpecError(f"{path} {fault}")
    return text
