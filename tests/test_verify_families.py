"""Verify: healthy models of the large families raise no alarm, alone or against their aligned model."""

import re
from pathlib import Path

import pytest

from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.verification.run import CHECKS, judge
from expo.verification.subject import Reports, Subject
from expo.verification.tensors import read_tensors

from .families import FAMILIES, report_tokenizer, write_family

LOADED = ("load", "generation-config-saves", "generation", "drift")
"""Checks that need the model to be built, which the benchmark does."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_healthy_family_raises_no_alarm(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path / name, FAMILIES[name])
    report = report_tokenizer(folder)
    aligned = open_checkpoint(parse_reference(str(folder), role="ALIGNED"))
    for against in (None, aligned):
        reports = Reports(report, report if against else None)
        subject = Subject(open_directory(folder), against, reports=reports)
        subject.tensor_facts = read_tensors(subject)
        found = judge(subject).checks
        assert [c for c in found if c.status in ("error", "warning")] == []
        skipped = {check.name: check.message for check in found if check.status == "skipped"}
        assert not skipped.keys() & {"tokenizer-loads", "eos", "ids-below-rows"}, skipped


def test_the_families_are_of_many_kinds() -> None:
    assert len({family.model_type for family in FAMILIES.values()}) > 12
    assert any(family.generation is None for family in FAMILIES.values())
    assert any(isinstance(family.template, dict) for family in FAMILIES.values())


def test_the_docs_say_of_every_check_what_it_does_to_a_healthy_model() -> None:
    text = (Path(__file__).parent.parent / "docs" / "verification.md").read_text()
    stated = text.partition("| checks | why")[2].partition("\n## ")[0]
    names = [
        name
        for line in stated.splitlines()
        for name in re.findall(r"`([\w-]+)`", line.split("|")[1] if "|" in line else "")
    ]
    assert sorted(names) == sorted(check.name for check in CHECKS)
