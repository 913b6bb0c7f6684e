"""What a changed file is, by what `expo.json` and the read of the tensors say: more than that its hash differs."""

import hashlib
import math
from collections.abc import Iterator

from expo.checkpoint.files import load_json
from expo.checkpoint.headers import printable
from expo.output.manifest import Manifest
from expo.results import Statistics
from expo.verification.check import listing
from expo.verification.configuration import differing_field
from expo.verification.subject import Subject, Values

_SLACK = 1.05  # beyond what rounding does to a norm

_EDITORS = (
    # (what was done to a text, how it is undone)
    ("its line ends were changed", lambda raw: raw.replace(b"\r\n", b"\n")),
    ("its line ends were changed", lambda raw: raw.replace(b"\n", b"\r\n")),
    ("a line end was added", lambda raw: raw.removesuffix(b"\n")),
    ("its last line end was removed", lambda raw: raw + b"\n"),
    ("a byte order mark was added", lambda raw: raw.removeprefix(b"\xef\xbb\xbf")),
)


def why_altered(s: Subject, name: str, sha256: str) -> str:
    """Why the file of this name no longer has the hash that the merge wrote down."""
    if name in s.shard_faults:
        return s.shard_faults[name].removeprefix(f"{name} ")
    if name in s.shards:
        return _shard(s, name)
    raw = s.out.read(name)
    for what, undone in _EDITORS:
        if hashlib.sha256(undone(raw)).hexdigest() == sha256:
            return f"is not the file that was written: {what}"
    if name.endswith(".json"):
        return _json(s, name)
    return "is not the file that was written: it was edited or replaced"


def _shard(s: Subject, file: str) -> str:
    dtypes = s.manifest.dtypes if s.manifest else ()
    held = [tensor for tensor in s.shards[file].tensors if tensor.name in s.scanned.values]
    other = sorted({t.dtype for t in held} - set(dtypes)) if dtypes else []
    if other:
        return f"was saved again: it holds {', '.join(other)}, the merge wrote {', '.join(dtypes)}"
    named = [f"{printable(t.name)} {found}" for t in held if (found := contradiction(s, t.name))]
    if named:
        return f"was changed: {listing(named)}"
    return "was changed: single values or the header, too few to show in the norm of a tensor"


def _json(s: Subject, name: str) -> str:
    try:
        value = load_json(s.out, name)
    except ValueError:
        return "was edited, and is not JSON any more"
    theirs = s.as_donor.json(name) if s.aligned and s.as_donor.has(name) else {}
    mine = value if isinstance(value, dict) and theirs else {}
    keys = sorted(mine.keys() | theirs.keys()) if mine else []
    found = [fault for key in keys for fault in differing_field(mine, theirs, key)]
    return f"was edited: {listing(found)}" if found else "was edited, or loaded and saved again"


def contradiction(s: Subject, name: str) -> str | None:
    """How a tensor differs from what `expo.json` says of it, None where it does not or nobody knows."""
    stated = s.manifest.tensors.get(name) if s.manifest else None
    if name in s.scanned.nonfinite:
        return "holds NaN or infinite values"
    if stated is None or name not in s.values or stated.elements != s.tensors[name].count:
        return None
    values = s.values[name]
    for what, found, (least, most) in _bounds(s, stated, values):
        if not least / _SLACK <= found <= most * _SLACK:
            nearest = least if found < least else most
            return f"has {what} of {found:.3g}, {nearest:.3g} by expo.json"
    return None


def _is_plain(manifest: Manifest) -> bool:
    special = {"onto", "donor", "transforms", "edits", "slices"}
    return manifest.method == "expo" and special.isdisjoint(manifest.spec)


def _bounds(
    s: Subject, stated: Statistics, values: Values
) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """(what, found, least and most) by the triangle inequality, from ‖Δ‖, ‖θ_sft‖ and α.

    Only of plain ExPO: elsewhere the norm of what Δ was added to is not written down.
    """
    manifest, alpha = s.manifest, stated.alpha
    if manifest is None or not _is_plain(manifest) or alpha is None or not stated.relative_delta:
        return
    step, base = stated.delta_norm, stated.delta_norm / stated.relative_delta
    noise = (stated.rounding_noise or 0.0) * abs(alpha) * step
    moved = abs(alpha) * step + noise
    yield "a norm", values.norm, (max(0.0, base - moved), base + moved)
    if len(manifest.sources) == 2 and values.sums is not None:
        way = abs(alpha - 1) * step
        apart = math.sqrt(values.sums.apart)
        yield "a distance to the aligned model", apart, (max(0.0, way - noise), way + noise)
