"""The merge methods and transforms that stream through expo's engine, and their parameters.

Names, defaults and meaning are mergekit's (0.1.5); `expo` and its transforms are ours.
"""

from dataclasses import dataclass, field
from typing import Literal

Default = float | bool | None
"""None: has to be given."""

Base = Literal["required", "optional", "operand"]
"""`operand`: the base is one of the models like any other."""


@dataclass(frozen=True)
class Method:
    """How a method takes its models. `each` are parameters of a model, `shared` of the merge."""

    base: Base
    each: dict[str, Default] = field(default_factory=dict)
    shared: dict[str, Default] = field(default_factory=dict)
    models: tuple[int, int | None] = (1, None)


_WEIGHTED: dict[str, Default] = {"weight": None, "density": 1.0}


def _arithmetic(*, normalize: bool = False, rescale: bool = False, **each: Default) -> Method:
    shared: dict[str, Default] = {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    return Method("required", _WEIGHTED | each, shared)


METHODS: dict[str, Method] = {
    "expo": Method("required", {"alpha": None}),
    "linear": Method("operand", {"weight": None}, {"normalize": True}),
    "task_arithmetic": _arithmetic(),
    "ties": _arithmetic(normalize=True),
    "dare_linear": _arithmetic(rescale=True),
    "dare_ties": _arithmetic(rescale=True),
    "della_linear": _arithmetic(rescale=True, epsilon=0.15),
    "della": _arithmetic(normalize=True, rescale=True, epsilon=0.15),
    "breadcrumbs": _arithmetic(gamma=0.01),
    "breadcrumbs_ties": _arithmetic(gamma=0.01),
    "slerp": Method("required", {}, {"t": None}, (1, 1)),
    "nuslerp": Method("optional", {"weight": None}, {"nuslerp_row_wise": False, "nuslerp_flatten": True}, (2, 2)),
    "passthrough": Method("operand", {"scale": 1.0}, {}, (1, 1)),
}  # fmt: skip

TRANSFORMS: dict[str, dict[str, Default]] = {
    "magnitude": {"density": None},
    "dare": {"density": None, "rescale": True},
    "della": {"density": None, "epsilon": 0.15, "rescale": True},
    "breadcrumbs": {"density": None, "gamma": 0.01},
    "ties": {"density": 1.0},
}
"""On Δ, before it is scaled: which elements stay (`density`), `ties` also elects a sign."""

SPARSIFIERS = {
    "ties": "magnitude",
    "dare_linear": "random",
    "dare_ties": "random",
    "della": "ranked",
    "della_linear": "ranked",
    "breadcrumbs": "outliers",
    "breadcrumbs_ties": "outliers",
    "magnitude": "magnitude",
    "dare": "random",
}
"""How a method or transform chooses the elements of Δ that stay."""

ELECTS_SIGN = frozenset({"ties", "dare_ties", "della", "breadcrumbs_ties"})
"""Methods in which the models agree on the sign of every element (TIES). As transforms, only ties."""

WITHOUT_EFFECT = frozenset({"int8_mask"})
"""Parameters that mergekit's users write and that change nothing here: computed in float32 anyway."""

IN_MERGEKIT = (
    "multislerp", "karcher", "model_stock", "nearswap", "arcee_fusion", "sce", "ram", "ramplus_tl",
)  # fmt: skip
"""Methods that run through the mergekit library."""
