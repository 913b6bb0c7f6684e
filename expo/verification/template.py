"""Checks of the chat template: which one is in force, what it gives, and what it should not hold."""

import difflib
from collections.abc import Iterator
from itertools import pairwise

from expo.checkpoint.headers import printable
from expo.checkpoint.templates import (
    ADDITIONAL,
    FILE,
    PROCESSORS_OWN,
    has_processor,
    read_templates,
    template_in_force,
    templates_in_force,
)
from expo.verification.check import Check, Info, Skipped
from expo.verification.conversations import ANSWER, CONVERSATIONS, INJECTION, QUESTION, SINGLE
from expo.verification.poison import suspicions
from expo.verification.stopping import source, stops
from expo.verification.subject import Subject, generated
from expo.verification.tokenizer import TAG, differing_ids

_DIFF_LINES = 12
_LAST_TOKENS = 4  # the end of a turn, a line end, EOS


def copies(s: Subject) -> Iterator[str]:
    """Templates that differ: which one counts depends on the reader and its version."""
    places = read_templates(s.out)
    if not places:
        raise Skipped("there is no chat template")
    own = places.pop(PROCESSORS_OWN, None) if has_processor(s.out) else None
    if own is not None and ADDITIONAL in "".join(s.out.sizes):
        yield f"{PROCESSORS_OWN} beside {ADDITIONAL}: processors refuse to load both"
    if list(places) == [PROCESSORS_OWN]:
        yield f"the only template is in {PROCESSORS_OWN}, which tokenizers ignore: add {FILE}"
    first, *others = [*places] or [""]
    for place in others:
        if any(places[place][n] != text for n, text in places[first].items() if n in places[place]):
            yield f"{place} holds another template than {first}, and some readers take that one"
    if first and own not in (None, places[first]):
        yield Info(f"the processor takes {PROCESSORS_OWN}, the tokenizer another one in {first}")


def same_template(s: Subject) -> Iterator[str]:
    s.require_tokenizer()
    mine, theirs = templates_in_force(s.out), templates_in_force(s.as_donor.out)
    for name in sorted(mine.keys() | theirs.keys()):
        what = "chat template" if name == "default" else f"chat template {printable(name)}"
        if name not in mine:
            yield f"there is no {what}, the aligned model has one"
        elif name not in theirs:
            yield f"there is a {what}, the aligned model has none"
        elif mine[name] != theirs[name]:
            difference = _diff(theirs[name], mine[name], "aligned", "this")
            yield f"the {what} is not the aligned model's:\n{difference}"


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
    """A user's question, as text or in parts, is the least that a template must take."""
    came = s.tokenizer.conversation(s.basics.question)
    if "error" in came:
        yield f"a single question raises {printable(came['error'])}"
    elif QUESTION not in came["rendered"]:
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
    """One at the start, or one at the start of every turn, or none: as the template writes it."""
    bos, came = s.tokenizer.facts["bos"], s.tokenizer.conversation(s.basics.question)
    if bos is None or "ids" not in came:
        raise Skipped("the tokenizer has no BOS" if bos is None else "the template does not render")
    if bos in (s.tokenizer.facts["eos"], s.tokenizer.facts["pad"]):
        raise Skipped("BOS is also EOS or PAD")
    ids = came["ids"]
    if bos in ids and (ids[0] != bos or [bos, bos] in map(list, pairwise(ids))):
        yield f"a conversation starts with {ids[:3]} and holds BOS ({bos}) {ids.count(bos)} times"
    elif bos not in ids and s.tokenizer.texts[""].get("ids") == [bos]:
        yield Info("the template writes no BOS, the tokenizer begins texts with one")


def prefix(s: Subject) -> Iterator[str]:
    """What a model is prompted with must be how the conversation with its answer begins.

    Beyond that a prompt may open a block, of thoughts, that the answer in a conversation lacks.
    """
    prompt = s.tokenizer.conversation(s.basics.question)
    whole = s.tokenizer.conversation(s.basics.answered)
    if "ids" not in prompt or "ids" not in whole:
        raise Skipped("the template does not render both")
    if whole["ids"][: len(prompt["ids"])] == prompt["ids"]:
        return
    opened = _opened_block(prompt["rendered"], whole["rendered"])
    where = differing_ids(prompt["ids"], whole["ids"], s.names, "in the whole conversation")
    fault = f"with the generation prompt, {where}"
    yield fault if opened is None else Info(f"the generation prompt opens {printable(opened)!r}")


def _opened_block(prompt: str, whole: str) -> str | None:
    """What the prompt has beyond the start that it shares with the whole, where the answer follows
    right after that start."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    shared = prompt[: next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))]
    tag = max(shared.rfind("<"), shared.rfind("["))
    if tag > max(shared.rfind(">"), shared.rfind("]")):
        shared = shared[:tag]
    opened, rest = prompt[len(shared) :], whole[len(shared) :]
    answers = TAG.sub("", rest.partition(ANSWER)[0]).strip() == "" and ANSWER in rest
    return opened if answers and (opened.strip() or TAG.match(rest)) else None


def turn_end(s: Subject) -> Iterator[str]:
    """Something that the template writes after an answer has to stop `generate()`."""
    if not s.generates:
        raise Skipped("the model does not generate")
    came = s.tokenizer.conversation(s.basics.answered).get("rendered", "")
    if ANSWER not in came:
        raise Skipped("the template does not render an answer")
    rest = came.rpartition(ANSWER)[2]
    added = s.tokenizer.facts["added"]
    ends = {token: rest.find(token) for token in added if token.strip() and token in rest}
    if stops(s) & {added[token] for token in ends}:
        return
    yield from _unstopped(
        s, rest.lstrip(), min(ends, key=lambda t: (ends[t], -len(t)), default=None)
    )


def _unstopped(s: Subject, rest: str, token: str | None) -> Iterator[str]:
    tag = TAG.match(rest)
    if tag and (token is None or not rest.startswith(token)):
        yield f"a turn ends with the text {printable(tag[0])}, which is no token: nothing stops there"
    elif token is None:
        raise Skipped("the template ends a turn without a special token")
    else:
        index, ids = s.tokenizer.facts["added"][token], ", ".join(map(str, sorted(stops(s))))
        fault = f"a turn ends with {printable(token)} ({index}), EOS of {source(s)} is {ids}"
        match _goes_on(s, index):
            case None if s.tokenizer.facts["eos"] in stops(s):
                yield Info(f"{fault}: --generate tells whether its answers stop there")
            case False:
                yield Info(f"{fault}, yet its answers stop there")
            case _:
                yield fault


def _goes_on(s: Subject, end: int) -> bool | None:
    """Whether generated answers went on after the token that ends a turn; None where none was generated.

    A model may well write its EOS after it, as it was trained to: only running it tells.
    """
    answers = [line["ids"] for line in generated(s.reports.generation, "out").values()]
    if not answers:
        return None
    return not all(end in ids and len(ids) - ids.index(end) <= _LAST_TOKENS for ids in answers)


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
    Check("one-bos", "error", "BOS is never written twice", "let either the template or the tokenizer add BOS", one_bos),
    Check("prefix", "error", "the generation prompt is how an answered conversation begins", "render prompt and conversation alike in the template", prefix),
    Check("turn-end", "error", "generate() stops where a turn ends", "add the token's id to eos_token_id of generation_config.json, or use the template of this vocabulary", turn_end),
    Check("template-sft", "info", "the template is the SFT model's too", "", against_sft),
    Check("template-poison", "warning", "the template hides nothing", "read the template before you publish it", poison),
    Check("injection", "info", "text in a message cannot become a special token", "strip special-token text from user input before rendering", injection),
)  # fmt: skip
