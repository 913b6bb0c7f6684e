"""A YAML document against a pydantic schema: every fault at once, as file:line:col: path: what."""

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from expo.errors import SpecError
from expo.spec.source import Path_, Position, load_yaml, read_text

_MESSAGES = {"missing": "is required", "extra_forbidden": "is not a known key"}


class Strict(BaseModel):
    """A schema that takes what it names, in the types it names, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Schema = TypeVar("Schema", bound=Strict)
T = TypeVar("T")


class Document:
    """A YAML value with the place of each of its parts, which collects faults."""

    def __init__(
        self, value: object, name: str, positions: dict[Path_, Position] | None = None
    ) -> None:
        self.value = value
        self._name = name
        self._positions = positions or {}
        self._faults: list[str] = []

    @classmethod
    def read(cls, path: Path) -> "Document":
        """The one document of a file.

        Raises:
            SpecError: the file cannot be read, is not YAML, or holds several documents.
        """
        first, *more = cls.read_all(path)
        if more:
            raise more[0].error((), "a second document: only merge takes several")
        return first

    @classmethod
    def read_all(cls, path: Path) -> "list[Document]":
        """Raises SpecError: the file cannot be read or is not YAML."""
        documents = load_yaml(read_text(path), str(path))
        return [cls(value, str(path), positions) for value, positions in documents]

    def error(self, path: Path_, what: str) -> SpecError:
        return SpecError(self.at(path, what))

    def validate(self, schema: type[Schema]) -> Schema:
        """The value as a `schema`. Unknown keys are noted and left out, so that `check` can name them
        together with what is found later.

        Raises:
            SpecError: with one line for every fault, where there is more than unknown keys.
        """
        try:
            return schema.model_validate(self.value)
        except ValidationError as error:
            faults = error.errors()
            for fault in faults:
                self.fault(tuple(fault["loc"]), _describe(dict(fault), schema))
            if any(fault["type"] != "extra_forbidden" for fault in faults):
                self.check()
            return schema.model_validate(_without(self.value, [f["loc"] for f in faults]))

    def attempt(self, path: Path_, make: Callable[[], T]) -> T | None:
        """What `make` returns, or None and its SpecError as a fault at `path`."""
        try:
            return make()
        except SpecError as error:
            self.fault(path, str(error))
            return None

    @property
    def is_sound(self) -> bool:
        """Whether no fault has been noted yet."""
        return not self._faults

    def fault(self, path: Path_, what: str) -> None:
        """Note what is wrong at `path`."""
        self._faults.append(self.at(path, what))

    def at(self, path: Path_, what: str) -> str:
        """`what`, with the place of `path` before it."""
        known = path
        while known and known not in self._positions:
            known = known[:-1]
        position = self._positions.get(known)
        where = f"{self._name}:{position[0]}:{position[1]}" if position else self._name
        shown = ".".join(map(str, path))
        return f"{where}: {shown}: {what}" if shown else f"{where}: {what}"

    def check(self) -> None:
        """Raises SpecError with every fault noted so far, if there is one."""
        if self._faults:
            raise SpecError("\n".join(self._faults))


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean …?)`, or nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def _without(value: object, paths: list[Path_]) -> object:
    """A value without what lies at the paths."""
    here = {path[0] for path in paths if len(path) == 1}
    if isinstance(value, dict):
        below = {k: [p[1:] for p in paths if p[0] == k and len(p) > 1] for k in value}
        return {k: _without(v, below[k]) for k, v in value.items() if k not in here}
    if isinstance(value, list):
        return [_without(v, [p[1:] for p in paths if p[0] == n]) for n, v in enumerate(value)]
    return value


def _describe(fault: dict, schema: type[BaseModel]) -> str:
    kind, path, value = fault["type"], fault["loc"], fault["input"]
    match kind:
        case "extra_forbidden":
            return _MESSAGES[kind] + nearest(str(path[-1]), _keys_at(schema, path[:-1]))
        case "literal_error":
            expected = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
            return f"{value!r} is not one of {', '.join(expected)}" + nearest(str(value), expected)
        case "value_error":
            return str(fault["ctx"]["error"])
        case _ if kind in _MESSAGES:
            return _MESSAGES[kind]
        case _:
            return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, not {value!r}"


def _keys_at(schema: type[BaseModel], path: Path_) -> list[str]:
    """The keys that the schema knows at a path."""
    models: list[type[BaseModel]] = [schema]
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]  # type: ignore[index]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
    return [key for model in models for key in model.model_fields]


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
