"""Match the tensors of several models for everything but the plain ExPO of a pair."""

import re

from expo.checkpoint.checkpoint import Checkpoint, Weight
from expo.checkpoint.dtypes import COPIED, FLOATS
from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED
from expo.planning.findings import Findings
from expo.planning.pair import output_dtype, tied_partner
from expo.planning.plan import Combination, TensorJob, Term
from expo.planning.values import Values
from expo.spec.methods import ELECTS_SIGN, METHODS, SPARSIFIERS, TRANSFORMS, Default
from expo.spec.request import Request, Transform

_SHARED = {"rescale"}
"""Parameters of a transform that are the merge's, not a model's."""


class Matcher:
    """Finds each tensor of the donor in every model and says how they combine.

    `models` are the operands in the order of the spec, without the base unless the method treats it
    as one of them.
    """

    def __init__(
        self,
        request: Request,
        donor: Checkpoint,
        base: Checkpoint | None,
        models: tuple[Checkpoint, ...],
        onto: Checkpoint | None,
        allowed: re.Pattern[str] | None,
        found: Findings,
    ) -> None:
        self._request, self._found, self._allowed = request, found, allowed
        self._donor, self._base, self._models, self._onto = donor, base, models, onto
        self._values = Values(request, donor)
        self._method = METHODS[request.method]

    def jobs(self) -> dict[str, TensorJob]:
        jobs = {}
        for name, weight in self._donor.weights.items():
            job = self._job(name, weight)
            if job is not None:
                jobs[name] = job
        self._note_extra()
        return jobs

    def _job(self, name: str, weight: Weight) -> TensorJob | None:
        checkpoints = [c for c in (self._base, self._onto, *self._models) if c is not None]
        partners = {id(c): self._partner(c, name) for c in checkpoints}
        missing = [c.label for c in checkpoints if partners[id(c)] is None]
        dtype = output_dtype(self._request, weight)
        if missing:
            if DERIVED.search(name) or (self._allowed and self._allowed.search(name)):
                self._found.notes.append(f"{printable(name)} is not in {missing[0]}: copied")
                return TensorJob(name, "copy", dtype, weight, None)
            self._found.missing.append(name)
            return None
        weights = {key: partner for key, partner in partners.items() if partner is not None}
        if not self._same_form(name, weight, list(weights.values())):
            return None
        if weight.dtype in COPIED:
            other = next((w for w in weights.values() if w is not weight), None)
            return TensorJob(
                name, "copy_if_equal" if other else "copy", weight.dtype, weight, other
            )
        if self._request.method == "expo" and self._values.stays(name):
            return TensorJob(name, "copy", dtype, weight, None)
        combination = self._combination(name, weights)
        if combination is None:
            return None
        return TensorJob(name, "combine", dtype, weight, None, combination=combination)

    def _partner(self, checkpoint: Checkpoint, name: str) -> Weight | None:
        return checkpoint.weights.get(name) or tied_partner(checkpoint, name, self._found)

    def _same_form(self, name: str, weight: Weight, others: list[Weight]) -> bool:
        for other in others:
            if other.shape != weight.shape:
                shapes = f"{list(other.shape)} in {other.files.label}, {list(weight.shape)} in {weight.files.label}"
                self._found.mismatched.append(f"{printable(name)} ({shapes})")
                return False
            same = other.dtype == weight.dtype
            if not (same and weight.dtype in COPIED) and not {other.dtype, weight.dtype} <= FLOATS:
                dtypes = (
                    f"{other.dtype} in {other.files.label}, {weight.dtype} in {weight.files.label}"
                )
                self._found.mismatched.append(f"{printable(name)} ({dtypes})")
                return False
        return True

    def _combination(self, name: str, weights: dict[int, Weight]) -> Combination | None:
        base = weights[id(self._base)] if self._base is not None else None
        shared = self._shared(name)
        terms = [self._term(name, number, weights[id(m)]) for number, m in enumerate(self._models)]
        if shared is None or None in terms:
            return None
        sparsifier, elects = (
            SPARSIFIERS.get(self._request.method),
            self._request.method in ELECTS_SIGN,
        )
        for transform in self._request.transforms:
            sparsifier = SPARSIFIERS[transform.name]
            elects = elects or transform.name == "ties"
        start = weights[id(self._onto)] if self._onto is not None else base
        kept = tuple(term for term in terms if term is not None)
        return Combination(self._request.method, kept, base, start, shared, sparsifier, elects)

    def _shared(self, name: str) -> dict[str, float] | None:
        wanted = {
            k: self._values.shared(k, default, name) for k, default in self._method.shared.items()
        }
        for transform in self._request.transforms:
            wanted |= {k: v for k, v in _given(transform).items() if k in _SHARED}
        return self._all_given(wanted, name, None)

    def _term(self, name: str, number: int, weight: Weight) -> Term | None:
        wanted: dict[str, Default] = {
            key: self._values.of_operand(number, key, default, name)
            for key, default in self._method.each.items()
        }
        if self._request.method == "expo":
            wanted["alpha"] = self._values.alpha(number, name)
            for transform in self._request.transforms:
                wanted |= {k: v for k, v in _given(transform).items() if k not in _SHARED}
        given = self._all_given(wanted, name, self._models[number].label)
        if given is None or not self._epsilon_fits(given):
            return None
        return Term(weight, given)

    def _epsilon_fits(self, given: dict[str, float]) -> bool:
        """DELLA's probabilities density ± epsilon have to lie between 0 and 1."""
        density, epsilon = given.get("density", 1.0), given.get("epsilon", 0.0)
        if not 0 < density < 1 or (density - epsilon > 0 and density + epsilon < 1):
            return True
        refusal = (
            f"density {density:g} ± epsilon {epsilon:g} leaves 0 … 1: choose a smaller epsilon"
        )
        if refusal not in self._found.refusals:
            self._found.refusals.append(refusal)
        return False

    def _all_given(
        self, wanted: dict[str, Default], name: str, model: str | None
    ) -> dict[str, float] | None:
        """The values, or a refusal that names what is missing."""
        missing = [key for key, value in wanted.items() if value is None]
        if missing:
            whose = "" if model is None else f" of {model}"
            fault = f"no {missing[0]}{whose} for {printable(name)}: add a value without a filter"
            if not any(
                known.startswith(f"no {missing[0]}{whose} for") for known in self._found.refusals
            ):
                self._found.refusals.append(fault)
            return None
        return {key: float(value) for key, value in wanted.items() if value is not None}

    def _note_extra(self) -> None:
        for checkpoint in (self._base, self._onto, *self._models):
            if checkpoint is None:
                continue
            for name in sorted(checkpoint.weights.keys() - self._donor.weights.keys()):
                follows = checkpoint.ties_embeddings and name.endswith("lm_head.weight")
                if (
                    DERIVED.search(name)
                    or follows
                    or (self._allowed and self._allowed.search(name))
                ):
                    self._found.notes.append(
                        f"{printable(name)} is only in {checkpoint.label}: dropped"
                    )
                elif name not in self._found.extra:
                    self._found.extra.append(name)


def _given(transform: Transform) -> dict[str, Default]:
    """A transform's parameters, defaults filled in."""
    return {**TRANSFORMS[transform.name], **transform.parameters}
