"""mergekit-moe's form of a spec: `base_model` and `experts`, without a method."""

from collections.abc import Sequence

from expo.spec.dialect import plain
from expo.spec.schema import Expert, Mixture
from expo.spec.strict import Document

_REASON = "a mixture of experts is made by mergekit-moe"


def is_mixture(value: object) -> bool:
    return isinstance(value, dict) and "experts" in value and "merge_method" not in value


def mixture(spec: Mixture, document: Document) -> tuple[object, tuple[str, ...]]:
    """What mergekit-moe is given, and why it is; what it would refuse is noted as a fault."""
    count = spec.experts_per_token
    if not 1 <= count <= len(spec.experts):
        fault = f"is from 1 to the {len(spec.experts)} experts that there are, not {count}"
        document.fault(("experts_per_token",), fault)
    if spec.gate_mode != "random":
        _check_prompts(spec.experts, document)
    return plain(document.value), (_REASON,)


def _check_prompts(experts: Sequence[Expert], document: Document) -> None:
    """The gates are made of the prompts, so these have to tell the experts apart."""
    for number, expert in enumerate(experts):
        if not expert.positive_prompts:
            fault = "needs positive_prompts: what should lead to this expert (or gate_mode: random)"
            document.fault(("experts", number), fault)
    prompts = {(*(e.positive_prompts or ()), "", *(e.negative_prompts or ())) for e in experts}
    if len(prompts) == 1:
        fault = (
            "the prompts are the same for all: nothing would tell them apart (or gate_mode: random)"
        )
        document.fault(("experts",), fault)
    elif len({expert.source_model for expert in experts}) == 1:
        fault = (
            "are all the same model: the result costs more and says the same (or gate_mode: random)"
        )
        document.fault(("experts",), fault)
