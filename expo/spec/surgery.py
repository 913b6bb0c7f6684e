"""What a spec asks for that only mergekit's own engine can do."""

from collections.abc import Iterator, Mapping
from typing import Any

from expo.checkpoint.yaml_values import Path_
from expo.operators.methods import IN_MERGEKIT
from expo.spec.dialect import overrides_architecture
from expo.spec.schema import MergeSpec, SliceOf


def surgery(spec: MergeSpec, value: object) -> Iterator[str]:
    """Why a spec, read from the plain `value`, needs mergekit's own engine, if it does."""
    if spec.merge_method in IN_MERGEKIT:
        yield f"{spec.merge_method} does not stream through expo"
    if spec.modules is not None:
        yield "modules need mergekit's architectures"
    if spec.tokenizer is not None or spec.tokenizer_source not in (None, "base"):
        yield "a new vocabulary needs mergekit's tokenizer surgery"
    if spec.chat_template not in (None, "auto"):
        yield "another chat template than the donor's"
    if overrides_architecture(value):
        yield "override_architecture is mergekit's"
    yield from _rearranged(spec.slices or [])


def named_models(value: object, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Every model that a spec names, wherever it does, with the place."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        if key in ("model", "base_model", "source_model") and isinstance(item, str):
            yield (*path, key), item
        yield from named_models(item, (*path, key))


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A spec with every text that is one of `names`, or adds an adapter to one, replaced."""
    if isinstance(value, dict):
        return {key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return placed(value, names) if isinstance(value, str) else value


def placed(text: str, names: Mapping[str, str]) -> str:
    """What stands for a model, or for the model before an adapter."""
    model, plus, adapter = text.partition("+")
    return names[text] if text in names else f"{names.get(model, model)}{plus}{adapter}"


def _rearranged(slices: list[SliceOf]) -> Iterator[str]:
    """Slices that are not the whole of the same models, in order."""
    following = 0
    for slice_ in slices:
        first, end = slice_.sources[0].layer_range
        if {tuple(source.layer_range) for source in slice_.sources} != {(first, end)}:
            yield "a slice takes different layers of its models"
        if first != following:
            yield f"layers {first} to {end} follow {following}: reordered or stacked layers"
        if [s.model for s in slice_.sources] != [s.model for s in slices[0].sources]:
            yield "slices take different models"
        if slice_.base_model is not None or slice_.residual_weight is not None:
            yield "a slice has its own base_model or residual_weight"
        following = end
