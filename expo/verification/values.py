"""Checks of what the tensors hold: alone, and against the aligned model's.

A merge moves every tensor a little, and all of them in the same way. So each is judged against the
rest of the model: by its direction (cosine), its length (ratio of the norms), its largest element.
"""

from collections.abc import Iterator
from statistics import median

from expo.checkpoint.headers import printable
from expo.planning.modules import module_of
from expo.verification.altered import contradiction
from expo.verification.cause import cause
from expo.verification.check import Check, Info, Skipped
from expo.verification.subject import Subject, Sums

_HALF_PRECISION = 65504.0
"""The largest number of float16: a model that was ever run in half precision has none beyond."""

_FEW = 8  # elements: too few to have a direction
_TURNED = 0.5  # 1 − cosine; a merge of related models stays far below, strangers are near 1
_APART = 10  # times what is usual in this model
_LONGER = 4  # times the ratio of norms that is usual in this model
_ALONE = 32  # times the norms in the layers around
_LARGER = 16  # times the aligned model's largest element


def largest(s: Subject) -> Iterator[str]:
    for name, values in s.values.items():
        if values.largest > _HALF_PRECISION and s.tensors[name].count > 1:
            yield f"{printable(name)} holds {values.largest:.3g}, half precision ends at 65504"
    theirs = s.scanned.aligned.values if s.aligned and s.scanned.aligned else {}
    for name, values in theirs.items():
        mine = s.values[name].largest if name in s.values else 0.0
        if 0 < _LARGER * values.largest < mine <= _HALF_PRECISION:
            yield f"{printable(name)} holds {mine:.3g}, the aligned model's largest is {values.largest:.3g}"


def compared(s: Subject) -> dict[str, Sums]:
    """The tensors that were read beside the aligned model's."""
    names = s.donor.weights.keys() & s.values.keys()
    found = {name: s.values[name].sums for name in sorted(names)}
    sums = {name: one for name, one in found.items() if one is not None}
    if not sums:
        raise Skipped("the aligned model's tensors are not on this disk as they are")
    return sums


def coverage(s: Subject) -> Iterator[str]:
    sums = compared(s)
    apart = [name for name in s.values if name not in sums and name in s.donor.weights]
    if left := [name for name in apart if s.tensors[name].count]:
        yield Info(f"not checked against the aligned model: {', '.join(map(printable, left[:3]))} ({len(left)} in all)")  # fmt: skip


def direction(s: Subject) -> Iterator[str]:
    """Tensors that point elsewhere than the aligned model's, while the rest does not."""
    turned = {n: 1 - one.cosine for n, one in compared(s).items() if s.tensors[n].count >= _FEW}
    usual = _usual(turned)
    if usual > _TURNED:
        yield f"most tensors are unlike the aligned model's (cosine {1 - usual:.2f}): another model"
        return
    wrong = [n for n, value in turned.items() if value > max(_TURNED, _APART * usual)]
    for file in {s.tensors[name].file for name in wrong} if len(s.shards) > 1 else ():
        held = [name for name in turned if s.tensors[name].file == file]
        if len(held) > 2 and set(held) <= set(wrong):
            yield f"every tensor of {printable(file)} is unlike the aligned model's: of another model"
            wrong = [name for name in wrong if name not in held]
    for name in wrong:
        why = cause(s, name) or "is unlike the aligned model's"
        yield f"{printable(name)} {why} (cosine {1 - turned[name]:.2f}, {1 - usual:.2f} in the rest)"


def _usual(turned: dict[str, float]) -> float:
    """Of the tenth of the tensors that turned least: most of a model can be in the wrong place."""
    return sorted(turned.values())[len(turned) // 10] if turned else 0.0


def norms(s: Subject) -> Iterator[str]:
    """Against the aligned model's; alone, against what `expo.json` says, and the layers around."""
    if s.aligned is None:
        yield from _norms_alone(s)
        return
    ratios = {name: one.ratio for name, one in compared(s).items() if one.mine and one.theirs}
    usual = median(ratios.values()) if ratios else 1.0
    for name, ratio in ratios.items():
        if not usual / _LONGER <= ratio <= usual * _LONGER:
            yield f"{printable(name)} is {ratio:.3g} times as long as the aligned model's, {usual:.3g} in the rest"


def _norms_alone(s: Subject) -> Iterator[str]:
    stated = s.manifest.tensors if s.manifest else {}
    for name in s.values:
        found = contradiction(s, name) if name in stated else None
        if found is not None and name not in s.scanned.nonfinite:
            yield f"{printable(name)} {found}"
    for name, around in _neighbours(s).items():
        mine = s.values[name].norm
        if name not in stated and not min(around) / _ALONE < mine < max(around) * _ALONE:
            norms = " and ".join(f"{norm:.3g}" for norm in around)
            yield Info(
                f"{printable(name)} has a norm of {mine:.3g}, {norms} in the layers around it"
            )


def _neighbours(s: Subject) -> dict[str, list[float]]:
    """Of every tensor that has them, the norms of the same one in the layer before and after."""
    norms = {name: values.norm for name, values in s.values.items() if values.norm}
    found = {}
    for name in norms:
        layer, module = module_of(name)
        if layer is None or "experts" in module:
            continue
        beside = [name.replace(f".{layer}.", f".{other}.", 1) for other in (layer - 1, layer + 1)]
        around = [norms[other] for other in beside if other in norms]
        if len(around) == len(beside):
            found[name] = around
    return found


def effect(s: Subject) -> Iterator[str]:
    """A merge that changed nothing: with a manifest that says otherwise a fault."""
    distances = [one.distance for one in compared(s).values()]
    if any(distances):
        return
    fault = "every tensor is the aligned model's: alpha had no effect"
    moved = s.manifest.statistics.unmoved_share if s.manifest else None
    yield fault if moved is not None and moved < 1 else Info(fault)


def zero_rows(s: Subject) -> Iterator[str]:
    """Rows of tokens that are in use; against the aligned model, of any token that it has."""
    theirs = s.scanned.aligned.values if s.aligned and s.scanned.aligned else {}
    for name, values in s.values.items():
        rows = set(values.zero_rows)
        if len(rows) == s.tensors[name].shape[0] if s.tensors[name].shape else True:
            continue
        lost = rows - set(theirs[name].zero_rows) if name in theirs else rows & _in_use(s)
        if lost:
            tokens = ", ".join(f"{i} {printable(s.names.get(i, ''))!r}" for i in sorted(lost)[:3])
            yield f"{printable(name)} is zero for {len(lost)} tokens: {tokens}"


def _in_use(s: Subject) -> set[int]:
    """What a plain conversation is made of."""
    return set(s.tokenizer.conversation(s.basics.answered).get("ids", ()))


def repeated(s: Subject) -> Iterator[str]:
    """Matrices that lie in the folder twice, as a layer that was written in the place of another."""
    seen: dict[tuple, str] = {}
    for name, values in s.values.items():
        tensor = s.tensors[name]
        if len(tensor.shape) < 2 or not values.largest:
            continue
        sample = s.out.read(tensor.file, tensor.begin, tensor.begin + min(tensor.nbytes, 4096))
        key = (tensor.shape, tensor.dtype, values.largest, sample)
        if key in seen:
            yield Info(f"{printable(name)} is a copy of {printable(seen[key])}")
        seen.setdefault(key, name)


_AGAIN = "run the merge again, from the files that you meant; compare with expo diff"
_COMPARE = "compare with the model that it was made from: expo diff"
CHECKS = (
    Check("largest", "error", "no value stands out", _AGAIN, largest, _COMPARE),
    Check("direction", "error", "every tensor is near the aligned model's", _AGAIN, direction, _COMPARE),
    Check("norms", "error", "every tensor is about as long as the aligned model's, or as expo.json says", _AGAIN, norms, _COMPARE),
    Check("effect", "error", "the tensors differ from the aligned model's", "run the merge again, with an alpha other than 1", effect, _COMPARE),
    Check("zero-rows", "error", "every token has an embedding", "run the merge again with an aligned model that has these rows", zero_rows, _COMPARE),
    Check("repeated", "info", "no matrix is there twice", "", repeated),
    Check("coverage", "info", "every tensor was compared with the aligned model's", "", coverage),
)  # fmt: skip
