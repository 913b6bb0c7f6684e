"""Match the tensors of all models of a merge, one or many, and say what becomes of each."""

from collections.abc import Iterator, Mapping

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.dtypes import BY_TORCH_NAME, COPIED, FLOATS
from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED, HEADS, INPUTS, is_embedding
from expo.checkpoint.weight import Weight
from expo.operators.methods import METHODS, TRANSFORMS, Default
from expo.planning.findings import Findings
from expo.planning.jobs import Blend, Copy, Rule, TensorJob, Term
from expo.planning.models import Models
from expo.planning.rows import RowMatch, SharedRows, share_rows
from expo.planning.token_rows import TokenRows
from expo.planning.values import Values
from expo.spec.request import Request

_SHARED = frozenset({"rescale"})
"""Parameters of a transform that are the merge's, not a model's."""


def match(
    request: Request, models: Models, allowed: frozenset[str], found: Findings
) -> dict[str, TensorJob]:
    """What becomes of every tensor of the donor; what does not fit is left out and noted in `found`.

    Args:
        allowed: the tensors that some models may lack.
    """
    matcher = _Matcher(request, models, allowed, found)
    jobs = (matcher.job(name, weight) for name, weight in models.donor.weights.items())
    matched = {job.name: job for job in jobs if job is not None}
    matcher.note_extra()
    return matched


class _Matcher:
    def __init__(
        self, request: Request, models: Models, allowed: frozenset[str], found: Findings
    ) -> None:
        self._request, self._models, self._allowed, self._found = request, models, allowed, found
        self._values = Values(request, models.donor)
        self._rows = [TokenRows(models, other, found) for other in models.others]

    def job(self, name: str, donor: Weight) -> TensorJob | None:
        partners = [self._partner(other, name) for other in self._models.others]
        dtype = _output_dtype(self._request, donor)
        if None in partners:
            if not self._may_differ(name):
                self._found.missing.append(name)
                return None
            lacking = self._models.others[partners.index(None)]
            only = "is only" if self._models.is_pair else "is not"
            where = self._models.donor if self._models.is_pair else lacking
            self._found.notes.append(
                f"{printable(name)} {only} {self._models.full_place(where)}: copied"
            )
            return TensorJob(name, dtype, donor, Copy())
        others = [partner for partner in partners if partner is not None]
        if not self._have_one_form(name, donor, others):
            return None
        if donor.dtype in COPIED:
            return TensorJob(name, dtype, donor, Copy(tuple(others), self._models.all_names))
        if self._request.method == "expo" and self._values.stays(name):
            return TensorJob(name, dtype, donor, Copy())
        matches = self._matched_rows(name, donor, others)
        blend = self._blend(name, donor, others)
        if matches is None or blend is None:
            return None
        return TensorJob(name, dtype, donor, blend, _rows_of(blend, donor, others, matches))

    def note_extra(self) -> None:
        """What other models have and the donor has not: dropped, or noted as a fault."""
        for other in self._models.others:
            for name in sorted(other.weights.keys() - self._models.donor.weights.keys()):
                if self._may_differ(name) or self._follows(other, name):
                    where = self._models.full_place(other)
                    self._found.notes.append(f"{printable(name)} is only {where}: dropped")
                elif name not in self._found.extra:
                    self._found.extra.append(name)

    def _follows(self, other: Checkpoint, name: str) -> bool:
        """Whether it is a head that one of the two models ties to its embedding."""
        ties = other.ties_embeddings or self._models.donor.ties_embeddings
        return ties and name.endswith(HEADS)

    def _may_differ(self, name: str) -> bool:
        """Whether a tensor may be in some models only: a derived buffer, or what --allow-missing names."""
        return bool(DERIVED.search(name) or name in self._allowed)

    def _partner(self, checkpoint: Checkpoint, name: str) -> Weight | None:
        """The tensor of that name; a tied head is its embedding, and the other way round."""
        if name in checkpoint.weights or not checkpoint.ties_embeddings:
            return checkpoint.weights.get(name)
        for mine, theirs in ((HEADS, INPUTS), (INPUTS, HEADS)):
            tied = [w for n, w in checkpoint.weights.items() if n.endswith(theirs)]
            if name.endswith(mine) and len(tied) == 1:
                stored = printable(tied[0].stored.name)
                self._found.notes.append(
                    f"{printable(name)} is tied to {stored} in {checkpoint.label}"
                )
                return tied[0]
        return None

    def _have_one_form(self, name: str, donor: Weight, others: list[Weight]) -> bool:
        """Whether shapes (but for the rows of embeddings) and kinds of number agree."""
        for other, weight in zip(self._models.others, others, strict=True):
            if weight.shape != donor.shape and not _differ_in_rows(name, weight, donor):
                self._mismatch(name, other, list(weight.shape), list(donor.shape))
                return False
            same = weight.dtype == donor.dtype and donor.dtype in COPIED
            if not same and not {weight.dtype, donor.dtype} <= FLOATS:
                self._mismatch(name, other, weight.dtype, donor.dtype)
                return False
        return True

    def _mismatch(self, name: str, other: Checkpoint, theirs: object, donors: object) -> None:
        models = self._models
        what = f"{theirs} {models.place(other)}, {donors} {models.place(models.donor)}"
        self._found.mismatched.append(f"{printable(name)} ({what})")

    def _matched_rows(
        self, name: str, donor: Weight, others: list[Weight]
    ) -> list[RowMatch] | None:
        """How the rows of every other model match the donor's; None where nobody can say."""
        if not is_embedding(name):
            return [RowMatch()] * len(others)
        counts = [(weight.shape[0], donor.shape[0]) for weight in others]
        found = [rows.match(name, *count) for rows, count in zip(self._rows, counts, strict=True)]
        return None if None in found else [match for match in found if match is not None]

    def _blend(self, name: str, donor: Weight, others: list[Weight]) -> Blend | None:
        models = self._models
        weights = {id(models.donor): donor}
        weights |= {id(c): w for c, w in zip(models.others, others, strict=True)}
        shared = self._shared(name)
        terms = [self._term(name, n, weights[id(c)]) for n, c in enumerate(models.operands)]
        if shared is None or None in terms:
            return None
        method = METHODS[self._request.method]
        sparsifier, elects_sign = method.sparsifier, method.elects_sign
        for transform in self._request.transforms:
            sparsifier = TRANSFORMS[transform.name].sparsifier
            elects_sign = elects_sign or TRANSFORMS[transform.name].elects_sign
        kept = tuple(term for term in terms if term is not None)
        base = None if models.base is None else weights[id(models.base)]
        start = base or kept[0].weight
        if models.onto is not None:
            start = weights[id(models.onto)]
        return Blend(self._request.method, kept, base, start, shared, sparsifier, elects_sign)

    def _shared(self, name: str) -> Mapping[str, float] | None:
        method = METHODS[self._request.method]
        wanted = {k: self._values.shared(k, d, name) for k, d in method.shared.items()}
        wanted |= {k: v for k, v in self._of_transforms() if k in _SHARED}
        return self._all_given(wanted, name, None)

    def _term(self, name: str, number: int, weight: Weight) -> Term | None:
        wanted: dict[str, Default] = {
            key: self._values.of_operand(number, key, default, name)
            for key, default in METHODS[self._request.method].each.items()
        }
        if self._request.method == "expo":
            if not self._request.gives_alpha:
                wanted["alpha"] = 1.0  # good for a plan or a diff
            wanted |= {k: v for k, v in self._of_transforms() if k not in _SHARED}
        given = self._all_given(wanted, name, self._models.operands[number].label)
        if given is None or not self._epsilon_fits(given):
            return None
        return Term(weight, given)

    def _of_transforms(self) -> Iterator[tuple[str, Default]]:
        """Their parameters, defaults filled in."""
        for transform in self._request.transforms:
            yield from {**TRANSFORMS[transform.name].each, **transform.parameters}.items()

    def _epsilon_fits(self, given: Mapping[str, float]) -> bool:
        """DELLA's probabilities density ± epsilon have to lie between 0 and 1."""
        density, epsilon = given.get("density", 1.0), given.get("epsilon", 0.0)
        if not 0 < density < 1 or (density - epsilon > 0 and density + epsilon < 1):
            return True
        self._refuse_once(
            f"density {density:g} ± epsilon {epsilon:g} leaves 0 … 1: choose a smaller epsilon"
        )
        return False

    def _all_given(
        self, wanted: Mapping[str, Default], name: str, model: str | None
    ) -> Mapping[str, float] | None:
        """The values, or a refusal that names what is missing."""
        missing = [key for key, value in wanted.items() if value is None]
        if not missing:
            return {key: float(value) for key, value in wanted.items() if value is not None}
        whose = "" if model is None or self._models.is_pair else f" of {model}"
        what = f"no {missing[0]}{whose} for"
        self._refuse_once(f"{what} {printable(name)}: add a value without a filter", known_by=what)
        return None

    def _refuse_once(self, refusal: str, *, known_by: str | None = None) -> None:
        known = known_by or refusal
        if not any(other.startswith(known) for other in self._found.refusals):
            self._found.refusals.append(refusal)


def _differ_in_rows(name: str, weight: Weight, donor: Weight) -> bool:
    """Whether two embeddings differ in their number of rows only."""
    same_width = weight.shape[1:] == donor.shape[1:] and len(weight.shape) == len(donor.shape)
    return is_embedding(name) and same_width


def _rows_of(
    rule: Rule, donor: Weight, others: list[Weight], matches: list[RowMatch]
) -> tuple[SharedRows, ...]:
    """The rows of every tensor of the rule, in its order."""
    by_weight = {id(weight): match for weight, match in zip(others, matches, strict=True)}
    by_weight[id(donor)] = RowMatch()
    return share_rows(
        [by_weight[id(weight)] for weight in rule.weights], donor.shape[0] if donor.shape else 1
    )


def _output_dtype(request: Request, weight: Weight) -> str:
    if request.dtype is None or weight.dtype not in FLOATS:
        return weight.dtype
    return BY_TORCH_NAME[request.dtype]
