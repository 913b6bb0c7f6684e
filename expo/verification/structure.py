"""Checks of what lies in the folder: files, headers, index, and how they compare with the donor's."""

import re
from collections.abc import Callable, Iterator

from expo.checkpoint.checkpoint import INDEX, SINGLE, hash_file, missing_of_series
from expo.checkpoint.code import code_files
from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED, HEADS, INPUTS
from expo.checkpoint.sidecars import (
    CARD,
    MANIFEST,
    PROCESSORS,
    is_apart,
    is_legal,
    is_model_sidecar,
    is_tokenizer_file,
    is_training_state,
    is_weights,
)
from expo.errors import CheckpointError
from expo.verification.altered import why_altered
from expo.verification.check import GONE, MISTAKEN, Check, Info, Skipped, Unchecked, listing
from expo.verification.contents import strangers, together
from expo.verification.subject import BIN, Subject

_SERIES = re.compile(r"model.*\.safetensors(\.index\.json)?")
"""What a loader could take for weights of this model."""

_BESIDE = (MANIFEST, ".gitattributes", ".gitignore")


def weights(s: Subject) -> Iterator[str]:
    if s.index_name is None and not s.weight_files:
        yield f"there is no {SINGLE}, no {INDEX} and no {BIN}"
    missing = missing_of_series(s.weight_files) if s.index_name is None else None
    if missing is not None:
        yield f"{printable(missing)} is missing"


def shards(s: Subject) -> Iterator[str]:
    if not s.weight_files:
        raise Skipped("there are no weight files")
    mistaken = strangers(s)
    faults = {n: f.removeprefix(f"{n} ") for n, f in s.shard_faults.items() if n not in mistaken}
    yield from together(faults)
    if not faults and s.shard_faults:
        raise Skipped(MISTAKEN)


def index(s: Subject) -> Iterator[str]:
    if s.index_name is None:
        if not s.weight_files:
            raise Skipped("there are no weight files")
        return
    raw = s.json(s.index_name).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        yield f"{s.index_name} has no weight_map"
        return
    for name in raw.keys() - s.weight_map.keys():
        yield f"{s.index_name} maps {printable(name)} to something that is no file name"
    for file in sorted(set(s.weight_map.values()) - set(s.weight_files)):
        inside = "" if not (file.startswith("/") or ".." in file) else ", outside of the folder"
        yield f"{s.index_name} names {printable(file)}{inside}, which is missing"
    yield from _unmatched(s)


def _unmatched(s: Subject) -> Iterator[str]:
    """Both directions of the bijection, for the files that can be read."""
    holders: dict[str, list[str]] = {}
    for file, shard in s.shards.items():
        for tensor in shard.tensors:
            holders.setdefault(tensor.name, []).append(file)
    for name, file in s.weight_map.items():
        if file in s.shards and file not in holders.get(name, []):
            yield f"{printable(name)} is not in {file}, where {s.index_name} says it is"
    for name, files in holders.items():
        if name not in s.weight_map:
            yield f"{printable(name)} of {files[0]} is not in {s.index_name}"
        elif len(files) > 1:
            yield f"{printable(name)} is in {' and in '.join(files)}"


def stale_weights(s: Subject) -> Iterator[str]:
    if s.has(SINGLE) and s.has(INDEX):
        named = s.json(INDEX).get("weight_map")
        if not isinstance(named, dict) or set(named.values()) != {SINGLE}:
            yield f"{SINGLE} lies beside {INDEX}: loaders take it and ignore the shards"


def orphans(s: Subject) -> Iterator[str]:
    known = set(s.weight_files) | set(s.weight_map.values()) | {INDEX}
    listed = s.listed
    for name in s.out.sizes:
        if name in known or name in listed or name in _BESIDE or is_apart(name):
            continue
        if is_training_state(name):
            yield Info(f"{printable(name)} was left by training: no loader reads it")
        elif is_weights(name):
            fault = f"{printable(name)} is a weight file that nothing names"
            # Without a manifest, published models have their weights in other formats as well.
            yield fault if listed or _SERIES.fullmatch(name) else Info(fault)
        elif name.endswith((".partial", ".tmp", ".incomplete", ".lock")):
            yield f"{printable(name)} was left by something unfinished"
        elif listed and not (is_tokenizer_file(name) or is_model_sidecar(name)):
            yield f"{printable(name)} is not in the manifest"


def total_size(s: Subject) -> Iterator[str]:
    if s.index_name is None:
        raise Skipped("there is no index")
    metadata = s.json(s.index_name).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(tensor.nbytes for tensor in s.tensors.values())
    if claimed != actual:
        yield f"{s.index_name} says total_size {claimed}, the tensors have {actual} bytes"


def modes(s: Subject) -> Iterator[str]:
    """Whoever may list the folder should be able to read its files."""
    folder = s.folder.stat().st_mode
    for name in filter(s.out.is_local, s.out.sizes):
        mode = s.out.local_path(name).stat().st_mode
        if not mode & 0o400 or folder & 0o044 & ~mode:
            yield f"{printable(name)} has mode {mode & 0o777:04o} in a folder of {folder & 0o777:04o}"


def manifest(s: Subject) -> Iterator[str]:
    """Hashes of what loaders read. Weight files count where they were read anyway."""
    if s.is_fresh:
        raise Skipped(f"{MANIFEST} is written next, with the hashes of the stream")
    if not s.has(MANIFEST):
        raise Skipped(f"there is no {MANIFEST}: the folder was not made by expo")
    try:
        expected = s.read_manifest().files
    except CheckpointError as error:
        yield str(error)
        return
    measured = s.tensor_facts.sha256 if s.tensor_facts else {}
    unread = [n for n in s.weight_files if not (n in measured or n in s.shard_faults)]
    for name, sha256 in expected.items():
        if is_apart(name):
            continue  # earlier manifests list the card here
        if not s.has(name):
            yield f"{printable(name)} is missing"
        elif name in (MANIFEST, *unread):
            continue
        elif (measured.get(name) or hash_file(s.out, name)) != sha256:
            yield f"{printable(name)} {why_altered(s, name, sha256)}"
    extra = {n for n in s.out.sizes if is_tokenizer_file(n) or n.endswith("config.json")}
    yield from (f"{printable(name)} was added later" for name in sorted(extra - expected.keys()))
    if unread:
        yield Info(f"{len(unread)} weight files were not read: their hashes are not checked")


def at_merge(s: Subject) -> Iterator[str]:
    """A folder that its own merge has not verified, and what was found then."""
    if s.manifest is None:
        raise Skipped(f"there is no {MANIFEST} that can be read")
    if s.manifest.verified is None:
        yield Info("nobody verified it when it was merged")
    elif not s.manifest.verified:
        errors = [found for found in s.found_at_merge.values() if found.status == "error"]
        named = listing([f"{found.name}: {found.message.splitlines()[0]}" for found in errors])
        yield f"the merge did not verify{f': {named}' if named else ''}"


def card(s: Subject) -> Iterator[str]:
    if CARD not in s.listed:
        raise Skipped("no manifest that knows a model card")
    if s.has(CARD) and hash_file(s.out, CARD) != s.listed[CARD]:
        yield f"{CARD} was edited since the merge"


def companions(s: Subject) -> Iterator[str]:
    yield from _unlike(s, lambda name: name in PROCESSORS)


def code(s: Subject) -> Iterator[str]:
    """What loading under `trust_remote_code` would import: there, and the aligned model's."""
    files = code_files(s.out)
    for name, by in files.items():
        if not s.has(name):
            fault = f"{printable(by)} names {printable(name)}, which is not there"
            yield Info(fault) if s.loads_by_itself else fault
    if s.aligned is not None:
        theirs = code_files(s.as_donor.out)
        yield from _unlike(s, lambda name: name in theirs)
    elif not files:
        raise Skipped("it brings no code of its own")


def legal(s: Subject) -> Iterator[str]:
    yield from _unlike(s, is_legal)


def _unlike(s: Subject, wanted: Callable[[str], bool]) -> Iterator[str]:
    donor = s.donor.model_files
    for name in sorted(filter(wanted, donor.sizes)):
        if not s.has(name):
            yield f"{printable(name)} is missing"
        elif not is_apart(name) and donor.read(name) != s.out.read(name):
            yield f"{printable(name)} is not the aligned model's"


def codes(s: Subject) -> Iterator[str]:
    """Weights that were only looked at as bytes."""
    if not s.shards:
        raise Skipped("there are no weight files that can be read")
    if s.coded:
        more = f" and {len(s.coded) - 1} more" if len(s.coded) > 1 else ""
        yield Unchecked(
            f"{printable(s.coded[0])}{more}: codes or scales of a quantized model, and what they stand for was not "
            "looked at (NaN, zeros, sizes, the aligned model's)",
            "merge_method: passthrough writes it as bfloat16, which can be checked whole: docs/quantized.md",
        )


def keys(s: Subject) -> Iterator[str]:
    s.refuse_codes()
    theirs = s.donor.weights.keys()
    for name in sorted(theirs - s.tensors.keys()):
        if not (_is_derived(s, name)):
            yield f"{printable(name)} is missing"
    for name in sorted(s.tensors.keys() - theirs):
        if not (_is_derived(s, name)):
            yield f"{printable(name)} is not in the aligned model"


def _is_derived(s: Subject, name: str) -> bool:
    return bool(DERIVED.search(name)) or (name.endswith(HEADS) and s.donor.ties_embeddings)


def shapes(s: Subject) -> Iterator[str]:
    s.refuse_codes()
    for name, weight in s.donor.weights.items():
        mine = s.tensors.get(name)
        if mine is not None and mine.shape != weight.shape:
            shapes = f"{list(mine.shape)}, {list(weight.shape)} in the aligned model"
            yield f"{printable(name)} is {shapes}"


def dtypes(s: Subject) -> Iterator[str]:
    s.refuse_codes()
    for name, weight in s.donor.weights.items():
        mine = s.tensors.get(name)
        if mine is None:
            continue
        asked = s.asked_dtype if weight.dtype in FLOATS else None
        expected = asked or TORCH_NAMES.get(weight.dtype, weight.dtype)
        if (found := TORCH_NAMES.get(mine.dtype, mine.dtype)) != expected:
            said = "was asked for" if asked else "in the aligned model"
            yield f"{printable(name)} is {found}, {expected} {said}"


def tied(s: Subject) -> Iterator[str]:
    """A head beside tied embeddings is ignored by some loaders and read by others."""
    tie = s.config.get("tie_word_embeddings")
    heads = [t for name, t in s.tensors.items() if name.endswith(HEADS)]
    inputs = [t for name, t in s.tensors.items() if name.endswith(INPUTS)]
    generates = any(str(a).endswith("ForCausalLM") for a in s.config.get("architectures") or [])
    if tie is False and inputs and not heads and generates:
        yield "tie_word_embeddings is false, but there is no head: loaders make up a random one"
    if tie and len(heads) == 1 and len(inputs) == 1:
        head, embedding = heads[0], inputs[0]
        if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
            yield f"{head.name} is tied to {embedding.name} but has another shape or dtype"
        elif s.tensor_facts is not None and not _same_bytes(s, head.name, embedding.name):
            yield f"{head.name} is tied to {embedding.name} but holds other values"


def _same_bytes(s: Subject, a: str, b: str, step: int = 1 << 24) -> bool:
    first, second = s.tensors[a], s.tensors[b]
    if not (s.out.is_local(first.file) and s.out.is_local(second.file)):
        raise Skipped(
            f"{GONE}: whether {printable(a)} holds the values of {printable(b)} is not known"
        )

    def part(tensor, at: int) -> bytes:
        stop = min(at + step, tensor.nbytes)
        return s.out.read(tensor.file, tensor.begin + at, tensor.begin + stop)

    return all(part(first, at) == part(second, at) for at in range(0, first.nbytes, step))


_FETCH = "copy or download the file again"
_COMPARE = "compare with the model that it was made from: expo diff"
CHECKS = (
    Check("weights", "error", "there are weights", "run the merge again", weights, "name the folder that holds the weights"),
    Check("shards", "error", "every weight file is whole", "run the merge again", shards, _FETCH),
    Check("index", "error", "index and shards name the same tensors", "run the merge again", index, _FETCH),
    Check("stale-weights", "error", "no other weights get in the way", f"remove {SINGLE}, or the index and its shards", stale_weights),
    Check("orphans", "warning", "nothing lies about", "remove what does not belong to the model", orphans),
    Check("total-size", "warning", "the index knows its size", "correct metadata.total_size", total_size),
    Check("modes", "warning", "who sees the folder can read its files", "chmod a+r the files", modes),
    Check("manifest", "error", "files are those that were written", "restore the files, or run the merge again", manifest),
    Check("at-merge", "warning", "it verified when it was merged", "mend what was found then and run the merge again; --vectors checks vectors again", at_merge),
    Check("card", "info", "the model card is the one that was written", "", card),
    Check("processor-files", "error", "processor configs are the aligned model's", "copy the files from the aligned model", companions),
    Check("code", "error", "the model's own code is there, and is the aligned model's", "copy the .py files from the aligned model", code, "add the .py files that are named"),
    Check("licence", "warning", "licences and notices are the aligned model's", "copy the files from the aligned model", legal),
    Check("codes", "warning", "the weights are numbers, no codes of a quantized model", "", codes),
    Check("keys", "error", "the tensors are those of the aligned model", "run the merge again with this aligned model", keys, _COMPARE),
    Check("shapes", "error", "shapes are those of the aligned model", "run the merge again with this aligned model", shapes, _COMPARE),
    Check("dtypes", "error", "dtypes are those of the aligned model, or as asked", "run the merge again, with --dtype if you want another one", dtypes, _COMPARE),
    Check("tied-weights", "error", "head and embeddings agree with tie_word_embeddings", "set tie_word_embeddings as in the aligned model", tied),
)  # fmt: skip
