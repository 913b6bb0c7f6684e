"""Specs of several documents: merges of which later ones may name earlier outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.parsing import shown
from expo.spec.dialect import plain
from expo.spec.read import request_of
from expo.spec.recipes import spec_path
from expo.spec.request import Request
from expo.spec.resolved import resolved
from expo.spec.strict import Document
from expo.spec.surgery import named_models, renamed
from expo.temporary import temporary_folder


@dataclass(frozen=True)
class Stage:
    """One document of several: a merge whose output later ones may name."""

    name: str | None
    document: Document
    beside: Path
    strict: bool = False

    def request(self, outputs: Mapping[str, Path]) -> Request:
        """Its request, with the names of earlier outputs taken for their places.

        Raises:
            SpecError: with one line for every fault.
        """
        return request_of(self.document, beside=self.beside, outputs=outputs, strict=self.strict)

    @property
    def models(self) -> set[str]:
        """The models that it names, without their adapters."""
        return {text.partition("+")[0] for _, text in named_models(plain(self.document.value))}


def read_stages(source: Path, *, strict: bool = False) -> list[Stage]:
    """Every document of a spec, as mergekit-multi has them: all but one are named, and each comes
    after those whose output it takes. The one without a name is the last.

    Raises:
        SpecError: a document is not a spec, a name is missing or given twice, or two need each other.
    """
    path = spec_path(source)
    stages: list[Stage] = []
    documents = Document.read_all(path)
    for document in documents:
        name = document.value.get("name") if isinstance(document.value, dict) else None
        taken = name in [stage.name for stage in stages]
        if taken and name is None:
            raise document.error((), "only one document goes without a name:, the one for OUT")
        if taken or not (name is None or (isinstance(name, str) and Path(name).name == name)):
            raise document.error(("name",), f"{shown(name)} is taken or is not a plain name")
        stages.append(Stage(name, document, path.parent, strict))
    return _ordered(stages) if len(stages) > 1 else stages


def resolved_stages(
    stages: Sequence[Stage], change: Callable[[Request], Request]
) -> list[dict[str, object]]:
    """Every document with its defaults filled in, in the order in which they run. No model is opened.

    Args:
        change: what flags make of a request.

    Raises:
        SpecError: with one line for every fault.
    """
    specs: list[dict[str, object]] = []
    outputs: dict[str, Path] = {}
    with temporary_folder() as temporary:  # a model is known by its place
        for stage in stages:
            spec = resolved(change(stage.request(outputs)))
            names = {str(place): name for name, place in outputs.items()}
            own = {} if stage.name is None else {"name": stage.name}
            specs.append(own | renamed(spec, names))
            if stage.name is not None:
                outputs[stage.name] = temporary / stage.name
                outputs[stage.name].mkdir()
    return specs


def _ordered(stages: list[Stage]) -> list[Stage]:
    """Each after those that it needs; what has no name last, else the order of the file."""
    waiting = sorted(stages, key=lambda stage: stage.name is None)
    ordered: list[Stage] = []
    while waiting:
        unmade = {stage.name for stage in waiting}
        ready = [stage for stage in waiting if not stage.models & (unmade - {stage.name})]
        ready = [stage for stage in ready if stage.name not in stage.models]
        if not ready:
            names = " and ".join(str(stage.name) for stage in waiting if stage.name)
            raise waiting[0].document.error((), f"{names} need each other's output")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered
