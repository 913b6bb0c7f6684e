"""The OpenChat pair, its merge, and what the child processes say of it: what the tests of verify change."""

from dataclasses import dataclass
from pathlib import Path

import expo as door
from expo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.results import CheckResult
from expo.verification.golden import Golden, read_golden
from expo.verification.run import Children, judge, shapes_of
from expo.verification.subject import Reports, Subject
from expo.verification.tensors import read_tensors

from .openchat import write_model

VECTORS = Path(__file__).parent.parent / "merge_configs" / "vectors"


@dataclass(frozen=True)
class Clean:
    """An OpenChat pair, its merge, and what the child processes say of the merge."""

    out: Path
    aligned: Checkpoint
    reports: Reports
    golden: Golden

    def subject(self, folder: Path, reads: str) -> Subject:
        """The facts about a changed copy: those that the change touches are taken anew."""
        subject = Subject(open_directory(folder), self.aligned, golden=self.golden)
        out, load = self.reports.out, self.reports.load
        if reads == "tensors":
            subject.tensor_facts = read_tensors(subject)
        elif reads == "load":
            with Children(folder, shapes=shapes_of(subject)) as children:
                load = children.reports.load
        elif reads == "tokenizer":
            with Children(folder, golden=self.golden) as children:
                out = children.reports.out
        subject.reports = Reports(out, self.reports.aligned, load)
        return subject

    def checks(self, folder: Path, reads: str) -> dict[str, CheckResult]:
        return {check.name: check for check in judge(self.subject(folder, reads)).checks}


def make_clean(root: Path) -> Clean:
    """Write the pair and its merge, and ask the child processes about it."""
    write_model(root / "sft", seed=0)
    write_model(root / "aligned", seed=1)
    door.extrapolate(root / "sft", root / "aligned", root / "out", alpha=1.5, verify=False)
    aligned = open_checkpoint(parse_reference(str(root / "aligned"), role="ALIGNED"))
    golden = read_golden(VECTORS / "openchat.yml")
    subject = Subject(open_directory(root / "out"), aligned, golden=golden)
    with Children(root / "out", aligned, golden, shapes_of(subject)) as children:
        return Clean(root / "out", aligned, children.reports, golden)
