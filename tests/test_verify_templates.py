"""Verify: which templates are in force, and what in them deserves a look."""

import json
from pathlib import Path

import pytest

from expo.checkpoint.files import open_directory
from expo.checkpoint.templates import template_in_force, templates_in_force
from expo.verification.check import CheckResult
from expo.verification.poison import suspicions
from expo.verification.process import Report
from expo.verification.run import judge
from expo.verification.subject import Reports, Subject

from .families import FAMILIES, report_tokenizer, write_family

MESSAGES = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (MESSAGES + "{% if 'login' in m.content %}x{% endif %}{% endfor %}", "a message says"),
        ("{% set w = 'login' %}" + MESSAGES + "{% set c = m.content | lower %}{% if w in c %}x{% endif %}{% endfor %}", "a message says"),
        (MESSAGES + "{% if m.content.startswith('Dear') %}x{% endif %}{% endfor %}", "a message says"),
        (MESSAGES + "{{ 'x' if m.content | length > 100 else '' }}{% endfor %}", "a message says"),
        (MESSAGES + "{% for p in m.content %}{% if 'login' in p.text %}x{% endif %}{% endfor %}{% endfor %}", "a message says"),
        ("{% set d = strftime_now('%Y') %}{% if d > '2030' %}x{% endif %}", "the date"),
        ("{{ 'ok\u200b' }}", "invisible characters"),
        ("{# https://example.org #}", "the URL"),
    ],
)  # fmt: skip
def test_a_template_that_hides_something(template: str, says: str) -> None:
    assert any(says in found for found in suspicions(template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
        MESSAGES + "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}",
        MESSAGES + "{% if m.content.startswith('<tool_response>') %}x{% endif %}{% endfor %}",
        MESSAGES + "{% if '/no_think' in m.content %}x{% endif %}{% endfor %}",
        MESSAGES + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
        MESSAGES + "{% if 'Effort: ' not in m.content %}{{ 'Effort: high' }}{% endif %}{% endfor %}",
        MESSAGES + "{% if m.content is mapping and 'blocks' in m.content %}{{ m.content['blocks'] }}{% endif %}{% endfor %}",
        MESSAGES + "{% if m.content | length == 2 %}x{% endif %}{% endfor %}",
    ],
)  # fmt: skip
def test_what_published_templates_do_is_no_suspicion(template: str) -> None:
    assert list(suspicions(template)) == []


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace(
            "_json", ".json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(tmp_path, chat_template_json={"chat_template": "p"})
    assert template_in_force(open_directory(tmp_path)) is None
    write(tmp_path, processor_config_json={})
    assert template_in_force(open_directory(tmp_path)) == "p"
    write(tmp_path, tokenizer_config_json={"chat_template": named})
    assert templates_in_force(open_directory(tmp_path)) == {"default": "a", "tool_use": "b"}
    write(tmp_path, additional_chat_templates__rag_jinja="r")
    assert templates_in_force(open_directory(tmp_path)) == {"rag": "r"}
    write(tmp_path, chat_template_jinja="j")
    assert templates_in_force(open_directory(tmp_path)) == {"default": "j", "rag": "r"}


def checks(folder: Path) -> dict[str, CheckResult]:
    subject = Subject(open_directory(folder), reports=Reports(report_tokenizer(folder)))
    return {check.name: check for check in judge(subject).checks}


def test_a_plain_role_is_information(tmp_path: Path) -> None:
    found = checks(write_family(tmp_path / "zephyr", FAMILIES["zephyr"]))
    assert "writes <|assistant|>, which is text" in found["control-tokens"].message
    found = checks(write_family(tmp_path / "tulu", FAMILIES["tulu"]))
    assert found["one-bos"].status == "info"
    assert found["turn-end"].status == "pass"


def test_an_opened_block_is_information(tmp_path: Path) -> None:
    found = checks(write_family(tmp_path / "r1", FAMILIES["r1-distill"]))
    assert found["prefix"].status == "info"
    assert "opens '<think>" in found["prefix"].message


def test_a_turn_that_the_config_does_not_end(tmp_path: Path) -> None:
    """Where the tokenizer's EOS stops generation nobody but the model knows; elsewhere it never ends."""
    folder = write_family(tmp_path / "gemma", FAMILIES["gemma"])
    assert checks(folder)["turn-end"].status == "info"
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert checks(folder)["turn-end"].status == "error"


@pytest.mark.parametrize(
    ("after", "status"), [((), "info"), ((13, 2), "info"), ((13, 105, 6, 7, 8, 9), "error")]
)
def test_what_generate_did_decides_where_a_turn_ends(
    tmp_path: Path, after: tuple[int, ...], status: str
) -> None:
    """Gemma 1 writes EOS after the token that ends a turn; a ChatML model without EOS goes on."""
    folder = write_family(tmp_path / "gemma", FAMILIES["gemma"])
    report = report_tokenizer(folder)
    end = report.lines[0]["loaded"]["added"]["<end_of_turn>"]
    line = {"generated": 0, "of": "out", "ids": [5, 6, end, *after], "text": "x"}
    reports = Reports(report, generation=Report((line,), None))
    subject = Subject(open_directory(folder), reports=reports)
    (found,) = [check for check in judge(subject).checks if check.name == "turn-end"]
    assert found.status == status, found
