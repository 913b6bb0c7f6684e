"""A checkpoint as its headers describe it: every tensor, where it lies, and what is around it."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from expo.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from expo.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from expo.checkpoint.adapter import Adapter, read_adapter
from expo.checkpoint.files import (
    Directory,
    Files,
    Overlay,
    check_contents,
    open_location,
    read_json,
    where,
)
from expo.checkpoint.headers import Shard, TensorInfo, header_bytes, parse_header, printable
from expo.checkpoint.places import fault_of
from expo.checkpoint.quantized import Coding, coding
from expo.checkpoint.reference import Reference
from expo.checkpoint.sidecars import ONE_FILE, is_tokenizer_file
from expo.checkpoint.vocabulary import read_vocabulary
from expo.checkpoint.weight import Weight
from expo.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DEQUANTIZED = "BF16"
"""What the weights of quantized models are written as, unless another dtype is asked for."""
_LISTED = 5  # names in a note before "and N more"
_FIRST_READ_BYTES = 100_000  # holds the header of nearly every shard on the Hub

_FOREIGN = (
    # (pattern over file names, what it is, the cure)
    (r".*\.gguf", "GGUF weights", "name the safetensors original"),
    (r"(.*/)?\.metadata", "a torch distributed checkpoint (DCP)",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR OUT.bin"),
    (r"(.*/)?zero_to_fp32\.py|(.*/)?.*zero_pp_rank.*", "a DeepSpeed ZeRO checkpoint",
     "python zero_to_fp32.py DIR OUT --safe_serialization"),
    (r"(.*/)?pytorch_model_fsdp.*", "an FSDP checkpoint", "accelerate merge-weights DIR OUT"),
    (r"consolidated.*", "weights in the original (consolidated) format",
     "convert them with the model's convert_*_weights_to_hf.py"),
    (r"adapter_model\..*", "a LoRA adapter without its base", "write base+adapter"),
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """One side of a merge. `files` holds weights and configuration, `adapter` changes them.

    `shards` are the files with what is stored in them, `coding` says what of that are codes; `weights` is the model.
    """

    reference: Reference
    files: Files
    shards: tuple[Shard, ...]
    index_metadata: dict
    adapter: Adapter | None = None
    notes: tuple[str, ...] = field(default=())
    index_name: str | None = INDEX
    """What an index of several shards is called; None where they have none."""
    coding: Coding = field(default=Coding())

    @cached_property
    def weights(self) -> dict[str, Weight]:
        return {name: self._weight(name, t) for s in self.shards for name, t in self.held(s)}

    def held(self, shard: Shard) -> Iterator[tuple[str, TensorInfo]]:
        """The weights whose numbers or codes lie in a shard, in its order: (name, what is stored)."""
        for tensor in shard.tensors:
            if tensor.name not in self.coding.beside:
                yield self.coding.name(tensor.name), tensor

    @cached_property
    def config(self) -> dict:
        return read_json(self.files, "config.json") if "config.json" in self.files.sizes else {}

    @property
    def is_of_transformers(self) -> bool:
        """Whether anything says that it is a language model, or another of transformers'."""
        return is_of_transformers(self.files)

    @property
    def ties_embeddings(self) -> bool:
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return bool(self.config.get("tie_word_embeddings", inner))

    @property
    def tokenizer_files(self) -> Files:
        """The adapter's folder where it brings a tokenizer, else the model's."""
        if self.adapter and any(map(is_tokenizer_file, self.adapter.files.sizes)):
            return self.adapter.files
        return self.files

    @cached_property
    def vocabulary(self) -> dict[int, str] | None:
        """Token strings by id, None where no file says.

        Raises:
            TokenizerError: a tokenizer file is damaged.
        """
        return read_vocabulary(self.tokenizer_files)

    @property
    def model_files(self) -> Files:
        """Everything that loads as this model does, an adapter's tokenizer in place of its base's."""
        if self.tokenizer_files is self.files:
            return self.files
        return Overlay(self.files, self.tokenizer_files, is_tokenizer_file)

    @property
    def label(self) -> str:
        return (
            f"{self.files.label}+{self.adapter.files.label}" if self.adapter else self.files.label
        )

    def inputs(self) -> Iterator[tuple[Files, Shard]]:
        """Every weight file that a merge reads."""
        yield from ((self.files, shard) for shard in self.shards)
        if self.adapter:
            yield self.adapter.files, self.adapter.shard

    def _weight(self, name: str, stored: TensorInfo) -> Weight:
        codes = self.coding.codes.get(stored.name)
        dtype = stored.dtype if codes is None else DEQUANTIZED
        if self.adapter is None:
            return Weight(stored, self.files, dtype, codes=codes)
        update = self.adapter.updates.get(name)
        places = None if update is None else self.adapter.files
        whole = self.adapter.replaced.get(name)
        if whole is not None:
            return Weight(whole, self.adapter.files, dtype, update, places)
        return Weight(stored, self.files, dtype, update, places, codes)


def open_checkpoint(reference: Reference, *, streams: bool = False) -> Checkpoint:
    """Read the headers of a model. Hub files are read by range, unless they are in the cache.

    Args:
        streams: read the weights by range as well, when they are needed.

    Raises:
        CheckpointError: no usable weights, a damaged or unsupported file, or codes that are not read.
        HubError: the Hub refuses or is out of reach.
    """
    files = open_location(reference.model, streams=streams)
    names, index_name, notes = _weight_files(files)
    index = {} if index_name is None else read_json(files, index_name)
    if index_name is not None:
        names = _shard_names(files, index_name, index)
    notes = [*_remarks(files), *notes]
    shards = tuple(read_shard(files, name) for name in names)
    if index:
        shards, more = _check_index(files.label, index, shards)
        notes += more
    _refuse_duplicates(files.label, shards)
    checkpoint = Checkpoint(
        reference,
        files,
        shards,
        index.get("metadata") or {},
        notes=tuple(notes),
        index_name=index_name if is_bare(files) else INDEX,
    )
    found = coding(files.label, shards, checkpoint.config)
    checkpoint = replace(checkpoint, coding=found, notes=(*notes, *found.notes))
    if reference.adapter is None:
        return checkpoint
    adapter_files = open_location(reference.adapter, streams=streams)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if name not in adapter_files.sizes:
            raise CheckpointError(f"adapter {adapter_files.label} has no {name}")
    shard = read_shard(adapter_files, ADAPTER_WEIGHTS)
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items()}
    adapter = read_adapter(adapter_files, shard, shapes)
    notes = [*checkpoint.notes, *_remarks(adapter_files)]
    return replace(checkpoint, adapter=adapter, notes=tuple(notes))


def _remarks(files: Files) -> tuple[str, ...]:
    return files.notes if isinstance(files, Directory) else ()


def _weight_files(files: Files) -> tuple[list[str], str | None, list[str]]:
    """The files that transformers would load, in its order of preference, or the name of their index; of a
    model that is none of its, all safetensors files."""
    for single, index_name in (
        (SINGLE, INDEX),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if single in files.sizes:
            stale = index_name in files.sizes
            note = f"{files.label} holds both {single} and {index_name}: {single} is read, as loaders do"
            return [single], None, [note] if stale else []
        if index_name in files.sizes:
            return [], index_name, []
    for pattern, what, cure in _FOREIGN:
        if any(re.fullmatch(pattern, name) for name in files.sizes):
            raise CheckpointError(f"{files.label} holds {what}, which expo does not read: {cure}")
    if is_bare(files):
        names, index_name = bare_weights(files)
        if index_name is None and (missing := missing_of_series(names)):
            raise CheckpointError(
                f"{files.label} has no {printable(missing)}: download the model again"
            )
        return names, index_name, []
    raise CheckpointError(
        f"{files.label} holds no {SINGLE}, {INDEX} or pytorch_model.bin: {_is_it_one(files)}"
    )


def is_of_transformers(files: Files) -> bool:
    """Whether a config.json or a tokenizer says that it is a language model, or another of transformers'."""
    if "config.json" in files.sizes:
        return "_class_name" not in read_json(files, "config.json")  # which is how diffusers has it
    return any(map(is_tokenizer_file, files.sizes))


def is_bare(files: Files) -> bool:
    """Whether it has safetensors files, by whatever name, and nothing else says what it is."""
    return bool(bare_weights(files)[0]) and not is_of_transformers(files)


def bare_weights(files: Files) -> tuple[list[str], str | None]:
    """Every safetensors file at the top, and the one index of them, if there is one."""
    top = sorted(name for name in files.sizes if "/" not in name)
    indices = [name for name in top if name.endswith(f"{ONE_FILE}.index.json")]
    names = [name for name in top if name.endswith(ONE_FILE)]
    return names, indices[0] if len(indices) == 1 else None


def missing_of_series(names: Sequence[str]) -> str | None:
    """The first that is not there of files that count themselves: without an index nothing else tells."""
    for name in names:
        series = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name)
        if series is None:
            continue
        lead, number, of, count, end = series.groups()
        expected = (f"{lead}{n:0{len(number)}d}{of}{count}{end}" for n in range(1, int(count) + 1))
        if missing := next((file for file in expected if file not in names), None):
            return missing
    return None


def _is_it_one(files: Files) -> str:
    """What a directory may be that holds no weights where a model has them."""
    folders = sorted(
        {n.partition("/")[0] for n in files.sizes if n.endswith(ONE_FILE) and "/" in n}
    )
    if folders and "model_index.json" in files.sizes:
        return f"it is a pipeline of several models, name one of them, like {files.label}/{printable(folders[0])}"
    return "is it a model directory?"


def _shard_names(files: Files, index_name: str, index: dict) -> list[str]:
    place = f"{files.label}/{index_name}"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{place} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{place} maps {printable(tensor)} to something that is no name")
    for name in dict.fromkeys(weight_map.values()):
        if fault := fault_of(name):
            raise CheckpointError(f"{place} names a file that {fault}: {printable(name)}")
        if name not in files.sizes:
            raise CheckpointError(
                f"{place} names {printable(name)}, which is missing: download the model again"
            )
    return sorted(set(weight_map.values()))


def read_shard(files: Files, name: str) -> Shard:
    if name.endswith(".bin"):
        check_contents(files, name)
        from expo.checkpoint.pickled import read_pickle

        return read_pickle(files, name)
    size = files.sizes[name]
    place = where(files, name)
    raw = files.read(name, 0, min(size, _FIRST_READ_BYTES))
    end = 8 + header_bytes(raw[:8], place, size)
    if end > len(raw):
        raw += files.read(name, len(raw), end)
    return parse_header(raw[8:end], place, size, name=name)


def _check_index(
    label: str, index: dict, shards: tuple[Shard, ...]
) -> tuple[tuple[Shard, ...], list[str]]:
    """Keep of each shard what the index assigns to it; the index must not name what is absent."""
    weight_map: dict[str, str] = index["weight_map"]
    present = {(tensor.name, shard.file) for shard in shards for tensor in shard.tensors}
    for name, file in weight_map.items():
        if (name, file) not in present:
            raise CheckpointError(
                f"{label}: the index says {printable(name)} is in {file}, it is not"
            )
    elsewhere = [
        (tensor.name, shard.file)
        for shard in shards
        for tensor in shard.tensors
        if weight_map.get(tensor.name, shard.file) != shard.file
    ]
    unlisted = sorted({name for name, _ in present} - weight_map.keys())
    notes = []
    if elsewhere:
        twice = ", ".join(f"{printable(name)} also in {file}" for name, file in elsewhere[:_LISTED])
        notes.append(f"{label}: the index's copies are read: {twice}{_more(elsewhere)}")
    if unlisted:
        count = (
            "a tensor, which is" if len(unlisted) == 1 else f"{len(unlisted)} tensors, which are"
        )
        names = ", ".join(map(printable, unlisted[:_LISTED]))
        notes.append(f"{label}: the index does not list {count} read: {names}{_more(unlisted)}")
    dropped = set(elsewhere)
    kept = tuple(
        Shard(s.file, s.metadata, _without(s.tensors, dropped), s.file_bytes, s.header_sha256)
        for s in shards
    )
    return kept, notes


def _more(names: Sequence[object]) -> str:
    return f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""


def _without(
    tensors: Iterable[TensorInfo], dropped: set[tuple[str, str]]
) -> tuple[TensorInfo, ...]:
    return tuple(tensor for tensor in tensors if (tensor.name, tensor.file) not in dropped)


def _refuse_duplicates(label: str, shards: tuple[Shard, ...]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in seen:
                raise CheckpointError(
                    f"{label}: {printable(tensor.name)} is in {seen[tensor.name]} and in {shard.file}"
                )
            seen[tensor.name] = shard.file


def header_identity(files: Files, shard: Shard) -> dict[str, str | int]:
    """What tells a weight file from a changed one: its Hub hash, or size, mtime and header hash."""
    identity = files.identity(shard.file)
    return identity if "sha256" in identity else identity | {"header_sha256": shard.header_sha256}


def hash_file(files: Files, name: str) -> str:
    """SHA-256 of a whole file."""
    with files.local_path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
