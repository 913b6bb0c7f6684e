"""The merge spec: mergekit's vocabulary, extended by ExPO's, strict."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from expo.checkpoint.names import KINDS
from expo.spec.dialect import dtype, model_text, whole
from expo.spec.request import MAX_SEED, Rounding
from expo.spec.strict import Strict

Parameters = dict[str, object]
"""Settings by name: a number, a gradient over the layers, or filters with values."""

Dtype = Annotated[Literal["bfloat16", "float16", "float32", "float64"], BeforeValidator(dtype)]
ModelName = Annotated[str, BeforeValidator(model_text)]
Whole = Annotated[int, BeforeValidator(whole)]


class Model(Strict):
    """One model of the merge."""

    model: ModelName
    parameters: Parameters | None = None


class Source(Strict):
    """Some layers of one model, first to the one after the last."""

    model: ModelName
    layer_range: list[Whole] = Field(min_length=2, max_length=2)
    parameters: Parameters | None = None


class SliceOf(Strict):
    """The same layers of every model."""

    sources: list[Source] = Field(min_length=1)
    base_model: ModelName | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None


class Module(Strict):
    """What one of an architecture's modules is made of."""

    models: list[Model] | None = None
    slices: list[SliceOf] | None = None
    parameters: Parameters | None = None


class Verify(Strict):
    """How the output is verified: golden vectors, and from which severity on it fails."""

    vectors: str | None = None
    stop_at: Literal["error", "warning"] = "error"


class MergeSpec(Strict):
    """θ = onto + Σ αᵢ·transform(θᵢ − θ_base) for `expo`; mergekit's methods by their names."""

    merge_method: str
    base_model: ModelName | None = None
    models: list[Model] | None = None
    slices: list[SliceOf] | None = None
    modules: dict[str, Module] | None = None
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
    seed: int = Field(0, ge=0, le=MAX_SEED)
    interpolate: bool = False
    force: bool = False
    tokenizer_source: ModelName | None = None
    tokenizer: dict[str, object] | None = None
    chat_template: str | None = None
    verify: Verify | None = None
    warning: str | None = None
    name: str | None = None


class Expert(Strict):
    """One model of a mixture, and the prompts that should lead to it."""

    source_model: ModelName
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None


class Mixture(Strict):
    """mergekit-moe's own form: dense models become the experts of one model."""

    base_model: ModelName
    experts: list[Expert] = Field(min_length=1)
    shared_experts: list[Expert] | None = None
    gate_mode: Literal["hidden", "cheap_embed", "random", "uniform_random"] = "hidden"
    experts_per_token: Whole = 2
    architecture: str | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    seed: int = Field(0, ge=0, le=MAX_SEED)
    verify: Verify | None = None
    warning: str | None = None
    name: str | None = None


def json_schema() -> Mapping[str, object]:
    """The JSON Schema of a spec, for editors."""
    schema = MergeSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
