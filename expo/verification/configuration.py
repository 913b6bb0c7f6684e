"""Checks of config.json and generation_config.json, and how they agree with the tokenizer."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from expo.checkpoint.checkpoint import read_json
from expo.checkpoint.headers import printable
from expo.checkpoint.names import INPUTS
from expo.verification.check import Check, Inherited, Skipped
from expo.verification.subject import Subject, same_json

GENERATION = "generation_config.json"

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor",
         "max_position_embeddings", "sliding_window", "attention_window", "original_max_position_embeddings")  # fmt: skip
_IRRELEVANT = {"_name_or_path", "transformers_version", "architectures_version", "use_cache"}
_DTYPES = {"torch_dtype", "dtype"}

Special = Literal["bos", "eos", "pad"]


def json_files(s: Subject) -> Iterator[str]:
    """Every JSON file that a loader would parse."""
    for name in s.out.sizes:
        if name.endswith(".json") and "/" not in name:
            try:
                s.json(name)
            except Skipped:
                yield f"{printable(name)} cannot be read or is no JSON object"


def config(s: Subject) -> Iterator[str]:
    if not s.has("config.json"):
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
    mine, theirs = s.config, s.donor.config
    for key in sorted(mine.keys() | theirs.keys()):
        if key in _IRRELEVANT or key in without or (only and key not in only):
            continue
        if same_json(mine.get(key), theirs.get(key)) or _is_intended(s, key):
            continue
        values = f"{_shown(mine.get(key))}, {_shown(theirs.get(key))} in the aligned model"
        yield f"{printable(key)} is {values}"


def _is_intended(s: Subject, key: str) -> bool:
    """What a merge changes on purpose: the dtype that was asked for, the rows that are there."""
    if key in _DTYPES:
        return s.asked_dtype is not None and s.config.get(key) == s.asked_dtype
    if key == "vocab_size":
        embedding = [w for name, w in s.donor.weights.items() if name.endswith(INPUTS)]
        return any(s.config.get(key) == weight.shape[0] for weight in embedding)
    return False


def _shown(value: object) -> str:
    return "not set" if value is None else printable(str(value), 60)


def vocabulary_rows(s: Subject) -> Iterator[str]:
    rows = embedding_rows(s)
    text = s.config.get("text_config")
    size = s.config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    if size is not None and rows is not None and size != rows:
        yield f"config.json says vocab_size {size}, the embedding has {rows} rows"


def embedding_rows(s: Subject) -> int | None:
    found = [t.shape[0] for name, t in s.tensors.items() if name.endswith(INPUTS) and t.shape]
    return found[0] if len(found) == 1 else None


def layers(s: Subject) -> Iterator[str]:
    claimed = s.config.get("num_hidden_layers")
    parts = [name.split(".") for name in s.tensors]
    pairs = [pair for part in parts for pair in pairwise(part)]
    numbers = {int(number) for word, number in pairs if word == "layers" and number.isdigit()}
    if isinstance(claimed, int) and numbers and max(numbers) + 1 < claimed:
        yield f"config.json says num_hidden_layers {claimed}, the weights have {max(numbers) + 1}"


def generation_config(s: Subject) -> Iterator[str]:
    """Against the donor's: it decides how the model answers."""
    theirs = s.donor.files
    if GENERATION not in theirs.sizes:
        if s.has(GENERATION):
            yield f"there is a {GENERATION}, the aligned model has none"
        return
    if not s.has(GENERATION):
        yield f"there is no {GENERATION}, the aligned model has one"
        return
    if theirs.read(GENERATION) != s.out.read(GENERATION):
        yield f"{GENERATION} is not the aligned model's"


def resavable(s: Subject) -> Iterator[str]:
    if not s.has(GENERATION):
        raise Skipped(f"there is no {GENERATION}")
    line = s.reports.load.first("generation_config") if s.reports.load else None
    if line is None:
        raise Skipped("it was not loaded")
    if line["generation_config"] is not None:
        yield f"{GENERATION} cannot be saved again: {printable(line['generation_config'], 300)}"


def ids_in(config: dict, name: Special) -> set[int]:
    """The ids that a configuration gives for a special token: one, several, or none."""
    text = config.get("text_config")
    inner = text.get(f"{name}_token_id") if isinstance(text, dict) else None
    value = config.get(f"{name}_token_id", inner)
    values = value if isinstance(value, list) else [value]
    return {item for item in values if isinstance(item, int)}


def special_ids(s: Subject, name: Special) -> dict[str, set[int]]:
    """Who says which ids a special token has; those that say nothing are left out."""
    places = {"config.json": ids_in(s.config, name), GENERATION: ids_in(s.json(GENERATION), name)}
    own = s.tokenizer.facts[name]
    places["the tokenizer"] = set() if own is None else {own}
    return {place: ids for place, ids in places.items() if ids}


def _agreement(s: Subject, name: Special) -> Iterator[str]:
    """The tokenizer's id has to be among those of either configuration."""
    said = special_ids(s, name)
    own = said.pop("the tokenizer", None)
    if own is None:
        first, *rest = [*said.items()] or [("", set())]
        wrong = [place for place, ids in rest if not ids & first[1]]
    else:
        wrong = [place for place, ids in said.items() if not own & ids]
    if not wrong:
        return
    shown = ", ".join(f"{place} {_numbers(ids)}" for place, ids in special_ids(s, name).items())
    fault = f"{name.upper()} differs: {shown}"
    yield Inherited(fault) if _donor_says_the_same(s, name) else fault


def _donor_says_the_same(s: Subject, name: Special) -> bool:
    if s.aligned is None or s.reports.aligned is None:
        return False
    generation = s.aligned.files
    theirs = read_json(generation, GENERATION) if GENERATION in generation.sizes else {}
    return (
        ids_in(s.config, name) == ids_in(s.aligned.config, name)
        and ids_in(s.json(GENERATION), name) == ids_in(theirs, name)
        and s.tokenizer.facts[name] == s.donor_tokenizer.facts[name]
    )


def _numbers(ids: set[int]) -> str:
    return " or ".join(map(str, sorted(ids)))


CHECKS = (
    Check("json", "error", "every JSON file can be read", "copy the file from the aligned model again", json_files),
    Check("config", "error", "config.json names its model", "copy config.json from the aligned model", config),
    Check("architecture", "error", "config.json is the aligned model's", "copy config.json from the aligned model", architecture),
    Check("rope", "error", "positions are the aligned model's", "copy config.json from the aligned model", rope),
    Check("vocabulary-rows", "error", "vocab_size is the number of embedding rows", "correct vocab_size in config.json", vocabulary_rows),
    Check("layers", "error", "there are as many layers as config.json says", "correct num_hidden_layers, or run the merge again", layers),
    Check("generation-config", "error", "the generation config is the aligned model's", f"copy {GENERATION} from the aligned model", generation_config),
    Check("generation-config-saves", "warning", "the generation config can be saved again", "set do_sample: true, or remove the sampling options", resavable),
    Check("eos", "error", "everyone agrees on EOS", "copy config and tokenizer files from the aligned model", lambda s: _agreement(s, "eos")),
    Check("bos", "error", "everyone agrees on BOS", "copy config and tokenizer files from the aligned model", lambda s: _agreement(s, "bos")),
    Check("pad", "warning", "everyone agrees on PAD", "copy config and tokenizer files from the aligned model", lambda s: _agreement(s, "pad")),
)  # fmt: skip
