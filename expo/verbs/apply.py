"""`expo.apply`: the same arithmetic on state dicts in memory, for trainer callbacks and notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from expo.checkpoint.memory import state_dict_checkpoint
from expo.compute.stream import tensors
from expo.errors import CheckpointError, SpecError
from expo.planning.build import plan_of
from expo.spec.request import Operand, Request, Slice, resolve_alpha

if TYPE_CHECKING:
    from torch import Tensor

StateDict = Mapping[str, "Tensor"]
Vocabulary = Mapping[str, int]


def apply(
    sft: StateDict,
    aligned: StateDict | Sequence[StateDict],
    *,
    alpha: float | Sequence[float],
    interpolate: bool = False,
    vocabularies: Sequence[Vocabulary] | None = None,
    force: bool = False,
) -> "Iterator[tuple[str, Tensor]]":
    """θ_sft + Σ αᵢ(θᵢ − θ_sft) of state dicts in memory, one (name, tensor) at a time, as `extrapolate` and
    `merge` compute it: the same matching, the same bytes.

    Floats are computed in float32 (float64 where an input is) and rounded once to the first aligned
    tensor's dtype; integers and booleans must be equal.

    Args:
        aligned: one state dict, or several.
        alpha: of each aligned model.
        interpolate: allow 0 < alpha < 1.
        vocabularies: ids by token of SFT and of every aligned model (a tokenizer's `get_vocab()`), to
            match embedding rows by; without them rows match by index.
        force: go on where the noise of quantized weights outweighs the change.

    Raises:
        SpecError: alpha is not finite or lies between 0 and 1, or the numbers of models and alphas differ.
        CheckpointError: names, shapes or integers differ, or a tensor is not finite.
    """
    models = [aligned] if isinstance(aligned, Mapping) else list(aligned)
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha] * len(models)
    words = [None] * (len(models) + 1) if vocabularies is None else list(vocabularies)
    if len(alphas) != len(models) or len(words) != len(models) + 1:
        raise SpecError("give one alpha for every aligned model, and a vocabulary for each model")
    labels = ["aligned"] if len(models) == 1 else [f"aligned {n + 1}" for n in range(len(models))]
    base = state_dict_checkpoint(sft, "SFT", words[0])
    tops = [state_dict_checkpoint(*one) for one in zip(models, labels, words[1:], strict=True)]
    values = [resolve_alpha(one, None, interpolate=interpolate) for one in alphas]
    operands = tuple(
        Operand(top.reference, {"alpha": value})
        for top, value in zip(tops, values, strict=True)
        if value is not None
    )
    request = Request((Slice(operands),), base=base.reference, force=force)
    plan = plan_of(request, {checkpoint.reference: checkpoint for checkpoint in (base, *tops)})
    if plan.missing or plan.extra:
        names = ", ".join(sorted({*plan.missing, *plan.extra})[:5])
        raise CheckpointError(f"the state dicts do not hold the same tensors: {names}")
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    yield from tensors(plan)
