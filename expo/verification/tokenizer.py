"""Checks of the tokenizer: its files, and what a fresh process made of the complete folder."""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version

from expo.checkpoint.files import Files
from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import is_tokenizer_file, is_vocabulary
from expo.verification.check import Check, Info, Skipped, Unchecked
from expo.verification.conversations import CONVERSATIONS
from expo.verification.subject import Subject

TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]+\]|&lt;.{1,40}?&gt;")
"""Text that is meant as a control token."""

_CONTROL = re.compile(r"<([|｜])[^<>|｜\s'\"{}]+\1>")
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|#\d+);")
_PACKAGES = re.compile(r"sentencepiece|tiktoken|mistral[-_]common|protobuf", re.I)
_WANTS = re.compile(r"ImportError|ModuleNotFoundError|requires the|install")
_NEEDS = (
    (("tekken.json",), ("mistral-common",)),
    (("*.tiktoken",), ("tiktoken",)),
    (("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm"), ("sentencepiece", "protobuf")),
)  # fmt: skip
"""What transformers reads a vocabulary with where there is no tokenizer.json beside it."""

_CONTEXT = 3  # tokens shown before the first that differs
_FACTS = {
    "class": "the class",
    "serialized": "the vocabulary, merges or normalization (the serialized tokenizer)",
    "tokens": "the number of tokens",
    "special_tokens": "the special tokens",
    "model_max_length": "model_max_length",
    "padding_side": "the padding side",
    "truncation_side": "the truncation side",
    "input_names": "the model's inputs",
}


def loads(s: Subject) -> Iterator[str]:
    report = s.reports.out
    if not any(map(is_vocabulary, s.out.sizes)):
        if not s.generates or s.rows is None:
            raise Skipped("there is no tokenizer")
        yield f"there is no tokenizer with a vocabulary, the embedding has {s.rows} rows"
    elif report is None:
        raise Skipped("it was not loaded")
    elif report.failure is not None:
        yield _failed(s, report.failure)
    elif s.rows and s.tokenizer.facts["tokens"] < s.rows / 2:
        yield f"it loads with {s.tokenizer.facts['tokens']} tokens, the embedding has {s.rows} rows"


def _failed(s: Subject, failure: str) -> str:
    if packages := needed_packages(s.out, failure):
        return Unchecked(f"not checked, it needs {_and(packages)}", _install(packages))
    if "trust_remote_code" in failure:
        raise Skipped("the tokenizer needs its own code, which is never run here")
    report = s.reports.out
    when = f" {_progress(report.lines)}" if report and report.first("loaded") else ""
    return f"the process that loads the folder{when}: {failure}"


def needed_packages(files: Files, failure: str) -> list[str]:
    """The packages for want of which a tokenizer did not load: those of its kind of vocabulary that are
    not there, else those that the failure asks for (which may be there, and too old)."""
    names = [] if "tokenizer.json" in files.sizes else [*files.sizes]
    needs = [p for kinds, packages in _NEEDS if _any(names, kinds) for p in packages]
    missing = [package for package in needs if _installed(package) is None]
    if missing or not _WANTS.search(failure):
        return missing
    asked = {found[0].lower().replace("_", "-") for found in _PACKAGES.finditer(failure)}
    return sorted(asked)


def _any(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _and(packages: list[str]) -> str:
    found = [(package, _installed(package)) for package in packages]
    return " and ".join(p if v is None else f"a newer {p} than {v}" for p, v in found)


def _install(packages: list[str]) -> str:
    upgrade = "--upgrade " if any(map(_installed, packages)) else ""
    return f"pip install {upgrade}{' '.join(packages)}"


def _progress(lines: tuple[dict, ...]) -> str:
    if not any("texts_done" in line for line in lines):
        return "stopped at the texts"
    done = sum("conversation" in line for line in lines)
    return f"stopped at the conversation {CONVERSATIONS[min(done, len(CONVERSATIONS) - 1)].name!r}"


def files(s: Subject) -> Iterator[str]:
    donor = s.donor.tokenizer_files
    theirs = {name for name in donor.sizes if is_tokenizer_file(name)}
    mine = {name for name in s.out.sizes if is_tokenizer_file(name)}
    for name in sorted(theirs - mine):
        yield f"{printable(name)} is missing"
    for name in sorted(mine - theirs):
        yield f"{printable(name)} is not among the aligned model's files"
    for name in sorted(mine & theirs):
        if donor.sizes[name] != s.out.sizes[name] or donor.read(name) != s.out.read(name):
            yield f"{printable(name)} is not the aligned model's, byte for byte"


def fingerprint(s: Subject) -> Iterator[str]:
    mine, theirs = s.tokenizer.facts, s.donor_tokenizer.facts
    for key, what in _FACTS.items():
        if mine[key] != theirs[key]:
            short = not isinstance(mine[key], dict) and key != "serialized"
            values = f": {mine[key]}, {theirs[key]} in the aligned model" if short else ""
            yield f"{what} differs{values}{_special_difference(mine, theirs, key)}"


def _special_difference(mine: dict, theirs: dict, key: str) -> str:
    if key != "special_tokens":
        return ""
    a, b = mine[key], theirs[key]
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    shown = [f"{n} {printable(str(a.get(n)))}, {printable(str(b.get(n)))}" for n in names]
    return f": {'; '.join(shown)} in the aligned model"


def probes(s: Subject) -> Iterator[str]:
    mine, theirs = s.tokenizer.texts, s.donor_tokenizer.texts
    for text, came in mine.items():
        if text in theirs:
            for key in ("error", "ids", "alone", "decoded"):
                if came.get(key) != theirs[text].get(key):
                    yield f"{_quoted(text)}: {_difference(s, came, theirs[text], key)}"
                    break


def _difference(s: Subject, mine: dict, theirs: dict, key: str) -> str:
    if key in ("ids", "alone") and key in mine and key in theirs:
        return differing_ids(mine[key], theirs[key], s.names, "in the aligned model")
    return f"{_quoted(mine.get(key))}, {_quoted(theirs.get(key))} in the aligned model"


def differing_ids(mine: list[int], theirs: list[int], names: Mapping[int, str], where: str) -> str:
    """The first position at which two lists of ids differ, with the tokens of both sides."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))

    def token(ids: list[int]) -> str:
        return f"{ids[at]} {_quoted(names.get(ids[at], '?'))}" if at < len(ids) else "the end"

    before = " ".join(printable(names.get(i, "?")) for i in mine[max(0, at - _CONTEXT) : at])
    after = f" after {_quoted(before)}" if before else ""
    return f"position {at}{after} is {token(mine)}, {token(theirs)} {where}"


def _quoted(text: object) -> str:
    return "nothing" if text is None else printable(repr(text), 80)


def saved_limits(s: Subject) -> Iterator[str]:
    """What a trainer set for its batches; servers that read tokenizer.json alone apply it."""
    facts = s.tokenizer.facts
    if limit := facts["truncation"]:
        yield f"tokenizer.json cuts every text after {limit.get('max_length')} tokens"
    if padding := facts["padding"]:
        yield f"tokenizer.json pads every text with {printable(str(padding.get('pad_token')))}"


def ids_below_rows(s: Subject) -> Iterator[str]:
    rows, facts = s.rows, s.tokenizer.facts
    if rows is None:
        raise Skipped("there is no one input embedding")
    if facts["max_id"] < rows:
        return
    beyond = {token: index for token, index in facts["added"].items() if index >= rows}
    shown = ", ".join(f"{printable(t)} = {i}" for t, i in beyond.items()) or f"id {facts['max_id']}"
    fault = f"{printable(shown)} has no row: the embedding has {rows}"
    # A text model's tokenizer may name a token of its family's vision models, which no text gives.
    yield fault if s.aligned is not None or not beyond or _in_use(s, beyond) else Info(fault)


def _in_use(s: Subject, tokens: dict[str, int]) -> bool:
    special = {s.tokenizer.facts[name] for name in ("bos", "eos", "pad")}
    said = {index for came in s.tokenizer.conversations for index in came.get("ids", ())}
    return not (special | said).isdisjoint(tokens.values())


def control_tokens(s: Subject) -> Iterator[str]:
    """Every special token that the template writes has to come out as that one token."""
    added = s.tokenizer.facts["added"]
    for token, index in added.items():
        came = s.tokenizer.texts.get(token)
        if token and token in s.template and came is not None and came.get("alone") != [index]:
            shown = came.get("alone", came.get("error"))
            yield f"{printable(token)} is token {index}, but the text comes out as {shown}"
    rendered = s.tokenizer.conversation(s.basics.answered).get("rendered", "")
    for entity in sorted(set(_ENTITY.findall(rendered))):
        yield f"the template writes the HTML entity {entity}: it went through a web page"
    literals = {found[0] for found in _CONTROL.finditer(s.template)}
    for literal in sorted(literals - added.keys() - set(s.names.values())):
        yield Info(f"the template writes {printable(literal)}, which is text and no token")


CHECKS = (
    Check("tokenizer-loads", "error", "the tokenizer loads in a fresh process", "copy the tokenizer files from the aligned model", loads, "copy the tokenizer files from the model that it was made from"),
    Check("tokenizer-files", "error", "tokenizer files are the aligned model's, byte for byte", "copy the tokenizer files from the aligned model; never load and save them", files),
    Check("fingerprint", "error", "the loaded tokenizer is the aligned model's", "copy config.json and the tokenizer files from the aligned model", fingerprint),
    Check("probes", "error", "texts get the ids that the aligned model gives them", "copy config.json and the tokenizer files from the aligned model", probes),
    Check("saved-limits", "warning", "the tokenizer neither cuts nor pads", "set truncation and padding of tokenizer.json to null", saved_limits),
    Check("ids-below-rows", "error", "every token has an embedding row", "copy the tokenizer files from the aligned model; never load and save them", ids_below_rows),
    Check("control-tokens", "error", "the template's special tokens are single tokens", "copy the tokenizer files from the aligned model", control_tokens),
)  # fmt: skip
