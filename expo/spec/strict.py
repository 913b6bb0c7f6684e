"""A YAML document against a pydantic schema: every fault at once, as file:line:col: path: what."""

import difflib
import re
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from expo.checkpoint.headers import printable
from expo.checkpoint.parsing import shown
from expo.checkpoint.yaml_values import Path_, Position, load_yaml, read_text
from expo.errors import SpecError

_WORDS = {
    "missing": "is required",
    "string_type": "should be text",
    "list_type": "should be a list",
    "dict_type": "should be keys with values",
    "model_type": "should be keys with values",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "too_short": "has too few entries",
    "too_long": "has too many entries",
    "greater_than_equal": "is too small",
    "less_than_equal": "is too large",
    "finite_number": "should be a finite number",
}
"""A validator's kinds of faults, in the words of a person."""


class Strict(BaseModel):
    """A schema that takes what it names, in the types it names, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Schema = TypeVar("Schema", bound=Strict)
T = TypeVar("T")
_LONGEST_KEY = 100  # characters of it that messages show
_MOST_FAULTS = 50


class Document:
    """A YAML value with the place of each of its parts, which collects faults, doubts and remarks.

    A doubt (an unknown key, a repeated one) is a fault where the reader is strict.
    """

    def __init__(
        self,
        value: object,
        name: str,
        positions: dict[Path_, Position] | None = None,
        repeated: tuple[Path_, ...] = (),
    ) -> None:
        self.value = value
        self._name = name
        self._positions = positions or {}
        self._faults: list[tuple[Position, str]] = []
        self._doubts: list[tuple[Position, str, str]] = []
        self._remarks: list[str] = []
        for path in repeated:
            self.doubt(path, "the key is given twice")

    @classmethod
    def read(cls, path: Path) -> "Document":
        """The one document of a file.

        Raises:
            SpecError: the file cannot be read, is not YAML, or holds several documents.
        """
        first, *more = cls.read_all(path)
        if more:
            raise more[0].error((), "a second document: only merge and plan take several")
        return first

    @classmethod
    def read_all(cls, path: Path) -> "list[Document]":
        """Raises SpecError: the file cannot be read or is not YAML."""
        documents = load_yaml(read_text(path), str(path))
        return [cls(d.value, str(path), d.positions, d.repeated) for d in documents]

    def error(self, path: Path_, what: str) -> SpecError:
        return SpecError(self.at(path, what))

    def validate(self, schema: type[Schema]) -> Schema:
        """The value as a `schema`. Unknown keys are doubted and left out, so that `check` can name them
        together with what is found later.

        Raises:
            SpecError: with one line for every fault, where there is more than unknown keys.
        """
        try:
            return schema.model_validate(self.value)
        except ValidationError as error:
            unknown = self._noted(error, schema)
        try:
            return schema.model_validate(_without(self.value, unknown))
        except ValidationError as error:  # what an unknown key stood for is missing now
            self._noted(error, schema)
            raise SpecError(*(what for _, what in self._faults)) from error

    def _noted(self, error: ValidationError, schema: type[BaseModel]) -> list[Path_]:
        """The unknown keys of what a validator found, which is noted.

        Raises:
            SpecError: there is more than unknown keys, or there are very many of them.
        """
        faults = error.errors()
        for fault in faults[:_MOST_FAULTS]:
            path = tuple(fault["loc"])
            if fault["type"] == "extra_forbidden":
                self.unknown_key(path, _keys_at(schema, path[:-1]))
            else:
                self.fault(path, _describe(dict(fault)))
        is_doubtful = all(fault["type"] == "extra_forbidden" for fault in faults)
        if not is_doubtful or len(faults) > _MOST_FAULTS:
            self.check()
        return [tuple(fault["loc"]) for fault in faults]

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
        self._faults.append((self._position(path), self.at(path, what)))

    def doubt(self, path: Path_, what: str, *, so: str = "") -> None:
        """Note what is wrong at `path` only for a strict reader; `so` is what another makes of it."""
        so = f": {so}" if so else ""
        self._doubts.append((self._position(path), self.at(path, what), so))

    def unknown_key(self, path: Path_, known: list[str]) -> None:
        """Doubt a key, with the nearest one that is known, or where it belongs."""
        key = str(path[-1])
        so = _WITHOUT.get(key, "ignored")
        self.doubt(path, "is not a known key" + (_PLACES.get(key) or nearest(key, known)), so=so)

    def remark(self, path: Path_, what: str) -> None:
        """Note what the user should know of `path`."""
        self._remarks.append(self.at(path, what))

    def remarks(self) -> tuple[str, ...]:
        """What was remarked, and every doubt with what comes of it."""
        return (*(f"{what}{so}" for _, what, so in sorted(self._doubts)), *self._remarks)

    def at(self, path: Path_, what: str) -> str:
        """`what`, with the place of `path` before it."""
        line, column = self._position(path)
        where = f"{self._name}:{line}:{column}" if line else self._name
        part = ".".join(printable(str(key), _LONGEST_KEY) for key in path)
        return f"{where}: {part}: {what}" if part else f"{where}: {what}"

    def _position(self, path: Path_) -> Position:
        """That of the path, or of what it lies in; (0, 0) where nothing has one."""
        while path and path not in self._positions:
            path = path[:-1]
        return self._positions.get(path, (0, 0))

    def check(self, *, strict: bool = True) -> None:
        """Raises SpecError with every fault and doubt noted so far, if there is a fault, or a doubt and
        the reader is strict."""
        if self._faults or (strict and self._doubts):
            found = [*self._faults, *((place, what) for place, what, _ in self._doubts)]
            raise SpecError(*(what for _, what in sorted(found, key=itemgetter(0))))


_PLACES = {
    "int8_mask": " (it goes under parameters:, and has no effect)",
    "lora": " (model: NAME+ADAPTER adds an adapter)",
    "pattern": " (did you mean filter?)",
    "out_path": " (OUT stands on the command line)",
    "output_dir": " (OUT stands on the command line)",
    "pad_to_multiple_of": " (it goes under tokenizer:)",
    "random_seed": " (did you mean seed?)",
    "revision": " (model: NAME@REVISION names one)",
}
"""What people write, and where it belongs."""
_WITHOUT = {
    "lora": "ignored, nothing is added to the model",
    "pattern": "ignored, the value holds for every tensor",
}


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean …?)`, or nothing."""
    if len(word) > _LONGEST_KEY:
        return ""
    others = [name for name in known if name != word]
    found = difflib.get_close_matches(word.lower(), others, n=1, cutoff=0.55)
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


def _describe(fault: dict) -> str:
    kind, value = fault["type"], fault["input"]
    match kind:
        case "literal_error":
            expected = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
            return f"{shown(value)} is not one of {', '.join(expected)}" + nearest(
                str(value), expected
            )
        case "value_error":
            return str(fault["ctx"]["error"])
        case "missing":
            return _WORDS[kind]
        case _:
            return f"{_WORDS.get(kind, 'is not valid')}, not {shown(value)}"


def _keys_at(schema: type[BaseModel], path: Path_) -> list[str]:
    """The keys that the schema knows at a path."""
    models: list[type[BaseModel]] = [schema]
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]  # type: ignore[index]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
    return [f.alias or key for model in models for key, f in model.model_fields.items()]


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
