"""Checks of how `generate()` will behave: where it stops, how far it goes, what it keeps.

`generate()` reads generation_config.json where there is one, else config.json. What it does not
read can contradict it without harm, and is information.
"""

from collections.abc import Iterator
from typing import Literal

from expo.checkpoint.headers import printable
from expo.verification.check import Check, Info, Skipped
from expo.verification.configuration import differing_field
from expo.verification.subject import Subject

GENERATION = "generation_config.json"

Special = Literal["bos", "eos", "pad"]


def source(s: Subject) -> str:
    """The file that `generate()` takes its settings from."""
    return GENERATION if s.has(GENERATION) else "config.json"


def stops(s: Subject) -> set[int]:
    """The ids at which `generate()` stops."""
    return _ids(s, source(s), "eos")


def eos(s: Subject) -> Iterator[str]:
    if not s.generates:
        raise Skipped("the model does not generate")
    ids = stops(s)
    if not ids:
        yield f"{source(s)} names no eos_token_id: generate() never stops"
    elif s.rows is not None and min(ids) >= s.rows:
        yield f"EOS of {source(s)} is {_numbers(ids)}, the embedding has {s.rows} rows: generate() never stops"
    else:
        yield from _disagreement(s, "eos")


def _disagreement(s: Subject, name: Special) -> Iterator[str]:
    """Places that share no id for a special token; `generate()` sees only one of them."""
    said = {place: _ids(s, place, name) for place in ("config.json", GENERATION)}
    own = s.tokenizer.facts[name]
    said["the tokenizer"] = set() if own is None else {own}
    said = {place: ids for place, ids in said.items() if ids}
    if said and not set.intersection(*said.values()):
        shown = ", ".join(f"{place} {_numbers(ids)}" for place, ids in said.items())
        yield Info(f"{name.upper()} differs: {shown}")


def _ids(s: Subject, place: str, name: Special) -> set[int]:
    """The ids that a file gives for a special token: one, several, or none."""
    key = f"{name}_token_id"
    value = s.text_config(key) if place == "config.json" else s.json(place).get(key)
    values = value if isinstance(value, list) else [value]
    return {item for item in values if isinstance(item, int) and item >= 0}


def _numbers(ids: set[int]) -> str:
    return " or ".join(map(str, sorted(ids)))


def generation_config(s: Subject) -> Iterator[str]:
    """Against the donor's: it decides how the model answers."""
    theirs, mine = s.as_donor.has(GENERATION), s.has(GENERATION)
    if mine != theirs:
        other = "the aligned model has " + ("one" if theirs else "none")
        yield f"there is {'a' if mine else 'no'} {GENERATION}, {other}"
    elif mine:
        mine, theirs = s.json(GENERATION), s.as_donor.json(GENERATION)
        for key in sorted(mine.keys() | theirs.keys()):
            yield from differing_field(mine, theirs, key)


def resavable(s: Subject) -> Iterator[str]:
    if not s.has(GENERATION):
        raise Skipped(f"there is no {GENERATION}")
    line = s.reports.load.first("generation_config") if s.reports.load else None
    if line is None:
        raise Skipped("it was not loaded")
    if line["generation_config"] is not None:
        fault = f"{GENERATION} cannot be saved again: {printable(line['generation_config'], 300)}"
        shared = s.aligned is not None and not any(generation_config(s))
        yield Info(fault) if shared else fault


def length(s: Subject) -> Iterator[str]:
    """`max_length` counts the prompt too: left over from training, it cuts answers off."""
    room = s.text_config("max_position_embeddings")
    for place in {source(s), "config.json"}:
        limit = s.json(place).get("max_length")
        if isinstance(limit, int) and isinstance(room, int) and limit < room / 2:
            said = f"{place} says max_length {limit}, the model has room for {room}"
            unread = place != source(s)
            yield Info(f"{said}; generate() does not read it") if unread else said


def cache(s: Subject) -> Iterator[str]:
    places = [place for place in ("config.json", GENERATION) if s.has(place)]
    if not places:
        raise Skipped("there is no config.json")
    for place in places:
        if s.json(place).get("use_cache") is False:
            yield f"{place} says use_cache false, as trainers leave it: generating slows down"


CHECKS = (
    Check("generation-config", "error", "the generation config is the aligned model's", f"copy {GENERATION} from the aligned model", generation_config),
    Check("generation-config-saves", "warning", "the generation config can be saved again", "set do_sample: true, or remove the sampling options", resavable),
    Check("max-length", "warning", "answers are not cut off by a max_length left over", "remove max_length", length),
    Check("cache", "warning", "generating keeps its cache", "set use_cache: true", cache),
    Check("eos", "error", "generate() stops, and everyone agrees on EOS", f"set eos_token_id in {GENERATION}, as in the aligned model", eos),
    Check("bos", "info", "everyone agrees on BOS", "", lambda s: _disagreement(s, "bos")),
    Check("pad", "info", "everyone agrees on PAD", "", lambda s: _disagreement(s, "pad")),
)  # fmt: skip
