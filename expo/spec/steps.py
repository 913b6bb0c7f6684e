"""What is done to every Δ and to the result: `transforms` and `edits` of a spec."""

from collections.abc import Iterator, Mapping

from expo.checkpoint.parsing import shown
from expo.checkpoint.yaml_values import Path_
from expo.operators.methods import TRANSFORMS
from expo.operators.rules import RULES
from expo.spec.parameters import in_range
from expo.spec.request import MatrixEdit, Transform, matrix_edit
from expo.spec.schema import MergeSpec
from expo.spec.settings import finite
from expo.spec.strict import Document, nearest

_LOW_RANK, _LASER = "low_rank", "laser"
_AN = {"transforms": "a transform", "edits": "an edit"}


def transforms(spec: MergeSpec, document: Document) -> tuple[Transform, ...]:
    if len(spec.transforms or []) > 1:
        document.fault(("transforms", 1), "one transform at a time")
    return tuple(
        Transform(name, _transform(name, parameters, path, document))
        for name, parameters, path in _named("transforms", [*TRANSFORMS, _LOW_RANK], spec, document)
        if name != _LOW_RANK
    )


def low_rank(spec: MergeSpec, document: Document) -> MatrixEdit | None:
    for name, parameters, path in _named("transforms", None, spec, document):
        if name == _LOW_RANK:
            known = ("keep", "target", "layers", "force")
            return _matrix_edit(parameters, known, path, document)
    return None


def edits(spec: MergeSpec, document: Document) -> tuple[MatrixEdit, ...]:
    found = (
        _matrix_edit(parameters, ("keep", "target", "layers"), path, document)
        for _, parameters, path in _named("edits", [_LASER], spec, document)
    )
    return tuple(edit for edit in found if edit is not None)


def _named(
    key: str, known: list[str] | None, spec: MergeSpec, document: Document
) -> Iterator[tuple[str, Mapping[str, object], Path_]]:
    """(name, parameters, place) of every entry {name: {parameters}} below `key`.

    What has no name, or none of those `known`, is left out, and a fault if they are given.
    """
    for number, entry in enumerate(getattr(spec, key) or []):
        path: Path_ = (key, number)
        name, parameters = next(iter(entry.items()), ("", None))
        if known is None or (len(entry) == 1 and name in known):
            yield name, parameters or {}, (*path, name)
        elif len(entry) != 1:
            example = "{dare: {density: 0.5}}" if key == "transforms" else "{laser: {keep: gd}}"
            document.fault(path, f"needs one name and its parameters, such as {example}")
        else:
            document.fault(path, f"{shown(name)} is not {_AN[key]}{nearest(name, known)}")


def _matrix_edit(
    parameters: Mapping[str, object], known: tuple[str, ...], path: Path_, document: Document
) -> MatrixEdit | None:
    for key in parameters.keys() - set(known):
        fault = f"is not a parameter of {path[-1]}{nearest(key, list(known))}"
        document.fault((*path, key), fault)
    keep, target, layers, force = (
        parameters.get(key) for key in ("keep", "target", "layers", "force")
    )
    if keep is None:
        document.fault(path, f"needs keep: {RULES}")
        return None
    return document.attempt(
        path, lambda: matrix_edit(str(keep), target=target, layers=layers, force=force)
    )


def _transform(
    name: str, parameters: Mapping[str, object], path: Path_, document: Document
) -> dict[str, bool | float]:
    settings: dict[str, bool | float] = {}
    for key, value in parameters.items():
        where = (*path, key)
        if key not in TRANSFORMS[name].each:
            fault = f"is not a parameter of {name}{nearest(key, list(TRANSFORMS[name].each))}"
            document.fault(where, fault)
        elif not isinstance(value, bool | int | float):
            document.fault(where, f"is a number, not {shown(value)}")
        else:
            settings[key] = value
            document.attempt(where, lambda key=key, value=value: in_range(key, finite(value)))
    for key, default in TRANSFORMS[name].each.items():
        if default is None and key not in parameters:
            document.fault(path, f"needs {key}")
    return settings
