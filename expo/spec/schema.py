"""The merge spec: mergekit's vocabulary, strict. Every error at once, as file:line:col: path."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expo.checkpoint.reference import parse_reference
from expo.errors import SpecError
from expo.spec.request import Request, Rounding, resolve_alpha
from expo.spec.source import Path_, Position, load_yaml, read_text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Parameters(_Strict):
    """α in one of the two conventions; neither has a default."""

    alpha: float | None = Field(None, allow_inf_nan=False)
    paper_alpha: float | None = Field(None, allow_inf_nan=False)


class AlignedModel(_Strict):
    """The model trained from `base_model`."""

    model: str
    parameters: Parameters


class MergeSpec(_Strict):
    """θ = θ_base + α·(θ_model − θ_base), rounded once to `out_dtype`."""

    merge_method: Literal["expo"]
    base_model: str
    models: list[AlignedModel] = Field(min_length=1, max_length=1)
    out_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    interpolate: bool = False


_MESSAGES = {
    "missing": "is required",
    "extra_forbidden": "is not a key of the spec",
    "too_long": "takes one aligned model",
    "too_short": "needs the aligned model",
}


def read_spec(source: Path | str | Mapping[str, object]) -> Request:
    """A request from a YAML file, or from a mapping of the same form.

    Raises:
        SpecError: with one line for every fault.
    """
    if isinstance(source, Mapping):
        return _request(dict(source), {}, "spec")
    value, positions = load_yaml(read_text(Path(source)), str(source))
    return _request(value, positions, str(source))


def _request(value: object, positions: dict[Path_, Position], name: str) -> Request:
    try:
        spec = MergeSpec.model_validate(value)
    except ValidationError as error:
        lines = [
            _line(name, positions, tuple(fault["loc"]), _describe(dict(fault)))
            for fault in error.errors()
        ]
        raise SpecError("\n".join(lines)) from None
    aligned = spec.models[0]
    faults: list[str] = []

    def attempt(path: Path_, make):
        try:
            return make()
        except SpecError as error:
            faults.append(_line(name, positions, path, str(error)))

    parameters: Path_ = ("models", 0, "parameters")
    given = "alpha" if aligned.parameters.alpha is not None else "paper_alpha"
    alpha = attempt(
        (*parameters, given),
        lambda: resolve_alpha(
            aligned.parameters.alpha, aligned.parameters.paper_alpha, interpolate=spec.interpolate
        ),
    )
    if alpha is None and not faults:
        faults.append(_line(name, positions, parameters, "needs alpha or paper_alpha"))
    base = attempt(("base_model",), lambda: parse_reference(spec.base_model, role="base_model"))
    top = attempt(("models", 0, "model"), lambda: parse_reference(aligned.model, role="model"))
    if faults or base is None or top is None:
        raise SpecError("\n".join(faults))
    return Request(base, top, alpha, spec.out_dtype, spec.rounding, spec.seed)


def _line(name: str, positions: dict[Path_, Position], path: Path_, what: str) -> str:
    known = path
    while known and known not in positions:
        known = known[:-1]
    line_column = positions.get(known)
    where = f"{name}:{line_column[0]}:{line_column[1]}" if line_column else name
    shown = ".".join(map(str, path))
    return f"{where}: {shown}: {what}" if shown else f"{where}: {what}"


def _describe(fault: dict) -> str:
    kind, path, value = fault["type"], fault["loc"], fault["input"]
    match kind:
        case "extra_forbidden":
            return _MESSAGES[kind] + _nearest(str(path[-1]), _keys_at(path[:-1]))
        case "literal_error":
            expected = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
            return f"{value!r} is not one of {', '.join(expected)}" + _nearest(str(value), expected)
        case _ if kind in _MESSAGES:
            return _MESSAGES[kind]
        case _:
            return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, not {value!r}"


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def _keys_at(path: Path_) -> list[str]:
    """The keys that the spec knows at a path."""
    match path:
        case ("models", int()):
            model: type[BaseModel] = AlignedModel
        case ("models", int(), "parameters"):
            model = Parameters
        case _:
            model = MergeSpec
    return list(model.model_fields)
