"""What a chat template should not hold: poisoned templates travel with copied files.

A template is a program that sees every message. One that branches on the words of a message, or on
the date, can behave well in every test and not in use. Printing the date, URLs in a prompt, and
branches on markup (`</think>`, `<tool_call>`, `/no_think`) are what published templates do.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

from jinja2 import Environment, TemplateSyntaxError, nodes

_URL = re.compile(r"(https?:|www\.)[^\s'\"}]*")
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own extension
_DATES = {"strftime_now", "now", "datetime"}
_SHAPES = {"string", "mapping", "iterable", "sequence", "defined", "undefined", "none", "boolean"}
_SEARCHES = {"startswith", "endswith", "find", "index", "count", "match", "search"}
_MARKUP = re.compile(r"\s*([<\[{|/(\x60]|\W*$)|[A-Z]+_[A-Z_]*\s*$|.*[>\]}|]\s*$", re.S)
"""Text that no person types by chance: a tag, a bracket, a `/command`, or no word."""


_MANY_PARTS = 16  # a message has fewer parts; a larger number counts its characters


def suspicions(template: str) -> Iterator[str]:
    """Everything in a template that deserves a look, each once."""
    hidden = sorted({c for c in template if _is_hidden(c)})
    if hidden:
        names = ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, '')}".strip() for c in hidden[:3])
        yield f"holds invisible characters: {names}"
    for found in dict.fromkeys(match[0] for match in _URL.finditer(template)):
        yield f"holds the URL {ascii(found)[1:-1]}"
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # parses, never renders
        tree = environment.parse(_GENERATION_TAG.sub("", template))
    except (TemplateSyntaxError, RecursionError) as error:
        yield f"cannot be analysed: {error}"
        return
    for source, what in ((_is_text, "what a message says"), (_is_date, "the date")):
        lines = dict.fromkeys(_branches(_Flow(tree, source)))
        yield from (f"branches on {what} (line {line})" for line in lines)


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cf", "Co", "Cn") or (category == "Cc" and character not in "\n\t\r")


def _is_text(node: nodes.Node) -> bool:
    return _key(node) in ("content", "text")


def _is_date(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Call) and any(
        isinstance(part, nodes.Name) and part.name in _DATES for part in _parts(node.node)
    )


class _Flow:
    """Which variables hold something of a source, and which constants a variable can hold."""

    def __init__(self, tree: nodes.Template, source: Callable[[nodes.Node], bool]) -> None:
        self.tree, self._source = tree, source
        self._tainted: set[str] = set()
        self._own = _own_phrases(tree)
        pairs = [(a.target, a.node) for a in tree.find_all(nodes.Assign)]
        self._assigned = [*pairs, *((loop.target, loop.iter) for loop in tree.find_all(nodes.For))]
        before = -1
        while before != len(self._tainted):
            before = len(self._tainted)
            for target, node in pairs:
                if self.touches(node):
                    self._tainted |= set(_names(target))

    def touches(self, node: nodes.Node) -> bool:
        if _key(node) in ("type", "role"):  # of a part of a message: its kind, not its text
            return False
        if self._source(node) or (isinstance(node, nodes.Name) and node.name in self._tainted):
            return True
        return any(self.touches(child) for child in node.iter_child_nodes())

    def tells(self, node: nodes.Node) -> bool:
        """Whether an expression, its variables included, holds words or a number of characters."""
        names = set(_names(node)) - self._tainted
        values = [value for target, value in self._assigned if names & set(_names(target))]
        parts = (part for one in (node, *values) for part in _parts(one))
        return any(self._is_telling(p.value) for p in parts if isinstance(p, nodes.Const))

    def _is_telling(self, value: object) -> bool:
        """'' and none only ask whether there is a text; own phrases, whether they are there yet."""
        if not isinstance(value, str):
            return type(value) is int and value > _MANY_PARTS
        words = value.strip().lower()
        own = any(words in phrase or (phrase and words.startswith(phrase)) for phrase in self._own)
        return not (_MARKUP.match(value) or own)


def _branches(flow: _Flow) -> Iterator[int]:
    """Lines of conditions that compare or search what comes from the source."""
    for branch in flow.tree.find_all((nodes.If, nodes.CondExpr, nodes.For)):
        test = branch.test
        if test is not None and any(_judges(part, flow) for part in _parts(test)):
            yield branch.lineno


def _judges(node: nodes.Node, flow: _Flow) -> bool:
    match node:
        case nodes.Compare(expr=expression, ops=operands):
            sides = [expression, *(operand.expr for operand in operands)]
            others = [side for side in sides if not flow.touches(side)]
            return len(others) < len(sides) and any(map(flow.tells, others))
        case nodes.Call(node=nodes.Getattr(node=subject, attr=attribute), args=arguments):
            return (
                attribute in _SEARCHES and flow.touches(subject) and any(map(flow.tells, arguments))
            )
        case nodes.Test(node=subject, name=name):
            return name not in _SHAPES and flow.touches(subject)
        case _:
            return False


def _own_phrases(tree: nodes.Template) -> set[str]:
    """What the template writes itself, and the keys that it reads."""
    outputs = [part for output in tree.find_all(nodes.Output) for part in _parts(output)]
    written = [part.data for part in outputs if isinstance(part, nodes.TemplateData)]
    written += [str(part.value) for part in outputs if isinstance(part, nodes.Const)]
    keys = [key for node in _parts(tree) if (key := _key(node))]
    return {phrase.strip().lower() for phrase in (*written, *keys)}


def _key(node: nodes.Node) -> str | None:
    match node:
        case nodes.Getattr(attr=str(key)) | nodes.Getitem(arg=nodes.Const(value=str(key))):
            return key
        case _:
            return None


def _parts(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _parts(child)


def _names(node: nodes.Node) -> Iterator[str]:
    return (part.name for part in _parts(node) if isinstance(part, nodes.Name))
