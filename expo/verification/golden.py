"""Golden vectors: what a tokenizer and a template must give, written down (`expo.golden/1`).

A file is trusted as far as its `source`: vectors that a model's authors published prove more than
those that `expo verify --record` took from a folder (`self_recorded: true`).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from expo.spec.recipes import vectors_path
from expo.spec.strict import Document, Strict
from expo.verification.conversations import CONVERSATIONS, TEXTS, Conversation

SCHEMA = "expo.golden/1"


class Case(Strict):
    """One text or conversation and what must come of it; only what is given is compared.

    `ids` of a text are those of `tokenizer(text)`, of messages those of `apply_chat_template`.
    `raises` is a part of the message that the template must raise.
    """

    name: str
    text: str | None = None
    messages: list[dict[str, object]] | None = None
    add_generation_prompt: bool = False
    tools: list[dict[str, object]] | None = None
    ids: list[int] | None = None
    rendered: str | None = None
    raises: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "Case":
        if (self.text is None) == (self.messages is None):
            raise ValueError("needs either text or messages")
        if self.text is not None and (self.tools or self.rendered is not None or self.raises):
            raise ValueError("a text has ids only: tools, rendered and raises go with messages")
        if self.ids is None and self.rendered is None and self.raises is None:
            raise ValueError("expects nothing: give ids, rendered or raises")
        return self

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.name, self.messages or [], self.add_generation_prompt, self.tools)


class TokenizerFacts(Strict):
    """`tokens`: how many there are; `ids`: token → id; `bos`, `eos`, `pad`: token strings."""

    tokens: int | None = None
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    ids: dict[str, int] = Field(default_factory=dict)


class Golden(Strict):
    """A file of golden vectors."""

    schema_: Literal["expo.golden/1"] = Field(alias="schema")
    name: str
    source: str
    self_recorded: bool = False
    tokenizer: TokenizerFacts = TokenizerFacts()
    cases: list[Case]

    @property
    def texts(self) -> list[str]:
        return [case.text for case in self.cases if case.text is not None]

    @property
    def conversations(self) -> list[Conversation]:
        return [case.conversation for case in self.cases if case.messages is not None]


def read_golden(path: Path) -> Golden:
    """Read and check a file of golden vectors, or the shipped ones of this name.

    Raises:
        SpecError: it cannot be read or is not valid; one line for every fault.
    """
    document = Document.read(vectors_path(str(path), None))
    golden = document.validate(Golden)
    document.check()
    return golden


def record(facts: dict, texts: dict[str, dict], conversations: Sequence[dict], name: str) -> str:
    """The YAML of what a trusted tokenizer gives for the canonical texts and conversations."""
    names = {index: token for token, index in facts["added"].items()}
    cases: list[dict] = []
    for number, text in enumerate(TEXTS):
        if "ids" in texts[text]:
            cases.append({"name": f"text {number}", "text": text, "ids": texts[text]["ids"]})
    for conversation, came in zip(CONVERSATIONS, conversations, strict=False):
        if facts["template"] is None:
            break
        case: dict = {"name": conversation.name, "messages": conversation.messages}
        case |= {"add_generation_prompt": conversation.add_generation_prompt}
        case |= {"tools": conversation.tools} if conversation.tools else {}
        if "error" in came:
            case["raises"] = came["error"].partition(": ")[2]
        else:
            case |= {"rendered": came["rendered"], "ids": came["ids"]}
        cases.append(case)
    special = {key: names.get(facts[key]) for key in ("bos", "eos", "pad")}
    content = {
        "schema": SCHEMA,
        "name": name,
        "source": f"recorded from {name}: proves that nothing changed, not that it was right",
        "self_recorded": True,
        "tokenizer": {"tokens": facts["tokens"]}
        | {key: token for key, token in special.items() if token is not None}
        | {"ids": facts["added"]},
        "cases": cases,
    }
    return yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what is not a plain word, and writes lists of ids on one line."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if re.fullmatch(r"[A-Za-z][A-Za-z0-9_ .-]*", text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    numbers = all(isinstance(item, int) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=numbers)


_Dumper.add_representer(str, _string)
_Dumper.add_representer(list, _list)
