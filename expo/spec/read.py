"""From a spec to a request: references parsed, parameters checked against the method, α in one form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from expo.checkpoint.names import KINDS
from expo.checkpoint.parsing import shown
from expo.checkpoint.reference import Reference, parse_reference
from expo.checkpoint.yaml_values import Path_
from expo.spec.dialect import plain
from expo.spec.experts import is_mixture, mixture
from expo.spec.inputs import KNOWN, check_inputs, scopes
from expo.spec.parameters import Reader
from expo.spec.recipes import spec_path, vectors_path
from expo.spec.request import Foreign, Operand, Request, Slice
from expo.spec.schema import MergeSpec, Mixture, Model, SliceOf, Source
from expo.spec.steps import edits, low_rank, transforms
from expo.spec.strict import Document, nearest
from expo.spec.surgery import named_models, placed, renamed, surgery

Spec = Mapping[str, object] | str | PathLike[str] | Request
"""A mapping of a spec's form, a YAML file or a recipe's name, or a request that is already made."""


def read_request(spec: Spec) -> Request:
    """The request that a spec stands for. Raises as `read_spec`."""
    if isinstance(spec, Request):
        return spec
    return read_spec(spec if isinstance(spec, Mapping) else Path(spec))


def read_spec(source: Path | str | Mapping[str, object], *, strict: bool = False) -> Request:
    """A request from a YAML file, from a recipe's name, or from a mapping of the same form.

    Unknown keys are faults in `merge_method: expo` and where `strict`, else remarks.

    Raises:
        SpecError: with one line for every fault.
    """
    if isinstance(source, Mapping):
        return request_of(Document(dict(source), "spec"), strict=strict)
    path = spec_path(Path(source))
    return request_of(Document.read(path), beside=path.parent, strict=strict)


def request_of(
    document: Document,
    *,
    beside: Path | None = None,
    outputs: Mapping[str, Path] | None = None,
    strict: bool = False,
) -> Request:
    """The request of one document, with the names of earlier outputs taken for their places.

    Raises:
        SpecError: with one line for every fault.
    """
    places = {name: str(place) for name, place in (outputs or {}).items()}
    reader = _Reader(document, beside, places, strict=strict)
    if is_mixture(document.value):
        return reader.mixture()
    return reader.request()


@dataclass
class _Reader:
    """One document on its way to a request."""

    document: Document
    beside: Path | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False

    def request(self) -> Request:
        spec = self.document.validate(MergeSpec)
        self._check_form(spec)
        if spec.merge_method != "expo":
            self._refuse_expo_keys(spec)
            check_inputs(spec, self.document)
        raw = plain(self.document.value)
        if reasons := tuple(surgery(spec, raw)):
            return self._foreign(spec, raw, reasons)
        method = KNOWN[spec.merge_method]
        parameters = Reader(self.document, spec.merge_method, method, spec.interpolate)
        base = self._reference(spec.base_model, ("base_model",))
        donor, onto = (self._reference(getattr(spec, key), (key,)) for key in ("donor", "onto"))
        request = Request(
            self._slices(spec, parameters, base),
            spec.merge_method,
            base,
            onto,
            donor,
            parameters.settings(spec.parameters, ("parameters",)),
            transforms(spec, self.document),
            low_rank(spec, self.document),
            edits(spec, self.document),
            self._kinds(spec.exclude),
            spec.fix_first_layers,
            spec.fix_last_layers,
            dtype=spec.out_dtype or spec.dtype,
            rounding=spec.rounding,
            seed=spec.seed,
            vectors=self._vectors(spec),
            stop_at=spec.verify.stop_at if spec.verify else "error",
            fits_vocabulary=spec.tokenizer_source == "base",
        )
        if spec.merge_method == "expo":
            self._check_expo(request, spec)
        request = self._of_base_alone(request)
        return self._finished(request.forced() if spec.force else request, spec)

    def mixture(self) -> Request:
        """A request for mergekit-moe."""
        spec = self.document.validate(Mixture)
        foreign = mixture(spec, self.document)
        return self._through_mergekit(spec, "moe", *foreign, changes_tokenizer=False)

    def _finished(self, request: Request, spec: MergeSpec | Mixture) -> Request:
        """The request with every remark, if there is no fault."""
        self.document.check(strict=self.strict or request.method == "expo")
        own = (spec.warning,) if spec.warning else ()
        return replace(request, remarks=(*self.document.remarks(), *request.remarks, *own))

    def _check_form(self, spec: MergeSpec) -> None:
        given = [key for key in ("models", "slices", "modules") if getattr(spec, key) is not None]
        if len(given) != 1:
            self.document.fault(((given or ["models"])[-1],), "give either models or slices")
        name = spec.merge_method
        if name in KNOWN:
            return
        fault = f"{shown(name)} is not a method of expo or mergekit{nearest(name, list(KNOWN))}"
        if name == "tokensurgeon":
            fault = "is a command of mergekit's: mergekit-tokensurgeon MODEL DONOR OUT, then expo verify OUT"
        self.document.fault(("merge_method",), fault)
        self.document.check()

    def _foreign(self, spec: MergeSpec, raw: object, reasons: tuple[str, ...]) -> Request:
        """A request for mergekit's engine. Nothing of ours goes with it."""
        for key in sorted(spec.model_fields_set & _OURS):
            self.document.fault((key,), f"does not go with mergekit's engine ({reasons[0]})")
        if spec.merge_method == "expo":
            self.document.fault(("merge_method",), f"expo does not go with it: {reasons[0]}")
        reader = Reader(self.document, spec.merge_method, KNOWN[spec.merge_method])
        for path, parameters in scopes(spec):
            reader.settings(parameters, path)
        changes = bool(spec.tokenizer or spec.tokenizer_source or spec.chat_template)
        return self._through_mergekit(
            spec, spec.merge_method, raw, reasons, changes_tokenizer=changes
        )

    def _through_mergekit(
        self,
        spec: MergeSpec | Mixture,
        method: str,
        raw: object,
        reasons: tuple[str, ...],
        *,
        changes_tokenizer: bool,
    ) -> Request:
        assert isinstance(raw, dict)
        own = _OURS | {"seed", "verify", "warning", "name"}
        value = renamed({k: v for k, v in raw.items() if k not in own}, self.outputs)
        value |= {k: v for k in ("dtype", "out_dtype") if (v := getattr(spec, k)) is not None}
        models = {text: self._reference(text, path) for path, text in named_models(value)}
        if not models:
            self.document.fault((), "names no model")
        known = {text: reference for text, reference in models.items() if reference is not None}
        request = Request(
            (Slice(tuple(Operand(reference) for reference in dict.fromkeys(known.values()))),),
            method,
            known.get(str(value.get("base_model"))),
            dtype=spec.out_dtype or spec.dtype,
            seed=spec.seed,
            vectors=self._vectors(spec),
            stop_at=spec.verify.stop_at if spec.verify else "error",
            foreign=Foreign(value, known, reasons, changes_tokenizer),
        )
        return self._finished(request, spec)

    def _reference(self, text: str | None, path: Path_) -> Reference | None:
        if text is None:
            return None
        place = placed(text, self.outputs)
        return self.document.attempt(path, lambda: parse_reference(place, role=str(path[-1])))

    def _slices(
        self, spec: MergeSpec, parameters: Reader, base: Reference | None
    ) -> tuple[Slice, ...]:
        if spec.slices is not None:
            return tuple(self._slice(s, n, parameters, base) for n, s in enumerate(spec.slices))
        operands = self._operands(spec.models or [], ("models",), parameters, base)
        listed = [operand.reference for operand in operands]
        if parameters.method.base == "operand" and base is not None and base not in listed:
            operands += (Operand(base),)
        return (Slice(operands),)

    def _slice(
        self, slice_: SliceOf, number: int, parameters: Reader, base: Reference | None
    ) -> Slice:
        path: Path_ = ("slices", number)
        first, end = slice_.sources[0].layer_range
        operands = self._operands(slice_.sources, (*path, "sources"), parameters, base)
        settings = parameters.settings(slice_.parameters, (*path, "parameters"))
        return Slice(operands, settings, (first, end))

    def _operands(
        self,
        models: Iterable[Model | Source],
        path: Path_,
        parameters: Reader,
        base: Reference | None,
    ) -> tuple[Operand, ...]:
        """The models in their order; the base is one of them where the method says so."""
        operands = []
        method = parameters.method
        for number, model in enumerate(models):
            reference = self._reference(model.model, (*path, number, "model"))
            where: Path_ = (*path, number, "parameters")
            settings = parameters.settings(model.parameters, where)
            for key in settings.keys() & method.shared.keys() - method.each.keys():
                told = "has no effect on one model: put it under the spec's own parameters"
                self.document.remark((*where, key), told)
            if reference is not None and (reference != base or method.base == "operand"):
                operands.append(Operand(reference, settings))
        return tuple(operands)

    def _of_base_alone(self, request: Request) -> Request:
        """A merge of the base and nothing else is the base, with its adapter."""
        adds_nothing = KNOWN[request.method].adds_to_base and not request.operands
        if request.base is None or not adds_nothing:
            return request
        remark = f"{request.method} of the base alone: the output is {request.base}"
        slices = tuple(Slice((Operand(request.base),), layers=s.layers) for s in request.slices)
        return replace(request, slices=slices, method="passthrough", settings={}, remarks=(remark,))

    def _vectors(self, spec: MergeSpec | Mixture) -> Path | None:
        if spec.verify is None or spec.verify.vectors is None:
            return None
        given = spec.verify.vectors
        return self.document.attempt(
            ("verify", "vectors"), lambda: vectors_path(given, self.beside)
        )

    def _kinds(self, kinds: list[str]) -> tuple[str, ...]:
        for number, kind in enumerate(kinds):
            if kind not in KINDS:
                fault = (
                    f"{shown(kind)} is not one of {', '.join(KINDS)}{nearest(kind, list(KINDS))}"
                )
                self.document.fault(("exclude", number), fault)
        return tuple(kinds)

    def _refuse_expo_keys(self, spec: MergeSpec) -> None:
        for key in sorted(spec.model_fields_set & _EXPO_ONLY):
            self.document.fault((key,), f"belongs to merge_method expo, not {spec.merge_method}")

    def _check_expo(self, request: Request, spec: MergeSpec) -> None:
        if spec.tokenizer_source is not None:
            fault = "the tokenizer is the aligned model's, byte for byte: name another with donor:"
            self.document.fault(("tokenizer_source",), fault)
        if not self.document.is_sound:
            return  # what follows would only be consequences
        where: Path_ = ("models",) if spec.models is not None else ("slices",)
        if request.base is None:
            self.document.fault(("base_model",), "is required by expo")
        if not request.operands:
            fault = "expo takes at least 1 model beside the base, not 0"
            self.document.fault(where, fault)
        elif not request.gives_alpha:
            path = (*where, 0, "parameters") if spec.models is not None else where
            self.document.fault(path, "needs alpha or paper_alpha")
        if request.onto is not None and request.donor is None:
            fault = "whose tokenizer and template? Say donor: with one of the models"
            self.document.fault(("onto",), fault)


_EXPO_ONLY = {
    "onto", "transforms", "exclude", "fix_first_layers", "fix_last_layers", "interpolate", "force",
}  # fmt: skip
_OURS = _EXPO_ONLY | {"donor", "rounding", "edits"}
"""Keys that only expo's engine understands."""
