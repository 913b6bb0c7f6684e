"""The merge spec: mergekit's vocabulary, extended by ExPO's, strict."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from expo.checkpoint.names import KINDS
from expo.spec.request import Rounding
from expo.spec.strict import Strict

Parameters = dict[str, object]
"""Settings by name: a number, a gradient over the layers, or filters with values."""

Dtype = Literal["bfloat16", "float16", "float32", "float64"]


class Model(Strict):
    """One model of the merge."""

    model: str
    parameters: Parameters | None = None


class Source(Strict):
    """Some layers of one model, first to the one after the last."""

    model: str
    layer_range: list[int] = Field(min_length=2, max_length=2)
    parameters: Parameters | None = None


class SliceOf(Strict):
    """The same layers of every model."""

    sources: list[Source] = Field(min_length=1)
    base_model: str | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None


class Verify(Strict):
    """How the output is verified: golden vectors, and from which severity on it fails."""

    vectors: str | None = None
    stop_at: Literal["error", "warning"] = "error"


class MergeSpec(Strict):
    """θ = onto + Σ αᵢ·transform(θᵢ − θ_base) for `expo`; mergekit's methods by their names."""

    merge_method: str
    base_model: str | None = None
    models: list[Model] | None = None
    slices: list[SliceOf] | None = None
    modules: dict[str, object] | None = None
    parameters: Parameters | None = None
    onto: str | None = None
    donor: str | None = None
    transforms: list[dict[str, Parameters | None]] | None = None
    edits: list[dict[str, Parameters | None]] | None = None
    exclude: list[str] = Field(default_factory=list, description=f"any of {', '.join(KINDS)}")
    fix_first_layers: int = Field(0, ge=0)
    fix_last_layers: int = Field(0, ge=0)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    interpolate: bool = False
    tokenizer_source: str | None = None
    tokenizer: dict[str, object] | None = None
    chat_template: str | None = None
    verify: Verify | None = None
    warning: str | None = None
    name: str | None = None


def json_schema() -> Mapping[str, object]:
    """The JSON Schema of a spec, for editors."""
    schema = MergeSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
