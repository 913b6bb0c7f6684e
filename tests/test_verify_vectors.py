"""Verify: golden vectors hold for their template and tokenizer, and for no other."""

import json
from pathlib import Path

import pytest

from expo.checkpoint.files import open_directory
from expo.verification.golden import Golden, TokenizerFacts, read_golden
from expo.verification.run import Children, judge
from expo.verification.subject import Subject

from .clean import VECTORS, Clean
from .faults import FAULTS
from .openchat import write_tokenizer
from .templates import TEMPLATES


def test_a_failing_vector_shows_position_and_tokens(clean: Clean, folder: Path) -> None:
    FAULTS["no prepended space"].inject(folder)
    (found,) = [c for c in judge(clean.subject(folder, "tokenizer")).checks if c.name == "vectors"]
    assert found.status == "error"
    assert "openchat, card, single turn: position 1 after '<s>' is" in found.message
    assert "420 " in found.message
    assert "expected" in found.message


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_vectors_hold_for_their_template_and_for_no_other(tmp_path: Path, name: str) -> None:
    template, bos, eos = TEMPLATES[name]
    write_tokenizer(tmp_path, template=template, bos=bos, eos=eos)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    other = "chatml" if name != "chatml" else "zephyr"
    for golden in (
        _without_other_ids(read_golden(VECTORS / f"{file}.yml")) for file in (name, other)
    ):
        with Children(tmp_path, golden=golden) as children:
            subject = Subject(open_directory(tmp_path), golden=golden, reports=children.reports)
        (found,) = [check for check in judge(subject).checks if check.name == "vectors"]
        assert (found.status == "pass") == (golden.name == name), found.message
    assert {path.stem for path in VECTORS.glob("*.yml")} == set(TEMPLATES)


def _without_other_ids(golden: Golden) -> Golden:
    """Without the ids of vocabularies other than Mistral's, which the tests' tokenizer has."""
    if golden.name in ("openchat", "mistral-instruct"):
        return golden
    cases = [case.model_copy(update={"ids": None}) for case in golden.cases]
    return golden.model_copy(update={"cases": cases, "tokenizer": TokenizerFacts()})


@pytest.mark.parametrize(
    ("name", "file", "status"),
    [
        ("chatml", "chatml", "pass"),
        ("llama-3-instruct", "llama3", "error"),  # it writes a newline after <|eot_id|>
    ],
)
def test_the_vectors_judge_templates_that_others_wrote(
    tmp_path: Path, name: str, file: str, status: str
) -> None:
    from importlib.resources import files

    template = (files("mergekit") / "_data" / "chat_templates" / f"{file}.jinja").read_text()
    _, bos, eos = TEMPLATES[name]
    write_tokenizer(tmp_path, template=template, bos=bos, eos=eos)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    golden = read_golden(VECTORS / f"{name}.yml")
    with Children(tmp_path, golden=golden) as children:
        subject = Subject(open_directory(tmp_path), golden=golden, reports=children.reports)
    (found,) = [check for check in judge(subject).checks if check.name == "vectors"]
    assert found.status == status, found.message


def test_the_ids_of_mistral_are_mistrals_own() -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    request = ChatCompletionRequest(messages=[UserMessage(content="Hello")])
    own = MistralTokenizer.v1().encode_chat_completion(request).tokens
    golden = read_golden(VECTORS / "mistral-instruct.yml")
    assert golden.cases[0].ids == own
    messages = [UserMessage(content="Hello"), AssistantMessage(content="Hi")]
    request = ChatCompletionRequest(messages=[*messages, UserMessage(content="How are you today?")])
    three = MistralTokenizer.v1().encode_chat_completion(request).tokens
    assert [case.ids for case in golden.cases if case.text is not None] == [three]


@pytest.mark.slow
def test_recorded_vectors_hold(clean: Clean, tmp_path: Path, expo) -> None:
    file = tmp_path / "vectors.yml"
    assert expo("verify", clean.out, "--record", file).code == 0
    golden = read_golden(file)
    assert golden.self_recorded
    assert len(golden.cases) > 50
    ran = expo("verify", clean.out, "--vectors", file, "--quick", "--json")
    found = {check["name"]: check for check in json.loads(ran.out)["checks"]}
    assert found["vectors"]["status"] == "pass", found["vectors"]
    assert "self-recorded" in found["vectors-source"]["message"]
