"""What mergekit asks of a method's models: how many, which base, which parameters."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from expo.checkpoint.yaml_values import Path_
from expo.operators.methods import METHODS, Base, Default
from expo.spec.schema import MergeSpec, Model, Parameters, SliceOf, Source
from expo.spec.strict import Document


@dataclass(frozen=True)
class Takes:
    """What a method takes: its base, parameters of each model and of the merge, how many models."""

    base: Base
    each: Mapping[str, Default]
    shared: Mapping[str, Default]
    models: tuple[int, int | None] = (1, None)

    @property
    def adds_to_base(self) -> bool:
        """Whether it adds up task vectors, of which there may be none."""
        return "lambda" in self.shared


_FOREIGN = {
    "multislerp": Takes("optional", {"weight": None}, {"normalize_weights": True, "eps": 1e-8}),
    "karcher": Takes("operand", {}, {"max_iter": 10, "tol": 1e-5}),
    "model_stock": Takes("required", {}, {"filter_wise": False}, (2, None)),
    "nearswap": Takes("required", {}, {"t": None}, (1, 1)),
    "arcee_fusion": Takes("required", {}, {}, (1, 1)),
    "sce": Takes("required", {}, {"select_topk": 1.0}, (0, None)),
    "ram": Takes("required", {}, {"epsilon": 1e-5}, (0, None)),
    "ramplus_tl": Takes("required", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, (0, None)),
}
KNOWN = {
    name: Takes(method.base, method.each, method.shared, method.models)
    for name, method in METHODS.items()
} | _FOREIGN
"""Every method: those that stream, and those that run through the mergekit library."""


@dataclass(frozen=True)
class _Group:
    """Models that are merged with each other: all, or those of a slice.

    `scopes` are the parameters above the models' own. `given` says whether the spec had to name the
    base itself: among `models` mergekit adds it.
    """

    path: Path_
    models: Sequence[Model | Source]
    base: str | None
    scopes: tuple[Parameters, ...]
    is_slice: bool


def check_inputs(spec: MergeSpec, document: Document) -> None:
    """Note what mergekit would refuse before it reads a tensor."""
    method = KNOWN[spec.merge_method]
    groups = list(_groups(spec))
    if not groups:
        document.fault(("models",), f"{spec.merge_method} needs at least 1 model")
    for group in groups:
        _check_twice(group, document)
        _check_ranges(group, document)
        _check_base(group, spec.merge_method, method, document)
        if document.is_sound:
            _check_count(group, spec.merge_method, method, document)
            _check_parameters(group, spec.merge_method, method, document)


def scopes(spec: MergeSpec) -> Iterator[tuple[Path_, Parameters | None]]:
    """Every place that holds parameters."""
    yield ("parameters",), spec.parameters
    for name, module in (spec.modules or {}).items():
        yield ("modules", name, "parameters"), module.parameters
    for group in _groups(spec):
        if group.is_slice:
            yield (*group.path[:-1], "parameters"), group.scopes[0]
        for number, model in enumerate(group.models):
            yield (*group.path, number, "parameters"), model.parameters


def _groups(spec: MergeSpec) -> Iterator[_Group]:
    above = (spec.parameters or {},)
    yield from _parts((), spec.models, spec.slices, spec.base_model, above)
    for name, module in (spec.modules or {}).items():
        within = (module.parameters or {}, *above)
        path: Path_ = ("modules", name)
        yield from _parts(path, module.models, module.slices, spec.base_model, within)


def _parts(
    path: Path_,
    models: Sequence[Model] | None,
    slices: Sequence[SliceOf] | None,
    base: str | None,
    above: tuple[Parameters, ...],
) -> Iterator[_Group]:
    if models:
        yield _Group((*path, "models"), models, base, above, is_slice=False)
    for number, part in enumerate(slices or []):
        where: Path_ = (*path, "slices", number, "sources")
        own = (part.parameters or {}, *above)
        yield _Group(where, part.sources, part.base_model or base, own, is_slice=True)


def _check_twice(group: _Group, document: Document) -> None:
    seen = set()
    for number, model in enumerate(group.models):
        if model.model in seen:
            fault = f"{model.model} is listed twice: leave one out, and add up what they weigh"
            document.fault((*group.path, number, "model"), fault)
        seen.add(model.model)


def _check_ranges(group: _Group, document: Document) -> None:
    """Slices take as many layers of each model."""
    ranges = [m.layer_range for m in group.models if isinstance(m, Source)]
    for number, (first, end) in enumerate(ranges):
        where = (*group.path, number, "layer_range")
        if not 0 <= first < end:
            document.fault(where, f"is [first, after the last], not [{first}, {end}]")
        elif end - first != ranges[0][1] - ranges[0][0]:
            document.fault(
                where, f"takes {end - first} layers, {ranges[0]} takes others: as many of each"
            )


def _check_base(group: _Group, name: str, method: Takes, document: Document) -> None:
    if method.base == "required" and group.base is None:
        document.fault(("base_model",), f"is required by {name}")
    listed = group.base in [model.model for model in group.models]
    if group.is_slice and group.base is not None and method.base != "operand" and not listed:
        cure = "name one of them as base_model, or add it with its layers"
        fault = f"the base_model {group.base} is not among them: {cure}"
        document.fault(group.path, fault)


def _check_count(group: _Group, name: str, method: Takes, document: Document) -> None:
    least, most = (0, None) if method.adds_to_base else method.models
    others = [m.model for m in group.models if method.base == "operand" or m.model != group.base]
    added = method.base == "operand" and not group.is_slice
    if added and group.base is not None and group.base not in others:
        others.append(group.base)
    if least <= len(others) and (most is None or len(others) <= most):
        return
    wanted = f"{least}" if least == most else f"at least {least}"
    beside = " beside the base" if method.base == "required" else ""
    plural = "s" if least != 1 else ""
    document.fault(group.path, f"{name} takes {wanted} model{plural}{beside}, not {len(others)}")


def _check_parameters(group: _Group, name: str, method: Takes, document: Document) -> None:
    for key in _missing(method.shared, group.scopes):
        document.fault(("parameters",), f"needs {key}: {name} has no default for it")
    for number, model in enumerate(group.models):
        if method.base != "operand" and model.model == group.base:
            continue
        for key in _missing(method.each, (model.parameters or {}, *group.scopes)):
            document.fault((*group.path, number), f"needs {key}: {name} has no default for it")
    unlisted = group.base is not None and group.base not in [m.model for m in group.models]
    if unlisted and method.base == "operand" and not group.is_slice:
        for key in _missing(method.each, group.scopes):
            cure = f"list it under models with a {key}, or leave it out"
            document.fault(("base_model",), f"{name} counts it among its models: {cure}")


def _missing(wanted: Mapping[str, object], given: Sequence[Parameters]) -> Iterator[str]:
    for key, default in wanted.items():
        if default is None and not any(key in scope for scope in given):
            yield key
