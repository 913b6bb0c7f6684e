"""From a spec to a request: references parsed, parameters checked against the method, α in one form."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from expo.checkpoint.names import KINDS
from expo.checkpoint.reference import Reference, parse_reference
from expo.errors import SpecError
from expo.operators.methods import IN_MERGEKIT, METHODS, TRANSFORMS, WITHOUT_EFFECT, Method
from expo.operators.rules import RULES
from expo.spec.recipes import spec_path, vectors_path
from expo.spec.request import (
    Foreign,
    MatrixEdit,
    Operand,
    Request,
    Slice,
    Transform,
    matrix_edit,
    resolve_alpha,
)
from expo.spec.schema import MergeSpec, Model, SliceOf, Source
from expo.spec.settings import Setting, Settings, is_number, mapped, parse_setting
from expo.spec.source import Path_
from expo.spec.strict import Document, nearest
from expo.spec.surgery import named_models, renamed, surgery

Spec = Mapping[str, object] | str | PathLike[str] | Request
"""A mapping of a spec's form, a YAML file or a recipe's name, or a request that is already made."""


def read_request(spec: Spec) -> Request:
    """The request that a spec stands for. Raises as `read_spec`."""
    if isinstance(spec, Request):
        return spec
    return read_spec(spec if isinstance(spec, Mapping) else Path(spec))


def read_spec(source: Path | str | Mapping[str, object]) -> Request:
    """A request from a YAML file, from a recipe's name, or from a mapping of the same form.

    Raises:
        SpecError: with one line for every fault.
    """
    if isinstance(source, Mapping):
        return _Reader(Document(dict(source), "spec")).request()
    path = spec_path(Path(source))
    return _Reader(Document.read(path), beside=path.parent).request()


@dataclass(frozen=True)
class Stage:
    """One document of several: a merge whose output later ones may name."""

    name: str | None
    document: Document
    beside: Path

    def request(self, outputs: Mapping[str, Path]) -> Request:
        """Its request, with the names of earlier outputs taken for their places.

        Raises:
            SpecError: with one line for every fault.
        """
        return _Reader(self.document, self.beside, outputs).request()


def read_stages(source: Path) -> list[Stage]:
    """Every document of a spec, as mergekit-multi has them: all but the last are named.

    Raises:
        SpecError: a document is not a spec, or a name is missing or given twice.
    """
    path = spec_path(source)
    stages = []
    documents = Document.read_all(path)
    for number, document in enumerate(documents):
        name = document.value.get("name") if isinstance(document.value, dict) else None
        if name is None and number < len(documents) - 1:
            raise document.error((), "every document but the last needs a name:")
        taken = name in [stage.name for stage in stages]
        if name is not None and (taken or not isinstance(name, str) or Path(name).name != name):
            raise document.error(("name",), f"{name!r} is taken or is not a plain name")
        stages.append(Stage(name, document, path.parent))
    return stages


@dataclass
class _Reader:
    """One document on its way to a request."""

    document: Document
    beside: Path | None = None
    outputs: Mapping[str, Path] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def request(self) -> Request:
        spec = self.document.validate(MergeSpec)
        method = METHODS.get(spec.merge_method)
        if method is None and spec.merge_method not in IN_MERGEKIT:
            known = nearest(spec.merge_method, [*METHODS, *IN_MERGEKIT])
            fault = f"{spec.merge_method!r} is not a method of expo or mergekit{known}"
            self.document.fault(("merge_method",), fault)
            self.document.check()
        if reasons := tuple(surgery(spec)):
            return self._foreign(spec, reasons)
        assert method is not None
        base = self._reference(spec.base_model, ("base_model",))
        slices = self._slices(spec, method, base)
        if spec.tokenizer_source is not None and spec.merge_method == "expo":
            fault = "the tokenizer is the aligned model's, byte for byte: name another with donor:"
            self.document.fault(("tokenizer_source",), fault)
        if spec.merge_method != "expo":
            self._refuse_expo_keys(spec)
        donor, onto = (self._reference(getattr(spec, key), (key,)) for key in ("donor", "onto"))
        request = Request(
            slices,
            spec.merge_method,
            base,
            onto,
            donor,
            self._settings(spec.parameters, ("parameters",), spec, method),
            self._transforms(spec),
            self._low_rank(spec),
            self._edits(spec),
            self._kinds(spec.exclude),
            spec.fix_first_layers,
            spec.fix_last_layers,
            dtype=spec.out_dtype or spec.dtype,
            rounding=spec.rounding,
            seed=spec.seed,
            remarks=(*self.remarks, *([spec.warning] if spec.warning else [])),
            vectors=self._vectors(spec),
            stop_at=spec.verify.stop_at if spec.verify else "error",
        )
        self._check_models(request, method, spec)
        self.document.check()
        return request

    def _foreign(self, spec: MergeSpec, reasons: tuple[str, ...]) -> Request:
        """A request for mergekit's engine. Nothing of ours goes with it."""
        for key in sorted(spec.model_fields_set & _OURS):
            self.document.fault((key,), f"does not go with mergekit's engine ({reasons[0]})")
        if spec.merge_method == "expo":
            self.document.fault(("merge_method",), f"expo does not go with it: {reasons[0]}")
        assert isinstance(self.document.value, dict)
        own = _OURS | {"seed", "verify", "warning", "name"}
        places = {name: str(place) for name, place in self.outputs.items()}
        raw = renamed({k: v for k, v in self.document.value.items() if k not in own}, places)
        models = {text: self._reference(text, path) for path, text in named_models(raw)}
        if not models:
            self.document.fault((), "names no model")
        vectors = self._vectors(spec)
        self.document.check()
        known = {text: reference for text, reference in models.items() if reference is not None}
        changes = bool(spec.tokenizer or spec.tokenizer_source or spec.chat_template)
        return Request(
            (Slice(tuple(Operand(reference) for reference in dict.fromkeys(known.values()))),),
            spec.merge_method,
            known.get(str(raw.get("base_model"))),
            dtype=spec.out_dtype or spec.dtype,
            seed=spec.seed,
            remarks=(spec.warning,) if spec.warning else (),
            vectors=vectors,
            stop_at=spec.verify.stop_at if spec.verify else "error",
            foreign=Foreign(raw, known, reasons, changes),
        )

    def _reference(self, text: str | None, path: Path_) -> Reference | None:
        if text is None:
            return None
        place = str(self.outputs.get(text, text))
        return self.document.attempt(path, lambda: parse_reference(place, role=str(path[-1])))

    def _slices(self, spec: MergeSpec, method: Method, base: Reference | None) -> tuple[Slice, ...]:
        if (spec.models is None) == (spec.slices is None):
            self.document.fault(("models",), "give either models or slices")
            return (Slice(()),)
        if spec.models is not None:
            return (Slice(self._operands(spec.models, ("models",), spec, method, base)),)
        assert spec.slices is not None
        return tuple(self._slice(s, n, spec, method, base) for n, s in enumerate(spec.slices))

    def _slice(
        self, slice_: SliceOf, number: int, spec: MergeSpec, method: Method, base: Reference | None
    ) -> Slice:
        path: Path_ = ("slices", number)
        first, end = slice_.sources[0].layer_range
        operands = self._operands(slice_.sources, (*path, "sources"), spec, method, base)
        settings = self._settings(slice_.parameters, (*path, "parameters"), spec, method)
        return Slice(operands, settings, (first, end))

    def _operands(
        self,
        models: Iterable[Model | Source],
        path: Path_,
        spec: MergeSpec,
        method: Method,
        base: Reference | None,
    ) -> tuple[Operand, ...]:
        """The models in their order; the base is one of them where the method says so."""
        operands = []
        for number, model in enumerate(models):
            reference = self._reference(model.model, (*path, number, "model"))
            where: Path_ = (*path, number, "parameters")
            settings = self._settings(model.parameters, where, spec, method)
            for key in settings.keys() & method.shared.keys() - method.each.keys():
                told = self.document.at(
                    (*where, key), "has no effect on one model: put it under the"
                )
                self.remarks.append(f"{told} spec's own parameters")
            if reference is not None and (reference != base or method.base == "operand"):
                operands.append(Operand(reference, settings))
        if (
            method.base == "operand"
            and base is not None
            and base not in [o.reference for o in operands]
        ):
            operands.append(Operand(base))
        return tuple(operands)

    def _settings(
        self, parameters: Mapping[str, object] | None, path: Path_, spec: MergeSpec, method: Method
    ) -> Settings:
        settings: dict[str, Setting] = {}
        known = {**method.each, **method.shared}
        for key, value in (parameters or {}).items():
            if key == "paper_alpha" and spec.merge_method == "expo":
                continue
            if key not in known:
                self._unknown_parameter(key, (*path, key), spec.merge_method, known)
                continue
            setting = self._setting(value, (*path, key))
            if setting is not None:
                settings[key] = setting
        if spec.merge_method == "expo":
            self._alpha(dict(parameters or {}), settings, path, spec)
        return settings

    def _unknown_parameter(
        self, key: str, path: Path_, method: str, known: Mapping[str, object]
    ) -> None:
        others = [name for name, m in METHODS.items() if key in m.each or key in m.shared]
        if key in WITHOUT_EFFECT:
            self.remarks.append(self.document.at(path, "has no effect here"))
        elif others and method != "expo":
            self.remarks.append(
                self.document.at(path, f"{method} ignores it ({others[0]} takes it)")
            )
        else:
            names = [*known, *(["paper_alpha"] if method == "expo" else [])]
            every = [name for m in METHODS.values() for name in (*m.each, *m.shared)]
            close = nearest(key, names) or nearest(key, every)
            self.document.fault(path, f"is not a parameter of {method}{close}")

    def _alpha(
        self, given: dict[str, object], settings: dict[str, Setting], path: Path_, spec: MergeSpec
    ) -> None:
        """α from either convention; every single value of a gradient or filter is one."""
        if "alpha" in given and "paper_alpha" in given:
            self.document.fault(
                path, "give alpha or paper alpha, not both (alpha = paper alpha + 1)"
            )
            return
        key = "paper_alpha" if "paper_alpha" in given else "alpha"
        setting = settings.get("alpha") if key == "alpha" else None
        if key == "paper_alpha":
            setting = self._setting(given[key], (*path, key))
        if setting is None:
            return

        def convert(value: float) -> float:
            pair = (value, None) if key == "alpha" else (None, value)
            alpha = resolve_alpha(*pair, interpolate=spec.interpolate or not is_number(setting))
            assert alpha is not None
            return alpha

        converted = self.document.attempt((*path, key), lambda: mapped(setting, convert))
        if converted is not None:
            settings["alpha"] = converted

    def _setting(self, value: object, path: Path_) -> Setting | None:
        try:
            return parse_setting(value)
        except SpecError as error:
            self.document.fault(path, str(error))
            return None

    def _transforms(self, spec: MergeSpec) -> tuple[Transform, ...]:
        if len(spec.transforms or []) > 1:
            self.document.fault(("transforms", 1), "one transform at a time")
        return tuple(
            Transform(name, self._transform(name, parameters, path))
            for name, parameters, path in self._named("transforms", [*TRANSFORMS, _LOW_RANK], spec)
            if name != _LOW_RANK
        )

    def _low_rank(self, spec: MergeSpec) -> MatrixEdit | None:
        for name, parameters, path in self._named("transforms", None, spec):
            if name == _LOW_RANK:
                return self._matrix_edit(parameters, ("keep", "target", "layers", "force"), path)
        return None

    def _edits(self, spec: MergeSpec) -> tuple[MatrixEdit, ...]:
        edits = (
            self._matrix_edit(parameters, ("keep", "target", "layers"), path)
            for _, parameters, path in self._named("edits", [_LASER], spec)
        )
        return tuple(edit for edit in edits if edit is not None)

    def _named(
        self, key: str, known: list[str] | None, spec: MergeSpec
    ) -> Iterator[tuple[str, Mapping[str, object], Path_]]:
        """(name, parameters, place) of every entry {name: {parameters}} below `key`.

        What has no name, or none of those `known`, is left out, and a fault if they are given.
        """
        for number, entry in enumerate(getattr(spec, key) or []):
            path: Path_ = (key, number)
            name, parameters = next(iter(entry.items()), ("", None))
            if known is None or (len(entry) == 1 and name in known):
                yield name, parameters or {}, (*path, name)
            elif len(entry) != 1:
                example = "{dare: {density: 0.5}}" if key == "transforms" else "{laser: {keep: gd}}"
                fault = f"needs one name and its parameters, such as {example}"
                self.document.fault(path, fault)
            else:
                fault = f"{name!r} is not {_AN[key]}{nearest(name, known)}"
                self.document.fault(path, fault)

    def _matrix_edit(
        self, parameters: Mapping[str, object], known: tuple[str, ...], path: Path_
    ) -> MatrixEdit | None:
        for key in parameters.keys() - set(known):
            fault = f"is not a parameter of {path[-1]}{nearest(key, list(known))}"
            self.document.fault((*path, key), fault)
        keep, target, layers, force = (
            parameters.get(key) for key in ("keep", "target", "layers", "force")
        )
        if keep is None:
            self.document.fault(path, f"needs keep: {RULES}")
            return None
        return self.document.attempt(
            path,
            lambda: matrix_edit(str(keep), target=target, layers=layers, force=force),
        )

    def _transform(
        self, name: str, parameters: Mapping[str, object], path: Path_
    ) -> dict[str, bool | float]:
        settings: dict[str, bool | float] = {}
        for key, value in parameters.items():
            if key not in TRANSFORMS[name].each:
                fault = f"is not a parameter of {name}{nearest(key, list(TRANSFORMS[name].each))}"
                self.document.fault((*path, key), fault)
            elif not isinstance(value, bool | int | float):
                self.document.fault((*path, key), f"is a number, not {value!r}")
            else:
                settings[key] = value
        for key, default in TRANSFORMS[name].each.items():
            if default is None and key not in parameters:
                self.document.fault(path, f"needs {key}")
        return settings

    def _vectors(self, spec: MergeSpec) -> Path | None:
        if spec.verify is None or spec.verify.vectors is None:
            return None
        path = vectors_path(spec.verify.vectors, self.beside)
        if not path.is_file():
            self.document.fault(("verify", "vectors"), f"{spec.verify.vectors} is no file")
        return path

    def _kinds(self, kinds: list[str]) -> tuple[str, ...]:
        for number, kind in enumerate(kinds):
            if kind not in KINDS:
                fault = f"{kind!r} is not one of {', '.join(KINDS)}{nearest(kind, list(KINDS))}"
                self.document.fault(("exclude", number), fault)
        return tuple(kinds)

    def _refuse_expo_keys(self, spec: MergeSpec) -> None:
        for key in sorted(spec.model_fields_set & _EXPO_ONLY):
            self.document.fault((key,), f"belongs to merge_method expo, not {spec.merge_method}")

    def _check_models(self, request: Request, method: Method, spec: MergeSpec) -> None:
        if not self.document.is_sound:
            return  # what follows would only be consequences
        least, most = method.models
        count = len(request.operands)
        where: Path_ = ("models",) if spec.models is not None else ("slices",)
        if method.base == "required" and request.base is None:
            self.document.fault(("base_model",), f"is required by {request.method}")
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            beside = " beside the base" if method.base == "required" else ""
            plural = "s" if least != 1 else ""
            self.document.fault(
                where, f"{request.method} takes {wanted} model{plural}{beside}, not {count}"
            )
        if request.method == "expo" and not request.gives_alpha and count:
            path = (*where, 0, "parameters") if spec.models is not None else where
            self.document.fault(path, "needs alpha or paper_alpha")
        if request.onto is not None and request.donor is None:
            fault = "whose tokenizer and template? Say donor: with one of the models"
            self.document.fault(("onto",), fault)


_LOW_RANK, _LASER = "low_rank", "laser"
_AN = {"transforms": "a transform", "edits": "an edit"}

_EXPO_ONLY = {
    "onto", "transforms", "exclude", "fix_first_layers", "fix_last_layers", "interpolate",
}  # fmt: skip
_OURS = _EXPO_ONLY | {"donor", "rounding", "edits"}
"""Keys that only expo's engine understands."""
