"""What a chat template should not hold: poisoned templates travel with copied files.

A template is a program that sees every message. One that branches on what a message says, on the
date, or that holds URLs or invisible characters can behave well in every test and not in use.
"""

import re
import unicodedata
from collections.abc import Iterator

from jinja2 import Environment, TemplateSyntaxError, nodes

_URL = re.compile(r"(https?:|www\.)[^\s'\"}]*")
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own extension
_DATES = {"strftime_now", "now", "datetime", "date_string"}
_SHAPES = {"string", "mapping", "iterable", "sequence", "defined", "undefined", "none", "boolean"}
_SEARCHES = {"startswith", "endswith", "find", "index", "count", "match", "search"}


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
    if any(name.name in _DATES for name in tree.find_all(nodes.Name)):
        yield "depends on the date"
    yield from dict.fromkeys(
        f"branches on what a message says (line {line})" for line in _content_branches(tree)
    )


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cf", "Co", "Cn") or (category == "Cc" and character not in "\n\t\r")


def _content_branches(tree: nodes.Template) -> Iterator[int]:
    """Lines of conditions that compare or search the text of a message."""
    tainted = _tainted_names(tree)
    for branch in tree.find_all((nodes.If, nodes.CondExpr, nodes.For)):
        test = branch.test
        if test is not None and any(_judges_text(part, tainted) for part in _parts(test)):
            yield branch.lineno


def _tainted_names(tree: nodes.Template) -> set[str]:
    """Variables that hold a message's text, or something computed from it."""
    tainted: set[str] = set()
    before = -1
    while before != len(tainted):
        before = len(tainted)
        for assignment in tree.find_all(nodes.Assign):
            if _touches(assignment.node, tainted):
                targets = [assignment.target, *assignment.target.find_all(nodes.Name)]
                tainted |= {n.name for n in targets if isinstance(n, nodes.Name)}
    return tainted


def _parts(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _parts(child)


def _touches(node: nodes.Node, tainted: set[str]) -> bool:
    for part in _parts(node):
        match part:
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Name(name=name) if name in tainted:
                return True
            case _:
                pass
    return False


def _judges_text(node: nodes.Node, tainted: set[str]) -> bool:
    match node:
        case nodes.Compare(expr=expression, ops=operands):
            sides = [expression, *(operand.expr for operand in operands)]
            says = any(isinstance(side, nodes.Const) and _is_telling(side.value) for side in sides)
            return says and any(_touches(side, tainted) for side in sides)
        case nodes.Call(node=nodes.Getattr(node=subject, attr=attribute)):
            return attribute in _SEARCHES and _touches(subject, tainted)
        case nodes.Test(node=subject, name=name):
            return name not in _SHAPES and _touches(subject, tainted)
        case _:
            return False


def _is_telling(value: object) -> bool:
    """A constant that a text can be compared with; '' and none only ask whether there is one."""
    return (isinstance(value, str) and bool(value.strip())) or (
        isinstance(value, int) and not isinstance(value, bool) and value > 0
    )
