"""A request as the spec that says the same with every default filled in."""

import re
from collections.abc import Callable

import yaml

from expo.checkpoint.reference import Reference
from expo.checkpoint.shown import visible
from expo.operators.methods import METHODS
from expo.spec.inputs import KNOWN
from expo.spec.request import MatrixEdit, Operand, Request, Slice
from expo.spec.settings import Conditional, Setting, Settings


def resolved(request: Request, name: Callable[[Reference], str] = str) -> dict:
    """Plain values for YAML or JSON; `name` says how a model is written."""
    if request.foreign is not None:
        return {**request.foreign.spec, **_verify(request), "seed": request.seed}
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
        spec["transforms"] = [{t.name: dict(t.parameters)} for t in request.transforms]
    if request.low_rank is not None:
        spec["transforms"] = [{"low_rank": _matrix_edit(request.low_rank)}]
    if request.edits:
        spec["edits"] = [{"laser": _matrix_edit(edit)} for edit in request.edits]
    if request.method == "expo":
        own = [o.settings for part in request.slices for o in (part, *part.operands)]
        alphas = [settings.get("alpha") for settings in (request.settings, *own)]
        spec["interpolate"] = any(isinstance(a, float) and 0.0 < a < 1.0 for a in alphas)
        spec["exclude"] = list(request.excluded)
        spec["fix_first_layers"] = request.fixed_first_layers
        spec["fix_last_layers"] = request.fixed_last_layers
        spec |= {"force": True} if request.force else {}
    spec |= _verify(request)
    return spec | {"out_dtype": request.dtype, "rounding": request.rounding, "seed": request.seed}


def _verify(request: Request) -> dict:
    if request.vectors is None and request.stop_at == "error":
        return {}
    vectors = {} if request.vectors is None else {"vectors": request.vectors.stem}
    return {"verify": vectors | {"stop_at": request.stop_at}}


def _matrix_edit(edit: MatrixEdit) -> dict:
    given: dict[str, object] = {"keep": str(edit.keep)}
    if edit.target is not None:
        given["target"] = edit.target
    if edit.layers is not None:
        given["layers"] = list(edit.layers)
    return given | ({"force": True} if edit.force else {})


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


def mergekit_spec(
    request: Request, out_dtype: str, name: Callable[[Reference], str] = str
) -> dict | None:
    """The mergekit spec that computes the same, None where mergekit has none.

    Its arithmetic is set to float32, as ours is; it takes config and tokenizer from the base.
    """
    if request.edits or request.low_rank or request.method == "relex":
        return None
    plain = not (request.transforms or request.onto or request.excluded)
    if request.method != "expo":
        spec = {k: v for k, v in resolved(request, name).items() if k not in _OURS}
    elif plain and not (request.fixed_first_layers or request.fixed_last_layers):
        spec = {k: v for k, v in resolved(request, name).items() if k not in _OURS}
        spec["merge_method"] = "task_arithmetic"
        sources = spec.get("models") or [s for part in spec["slices"] for s in part["sources"]]
        for source in sources:
            if "alpha" in source.get("parameters", {}):
                source["parameters"] = {"weight": source["parameters"]["alpha"]}
        if "alpha" in (shared := spec.get("parameters", {})):
            spec["parameters"] = {"weight": shared["alpha"]}
    else:
        return None
    if request.base is not None and KNOWN[request.method].base != "operand":
        _add_base(spec)
    return spec | {"dtype": "float32", "out_dtype": out_dtype}


def _add_base(spec: dict) -> None:
    """mergekit wants the base among the sources of every slice."""
    for part in spec.get("slices", []):
        layers = part["sources"][0]["layer_range"]
        part["sources"].append({"model": spec["base_model"], "layer_range": layers})


_OURS = (
    "rounding",
    "interpolate",
    "seed",
    "exclude",
    "fix_first_layers",
    "fix_last_layers",
    "force",
    "verify",
    "donor",
)


def to_yaml(spec: dict) -> str:
    """A spec as a person writes it: short lists and parameters on one line."""

    def dump(allow_unicode: bool) -> str:
        return yaml.dump(
            spec, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=100
        )

    text = dump(True)
    shows = all(visible(line) == line for line in text.split("\n"))
    return text if shows else dump(False)  # with YAML's own escapes it says the same


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what YAML 1.2 would read as a number."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if re.fullmatch(r"[-+.0-9eE]+", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)
