"""Checks of config.json: can it be read, is it the aligned model's, do the tensors agree with it."""

from collections.abc import Iterator
from itertools import pairwise

from expo.checkpoint.code import auto_map_entries
from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.files import load_json
from expo.checkpoint.headers import printable
from expo.checkpoint.names import INPUTS
from expo.checkpoint.quantized import without_quantization
from expo.checkpoint.sidecars import MANIFEST
from expo.errors import CheckpointError
from expo.verification.check import Check, Skipped
from expo.verification.subject import Subject, same_json

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor",
         "max_position_embeddings", "sliding_window", "attention_window", "original_max_position_embeddings")  # fmt: skip
_IRRELEVANT = {"_name_or_path", "transformers_version", "architectures_version"}
_DTYPES = ("torch_dtype", "dtype")
_OBJECTS = ("config.json", ".index.json", MANIFEST)
"""How the names of files end that have to hold a JSON object; any other may hold any JSON."""


def json_files(s: Subject) -> Iterator[str]:
    """Every JSON file that a loader would parse."""
    names = [name for name in s.out.sizes if name.endswith(".json") and "/" not in name]
    if not names:
        raise Skipped("there is no JSON file")
    for name in names:
        try:
            value = load_json(s.out, name)
        except ValueError:
            yield f"{printable(name)} is not JSON"
            continue
        except CheckpointError as error:
            yield str(error)
            continue
        if not isinstance(value, dict) and name.endswith(_OBJECTS):
            yield f"{printable(name)} holds no JSON object"


def config(s: Subject) -> Iterator[str]:
    if not (s.has("config.json") or s.is_bare):
        yield "there is no config.json"
        return
    for key in ("model_type", "architectures"):
        if not s.config.get(key):
            yield f"config.json names no {key}"


def architecture(s: Subject) -> Iterator[str]:
    yield from _differences(s, without=_ROPE)


def rope(s: Subject) -> Iterator[str]:
    yield from _differences(s, only=_ROPE)


def _differences(
    s: Subject, *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Iterator[str]:
    """Fields of config.json that a loader would read differently from the aligned model's."""
    mine, theirs = s.json("config.json") or s.config, s.donor.config
    if s.donor.coding.codes and not s.coded:
        theirs = without_quantization(theirs)
    keys = {key for key in mine.keys() | theirs.keys() if not only or key in only}
    for key in sorted(keys - set(without)):
        if not _is_intended(s, key):
            yield from differing_field(mine, theirs, key)


def differing_field(mine: dict, theirs: dict, key: str) -> Iterator[str]:
    if key not in _IRRELEVANT and not same_json(mine.get(key), theirs.get(key)):
        values = f"{_shown(mine.get(key))}, {_shown(theirs.get(key))} in the aligned model"
        yield f"{printable(key)} is {values}"


def _is_intended(s: Subject, key: str) -> bool:
    """What a merge changes on purpose: the dtype that was asked for, the rows that are there."""
    if key in _DTYPES:
        asked = s.asked_dtype is not None and s.config.get(key) == s.asked_dtype
        return asked or bool(s.donor.coding.codes)  # what the tensors are, another check says
    if key == "vocab_size":
        embedding = [w for name, w in s.donor.weights.items() if name.endswith(INPUTS)]
        return any(s.config.get(key) == weight.shape[0] for weight in embedding)
    return False


def _shown(value: object) -> str:
    return "not set" if value is None else printable(str(value), 60)


def same_config(s: Subject) -> bool:
    """Whether transformers builds the same model as from the aligned model's config."""
    return s.aligned is not None and not any(_differences(s))


def dtype(s: Subject) -> Iterator[str]:
    """Loaders cast to what the config says."""
    said = next((s.text_config(key) for key in _DTYPES if s.text_config(key)), None)
    held = {t.dtype: 0 for t in s.tensors.values() if t.dtype in FLOATS}
    for tensor in s.tensors.values():
        if tensor.dtype in held:
            held[tensor.dtype] += tensor.nbytes
    if said not in TORCH_NAMES.values() or not held:
        raise Skipped("config.json states no dtype" if said is None else "no tensor holds floats")
    most = TORCH_NAMES[max(held, key=held.__getitem__)]
    if said != most:
        yield f"config.json says {said}, most of the weights are {most}: loaders cast them"


def vocabulary_rows(s: Subject) -> Iterator[str]:
    size = s.text_config("vocab_size")
    if size is None or s.rows is None:
        raise Skipped("config.json states no vocab_size, or there is no one input embedding")
    if size != s.rows:
        yield f"config.json says vocab_size {size}, the embedding has {s.rows} rows"


def layers(s: Subject) -> Iterator[str]:
    claimed = s.text_config("num_hidden_layers")
    parts = [name.split(".") for name in s.tensors]
    pairs = [pair for part in parts for pair in pairwise(part)]
    numbers = {int(number) for word, number in pairs if word == "layers" and number.isdigit()}
    if not isinstance(claimed, int) or not numbers:
        raise Skipped("config.json states no num_hidden_layers, or the tensors name no layers")
    if max(numbers) + 1 < claimed:
        yield f"config.json says num_hidden_layers {claimed}, the weights have {max(numbers) + 1}"


def remote_code(s: Subject) -> Iterator[str]:
    """`auto_map` entries are run under trust_remote_code: `repo--file.Class` from another repository."""
    for name, entry in auto_map_entries(s.out):
        if "--" in entry:
            yield f"{name} takes code from another repository: {printable(entry)}"


CHECKS = (
    Check("json", "error", "every JSON file can be read", "copy the file from the aligned model again", json_files, "copy or download the file again"),
    Check("config", "error", "config.json names its model", "copy config.json from the aligned model", config, "copy config.json from the model that it was made from"),
    Check("architecture", "error", "config.json is the aligned model's", "copy config.json from the aligned model", architecture),
    Check("rope", "error", "positions are the aligned model's", "copy config.json from the aligned model", rope),
    Check("config-dtype", "warning", "config.json states the dtype that the weights have", "correct dtype (torch_dtype) in config.json", dtype),
    Check("vocabulary-rows", "error", "vocab_size is the number of embedding rows", "correct vocab_size in config.json", vocabulary_rows),
    Check("layers", "error", "there are as many layers as config.json says", "correct num_hidden_layers, or run the merge again", layers, "correct num_hidden_layers, or copy the weights again"),
    Check("remote-code", "warning", "no code is taken from another repository", "copy the .py files here and name them in auto_map", remote_code),
)  # fmt: skip
