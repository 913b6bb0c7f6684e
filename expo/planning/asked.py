"""What a spec asks for that its models cannot give, or that does not mean what it says."""

from collections.abc import Iterator, Mapping, Sequence

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.checkpoint.names import is_embedding
from expo.checkpoint.reference import Reference
from expo.planning.findings import Findings
from expo.planning.values import Values, layer_count
from expo.spec.inputs import KNOWN
from expo.spec.request import Foreign, Request

Opened = Mapping[Reference, Checkpoint]

_ANY_SHAPE = ("passthrough", "moe")
_TINY = 1e-8


def check_asked(request: Request, opened: Opened, donor: Checkpoint, found: Findings) -> None:
    """Refuse layers that do not exist, tables of different heights where only mergekit could refuse them
    later, and weights that add up to 0; warn of weights that normalization takes away."""
    found.refusals += _layers(request, donor)
    if request.foreign is not None:
        found.refusals += dict.fromkeys(_source_layers(request.foreign, opened))
        found.refusals += _tables(request, opened)
    else:
        _weights(request, donor, found)


def _layers(request: Request, donor: Checkpoint) -> Iterator[str]:
    count = layer_count(donor)
    for end, fixed in (("first", request.fixed_first_layers), ("last", request.fixed_last_layers)):
        if fixed > count:
            yield f"fix_{end}_layers: {fixed}, but {donor.label} has {count} layers"
    for edit in (*request.edits, *([request.low_rank] if request.low_rank else [])):
        if edit.layers is not None and edit.layers[1] > count:
            span = f"{edit.layers[0]} {edit.layers[1]}"
            yield f"layers {span}: {donor.label} has {count} layers, 0 to {count - 1}"


def _source_layers(foreign: Foreign, opened: Opened) -> Iterator[str]:
    """Ranges of layers that a model does not have."""
    for text, first, end in _ranges(foreign.spec):
        checkpoint = opened[foreign.models[text]]
        count = layer_count(checkpoint)
        if end > count:
            yield f"layer_range [{first}, {end}]: {checkpoint.label} has {count} layers"


def _ranges(value: object) -> Iterator[tuple[str, int, int]]:
    if isinstance(value, dict):
        span, model = value.get("layer_range"), value.get("model")
        if isinstance(model, dict):
            model = model.get("model")
        if isinstance(span, list) and isinstance(model, str):
            yield model, int(span[0]), int(span[1])
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _ranges(item)


def _tables(request: Request, opened: Opened) -> Iterator[str]:
    """Embeddings that mergekit would find to differ in size after it has read them."""
    assert request.foreign is not None
    if request.foreign.changes_tokenizer or request.method in _ANY_SHAPE:
        return
    models = tuple(opened[reference] for reference in request.references())
    if shapes := tables_differ(models):
        yield f"{shapes}; tokenizer_source: union makes one vocabulary"


def tables_differ(models: Sequence[Checkpoint]) -> str:
    """The first embedding of the first model that another one has in another shape, with both; or nothing."""
    first, *others = models
    for name, weight in first.weights.items():
        for other in others if is_embedding(name) else ():
            theirs = other.weights.get(name)
            if theirs is not None and theirs.shape != weight.shape:
                shapes = (
                    f"{list(weight.shape)} in {first.label}, {list(theirs.shape)} in {other.label}"
                )
                return f"{printable(name)}: {shapes}"
    return ""


def _weights(request: Request, donor: Checkpoint, found: Findings) -> None:
    """Weights that normalization divides by: their sum must not be 0, and one alone is always 1."""
    takes = KNOWN[request.method]
    default = takes.shared.get("normalize")
    if default is None or "weight" not in takes.each or not request.operands:
        return
    values = Values(request, donor)
    for name in donor.weights:
        numbers = range(len(request.operands))
        weights = [values.of_operand(number, "weight", None, name) for number in numbers]
        if None in weights or not values.shared("normalize", default, name):
            continue
        given = [float(weight) for weight in weights if weight is not None]
        if not takes.adds_to_base and abs(sum(given)) < _TINY:
            shown = ", ".join(f"{weight:g}" for weight in given)
            found.refusals.append(
                f"the weights of {printable(name)} add up to 0 ({shown}), and normalize divides by "
                "their sum: change one, or say normalize: false"
            )
            return
        if takes.adds_to_base and len(given) == 1 and given[0] not in (0.0, 1.0):
            found.warnings.append(
                f"normalize divides by the sum of the weights: the only one, {given[0]:g}, counts as 1 "
                "(scale with lambda, or say normalize: false)"
            )
            return
