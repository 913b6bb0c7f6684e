"""Checks of the chat template: which one is in force, what it gives, and what it should not hold."""

import difflib
from collections.abc import Iterator

from expo.checkpoint.headers import printable
from expo.checkpoint.templates import FILE, read_templates, template_in_force
from expo.verification.check import Check, Inherited, Skipped
from expo.verification.configuration import GENERATION, ids_in
from expo.verification.conversations import (
    ANSWER,
    ANSWERED,
    ASKED,
    CONVERSATIONS,
    INJECTION,
    SINGLE,
)
from expo.verification.poison import suspicions
from expo.verification.subject import Subject
from expo.verification.tokenizer import differing_ids

_DIFF_LINES = 12


def copies(s: Subject) -> Iterator[str]:
    """Two templates that differ: which one counts depends on the reader and its version."""
    places = read_templates(s.out)
    if list(places) == ["chat_template.json"]:
        fault = f"the only template is in chat_template.json, which tokenizers ignore: add {FILE}"
        yield Inherited(fault) if s.aligned and _same_places(s) else fault
    first, *others = [*places] or [""]
    for place in others:
        if places[place] != places[first]:
            fault = f"{place} holds another template than {first}, and some readers take that one"
            yield Inherited(fault) if s.aligned and _same_places(s) else fault


def _same_places(s: Subject) -> bool:
    return read_templates(s.out) == read_templates(s.donor.tokenizer_files)


def same_template(s: Subject) -> Iterator[str]:
    s.require_tokenizer()
    mine, theirs = template_in_force(s.out), template_in_force(s.donor.tokenizer_files)
    if mine is None and theirs is not None:
        yield "there is no chat template, the aligned model has one"
    elif mine is not None and theirs is None:
        yield "there is a chat template, the aligned model has none"
    elif mine is not None and theirs is not None and mine != theirs:
        yield f"the template is not the aligned model's:\n{_diff(theirs, mine, 'aligned', 'this')}"


def against_sft(s: Subject) -> Iterator[str]:
    if s.sft is None:
        raise Skipped("the SFT model is at hand only during the merge")
    before, now = template_in_force(s.sft), template_in_force(s.out)
    if before is not None and now is not None and before != now:
        yield f"the alignment changed the template:\n{_diff(before, now, 'SFT', 'aligned')}"
    elif (before is None) != (now is None):
        yield f"{'the SFT model' if before is None else 'the output'} has no chat template"


def _diff(a: str, b: str, name_a: str, name_b: str) -> str:
    lines = list(difflib.unified_diff(_lines(a), _lines(b), name_a, name_b, lineterm="", n=1))
    more = [f"… {len(lines) - _DIFF_LINES} more lines"] if len(lines) > _DIFF_LINES else []
    return "\n".join([printable(line, 160) for line in lines[:_DIFF_LINES]] + more)


def _lines(template: str) -> list[str]:
    """Templates are often one line: cut before every tag, so that a diff shows where."""
    return template.replace("{%", "\n{%").replace("{{", "\n{{").split("\n")


def renders(s: Subject) -> Iterator[str]:
    """A user's question is the least that a template must take."""
    _ = s.template
    came = s.tokenizer.conversation(SINGLE)
    if "error" in came:
        yield f"a single question raises {printable(came['error'])}"
    elif "Hello" not in came["rendered"]:
        yield f"a single question is rendered without its text: {came['rendered']!r}"


def conversations(s: Subject) -> Iterator[str]:
    for wanted in CONVERSATIONS:
        mine, theirs = s.tokenizer.conversation(wanted), s.donor_tokenizer.conversation(wanted)
        if mine.get("error") != theirs.get("error"):
            said = [f"raises {c['error']}" if "error" in c else "renders" for c in (mine, theirs)]
            yield printable(f"{wanted.name}: {said[0]}, {said[1]} in the aligned model", 400)
        elif mine.get("rendered") != theirs.get("rendered"):
            text = differing_text(mine["rendered"], theirs["rendered"])
            yield f"{wanted.name}: {text} in the aligned model"
        elif mine.get("ids") != theirs.get("ids"):
            found = differing_ids(mine["ids"], theirs["ids"], s.names, "in the aligned model")
            yield f"{wanted.name}: {found}"


def differing_text(mine: str, theirs: str) -> str:
    """Where two texts part, with a piece of each."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
    pieces = [printable(repr(text[max(0, at - 10) : at + 20])) for text in (mine, theirs)]
    return f"character {at}: …{pieces[0]}, …{pieces[1]}"


def one_bos(s: Subject) -> Iterator[str]:
    facts = s.tokenizer.facts
    bos, came = facts["bos"], s.tokenizer.conversation(SINGLE)
    if bos is None or "ids" not in came:
        raise Skipped("the tokenizer has no BOS" if bos is None else "the template does not render")
    if bos in (facts["eos"], facts["pad"]):
        raise Skipped("BOS is also EOS or PAD")
    _ = s.template
    count = came["ids"].count(bos)
    if count == 1 and came["ids"][0] == bos:
        return
    expects = s.tokenizer.texts[""].get("ids") == [bos]
    if count == 0 and not expects:
        return
    fault = f"a conversation starts with {came['ids'][:3]} and holds BOS ({bos}) {count} times"
    if s.aligned is not None and s.donor_tokenizer.conversation(SINGLE).get("ids") == came["ids"]:
        fault = Inherited(fault)
    yield fault


def prefix(s: Subject) -> Iterator[str]:
    """What a model is prompted with must be how the conversation with its answer begins."""
    _ = s.template
    prompt, whole = s.tokenizer.conversation(SINGLE), s.tokenizer.conversation(ANSWERED)
    if "ids" not in prompt or "ids" not in whole:
        raise Skipped("the template does not render both")
    if whole["ids"][: len(prompt["ids"])] == prompt["ids"]:
        return
    where = differing_ids(prompt["ids"], whole["ids"], s.names, "in the whole conversation")
    fault = f"with the generation prompt, {where}"
    yield Inherited(fault) if _is_donors(s) else fault


def _is_donors(s: Subject) -> bool:
    """Whether the aligned model renders the basic conversations to the same ids."""
    if s.aligned is None:
        return False
    basic = (SINGLE, ASKED, ANSWERED)
    mine, theirs = s.tokenizer, s.donor_tokenizer
    return all(mine.conversation(c).get("ids") == theirs.conversation(c).get("ids") for c in basic)


def turn_end(s: Subject) -> Iterator[str]:
    """The token that ends the assistant's turn has to stop generation everywhere."""
    token = _turn_end_token(s)
    index = s.tokenizer.facts["added"][token]
    said = {
        "config.json": ids_in(s.config, "eos"),
        GENERATION: ids_in(s.json(GENERATION), "eos"),
        "the tokenizer": {s.tokenizer.facts["eos"]} - {None},
    }
    for place, ids in said.items():
        if ids and index not in ids:
            shown = ", ".join(map(str, sorted(ids)))
            fault = f"a turn ends with {printable(token)} ({index}), EOS of {place} is {shown}"
            yield Inherited(fault) if _donor_ends_alike(s, place, ids) else fault


def _turn_end_token(s: Subject) -> str:
    _ = s.template
    came = s.tokenizer.conversation(ANSWERED)
    text = came.get("rendered", "")
    if ANSWER not in text:
        raise Skipped("the template does not render an answer")
    rest = text[text.rindex(ANSWER) + len(ANSWER) :].lstrip()
    found = [token for token in s.tokenizer.facts["added"] if token and rest.startswith(token)]
    if not found:
        raise Skipped("the template ends a turn without a special token")
    return max(found, key=len)


def _donor_ends_alike(s: Subject, place: str, ids: set[int]) -> bool:
    if not _is_donors(s):
        return False
    assert s.aligned is not None
    match place:
        case "config.json":
            return ids_in(s.aligned.config, "eos") == ids
        case "the tokenizer":
            return {s.donor_tokenizer.facts["eos"]} == ids
        case _:
            files = s.aligned.files
            return GENERATION in files.sizes and files.read(GENERATION) == s.out.read(GENERATION)


def injection(s: Subject) -> Iterator[str]:
    """Special-token text in a message becomes real tokens: true of nearly every model, good to know."""
    _ = s.template
    came = s.tokenizer.conversation(INJECTION)
    plain = s.tokenizer.conversation(SINGLE)
    specials = set(s.tokenizer.facts["added"].values())
    real = [i for i in came.get("ids", []) if i in specials]
    if len(real) > len([i for i in plain.get("ids", []) if i in specials]):
        yield "special-token text in a message becomes a real token"


def poison(s: Subject) -> Iterator[str]:
    _ = s.template
    for place, templates in read_templates(s.out).items():
        for name, template in templates.items():
            where = place if name == "default" else f"{place} ({printable(name)})"
            yield from (f"{where} {found}" for found in suspicions(template))


CHECKS = (
    Check("template-copies", "error", "there is one template", f"keep {FILE}, make every other copy equal to it", copies),
    Check("template", "error", "the template is the aligned model's", f"copy {FILE} or tokenizer_config.json from the aligned model", same_template),
    Check("template-renders", "error", "the template renders a question", "copy the template from the aligned model", renders),
    Check("conversations", "error", "conversations come out as in the aligned model", "copy config.json and the tokenizer files from the aligned model", conversations),
    Check("one-bos", "error", "a conversation starts with one BOS", "let either the template or the tokenizer add BOS", one_bos),
    Check("prefix", "error", "the generation prompt is how an answered conversation begins", "render prompt and conversation alike in the template", prefix),
    Check("turn-end", "error", "the token that ends a turn is EOS everywhere", "add its id to eos_token_id of config.json and generation_config.json", turn_end),
    Check("template-sft", "info", "the template is the SFT model's too", "", against_sft),
    Check("template-poison", "warning", "the template hides nothing", "read the template before you publish it", poison),
    Check("injection", "info", "text in a message cannot become a special token", "strip special-token text from user input before rendering", injection),
)  # fmt: skip
