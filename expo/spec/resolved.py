"""A request as the spec that says the same with every default filled in."""

from collections.abc import Callable

from expo.checkpoint.reference import Reference
from expo.spec.methods import METHODS
from expo.spec.request import Operand, Request, Slice
from expo.spec.settings import Conditional, Setting, Settings


def resolved(request: Request, name: Callable[[Reference], str] = str) -> dict:
    """Plain values for YAML or JSON; `name` says how a model is written."""
    spec: dict[str, object] = {"merge_method": request.method}
    if request.base is not None:
        spec["base_model"] = name(request.base)
    if len(request.slices) == 1 and request.slices[0].layers is None:
        spec["models"] = [_operand(operand, request, name) for operand in request.operands]
    else:
        spec["slices"] = [_slice(slice_, request, name) for slice_ in request.slices]
    shared = METHODS[request.method].shared if request.method in METHODS else {}
    defaults = {key: value for key, value in shared.items() if value is not None}
    if parameters := defaults | _plain_settings(request.settings):
        spec["parameters"] = parameters
    for key, reference in (("onto", request.onto), ("donor", request.donor)):
        if reference is not None:
            spec[key] = name(reference)
    if request.transforms:
        spec["transforms"] = [{t.name: _plain_settings(t.parameters)} for t in request.transforms]
    if request.method == "expo":
        spec["exclude"] = list(request.excluded)
        spec["fix_first_layers"] = request.fixed_first_layers
        spec["fix_last_layers"] = request.fixed_last_layers
    return spec | {"out_dtype": request.dtype, "rounding": request.rounding, "seed": request.seed}


def _operand(operand: Operand, request: Request, name: Callable[[Reference], str]) -> dict:
    each = METHODS[request.method].each if request.method in METHODS else {}
    defaults = {
        key: value
        for key, value in each.items()
        if value is not None and key not in request.settings and operand.reference != request.base
    }
    parameters = defaults | _plain_settings(operand.settings)
    return {"model": name(operand.reference)} | ({"parameters": parameters} if parameters else {})


def _slice(slice_: Slice, request: Request, name: Callable[[Reference], str]) -> dict:
    layers = {} if slice_.layers is None else {"layer_range": list(slice_.layers)}
    sources = []
    for operand in slice_.operands:
        entry = _operand(operand, request, name)
        sources.append({"model": entry.pop("model")} | layers | entry)
    parameters = _plain_settings(slice_.settings)
    return {"sources": sources} | ({"parameters": parameters} if parameters else {})


def _plain_settings(settings: Settings) -> dict:
    return {key: _plain(value) for key, value in settings.items()}


def _plain(setting: Setting) -> object:
    if not isinstance(setting, tuple):
        return setting
    return [
        ({"filter": item.filter} if item.filter is not None else {}) | {"value": _plain(item.value)}
        if isinstance(item, Conditional)
        else item
        for item in setting
    ]
