"""The merge spec: mergekit's vocabulary, strict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from expo.checkpoint.reference import parse_reference
from expo.spec.request import Request, Rounding, resolve_alpha
from expo.spec.source import Path_
from expo.spec.strict import Document, Strict


class Parameters(Strict):
    """α in one of the two conventions; neither has a default."""

    alpha: float | None = Field(None, allow_inf_nan=False)
    paper_alpha: float | None = Field(None, allow_inf_nan=False)


class AlignedModel(Strict):
    """The model trained from `base_model`."""

    model: str
    parameters: Parameters


class MergeSpec(Strict):
    """θ = θ_base + α·(θ_model − θ_base), rounded once to `out_dtype`."""

    merge_method: Literal["expo"]
    base_model: str
    models: list[AlignedModel]
    out_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    interpolate: bool = False

    @field_validator("models")
    @classmethod
    def _one_model(cls, models: list[AlignedModel]) -> list[AlignedModel]:
        if len(models) != 1:
            raise ValueError("takes one aligned model" if models else "needs the aligned model")
        return models


def read_spec(source: Path | str | Mapping[str, object]) -> Request:
    """A request from a YAML file, or from a mapping of the same form.

    Raises:
        SpecError: with one line for every fault.
    """
    if isinstance(source, Mapping):
        return _request(Document(dict(source), "spec"))
    return _request(Document.read(Path(source)))


def _request(document: Document) -> Request:
    spec = document.validate(MergeSpec)
    aligned = spec.models[0]
    parameters: Path_ = ("models", 0, "parameters")
    given = aligned.parameters
    if given.alpha is None and given.paper_alpha is None:
        document.fault(parameters, "needs alpha or paper_alpha")
    alpha = document.attempt(
        (*parameters, "alpha" if given.alpha is not None else "paper_alpha"),
        lambda: resolve_alpha(given.alpha, given.paper_alpha, interpolate=spec.interpolate),
    )
    base = document.attempt(
        ("base_model",), lambda: parse_reference(spec.base_model, role="base_model")
    )
    top = document.attempt(
        ("models", 0, "model"), lambda: parse_reference(aligned.model, role="model")
    )
    document.check()
    assert base is not None
    assert top is not None
    return Request(base, top, alpha, spec.out_dtype, spec.rounding, spec.seed)
