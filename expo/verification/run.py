"""Verify a folder: start the child processes, gather the facts, run the table of checks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.files import Files, open_directory, open_remains
from expo.checkpoint.sidecars import is_model_sidecar, is_one_file, is_tokenizer_file
from expo.errors import SpecError, TokenizerError
from expo.output.manifest import Example
from expo.results import CheckResult, VerifyResult
from expo.spec.request import StopAt
from expo.temporary import temporary_folder
from expo.verification import (
    adapter,
    configuration,
    contents,
    generation,
    stopping,
    structure,
    template,
    tensors,
    tokenizer,
    values,
    vectors,
)
from expo.verification.budget import bounded, reports
from expo.verification.check import Check, Skipped, run
from expo.verification.conversations import CONVERSATIONS, MULTI_TURN, QUESTION, SINGLE, TEXTS
from expo.verification.golden import Golden, record
from expo.verification.process import Process
from expo.verification.subject import Reports, Subject, TensorFacts

Progress = Callable[[int, int], None]

CHECKS: tuple[Check, ...] = (
    *contents.CHECKS,
    *structure.CHECKS,
    *tensors.CHECKS,
    *values.CHECKS,
    *configuration.CHECKS,
    *stopping.CHECKS,
    *tokenizer.CHECKS,
    *template.CHECKS,
    *vectors.CHECKS,
    *generation.CHECKS,
)
"""The table, in the order in which a person reads it."""

_OF_ADAPTERS = (
    "shards", "orphans", "modes", "manifest", "card", "readable", "finite", "all-zero", "json", "tokenizer-loads",
    "template-copies", "template-renders", "one-bos", "prefix", "template-poison", "injection",
)  # fmt: skip

ADAPTER_CHECKS: tuple[Check, ...] = (
    *adapter.CHECKS,
    *(check for check in CHECKS if check.name in _OF_ADAPTERS),
)
"""The table for a LoRA adapter: what does not need the model that it is for."""

_GENERATION_BYTES, _GENERATION_SECONDS = 4 << 30, 3600  # beside the weights


Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor, by its name: all that building the model takes. Empty where the weights are
in another format, and lie in the folder."""


class Children:
    """The child processes: OUT's tokenizer and the donor's, and the model, built without its values.

    They read no weights, so a merge starts them before it streams. Where all that a tokenizer is made of is the same,
    byte for byte, one process speaks for both. Use as a context manager.
    """

    def __init__(
        self,
        out: Path,
        aligned: Checkpoint | None = None,
        golden: Golden | None = None,
        shapes: Shapes | None = None,
    ) -> None:
        """Start them. Without `shapes` the model is not built."""
        self._stack = ExitStack()
        conversations = [*CONVERSATIONS, *(golden.conversations if golden else [])]
        request = {
            "task": "tokenizer",
            "texts": [*TEXTS, *(golden.texts if golden else [])],
            "conversations": [conversation.request() for conversation in conversations],
        }
        try:
            load = {"task": "load", "tensors": shapes}
            self._load = None if shapes is None else self._start(load, out)
            self._out = self._start(request, out) if _has_tokenizer(open_directory(out)) else None
            self._aligned = None
            self._is_same = aligned is not None and _is_same_but_for_weights(out, aligned)
            if (
                aligned is not None
                and not self._is_same
                and _has_tokenizer(aligned.tokenizer_files)
            ):
                folder = self._stack.enter_context(_donor_folder(aligned))
                self._aligned = self._start(request, folder)
            started = [child for child in (self._out, self._aligned, self._load) if child]
            self._stack.enter_context(bounded(started))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def reports(self) -> Reports:
        """What came of them, when they have ended."""
        out, aligned, load = reports((self._out, self._aligned, self._load))
        return Reports(out, out if self._is_same else aligned, load)

    def example(self) -> Example | None:
        """What OUT's template makes of a short conversation, None where it makes nothing of it."""
        report = self.reports.out
        lines = [line for line in report.lines if "conversation" in line] if report else []
        for wanted in (MULTI_TURN, SINGLE):
            number = CONVERSATIONS.index(wanted)
            rendered = lines[number].get("rendered", "") if number < len(lines) else ""
            if QUESTION in rendered:
                turns = [(str(m["role"]), str(m["content"])) for m in wanted.messages]
                return Example(tuple(turns), rendered)
        return None

    def _start(self, request: dict, folder: Path) -> Process:
        return self._stack.enter_context(Process(request | {"folder": str(folder.resolve())}))


def children_of(out: Path, *, golden: Golden | None = None) -> Children:
    """Those that a verification of the whole folder by itself needs."""
    return Children(out, None, golden, shapes_of(Subject(open_directory(out))))


def verify_folder(
    out: Path,
    *,
    aligned: Checkpoint | None = None,
    golden: Golden | None = None,
    quick: bool = False,
    generate: bool = False,
    progress: Progress | None = None,
    stop_at: StopAt = "error",
    children: Children | None = None,
) -> VerifyResult:
    """Run every check on the directory `out`. Writes nothing there.

    Args:
        aligned: the donor, to compare with.
        golden: vectors that the tokenizer and the template must give.
        quick: read headers, configuration and tokenizer only.
        generate: build the model for real and let it answer a few prompts.
        progress: called with (bytes read, bytes in all).
        stop_at: from which severity on the folder does not verify.
        children: those of this folder, where they have been started already (`children_of`).
    """
    subject = Subject(open_directory(out), aligned, golden=golden)
    with (
        nullcontext(children)
        if children
        else Children(out, aligned, golden, shapes_of(subject)) as children
    ):
        if not quick:
            subject.tensor_facts = tensors.read_tensors(subject, progress)
        subject.reports = children.reports
    if generate:
        subject.reports = _generated(subject, aligned)
    return judge(subject, stop_at)


def verify_stream(
    out: Path,
    children: Children,
    facts: TensorFacts,
    *,
    gone: Mapping[str, tuple[bytes, int]],
    aligned: Checkpoint,
    sft: Files | None,
    asked_dtype: str | None,
    golden: Golden | None = None,
    stop_at: StopAt = "error",
    checking: Progress | None = None,
) -> VerifyResult:
    """Run the checks on what a merge has just written, with what its stream knows of the tensors.

    Args:
        gone: header and size in bytes of the shards that have left `out` already.
        checking: called with (steps done, steps in all).
    """
    steps = _steps(checking)
    steps(0)
    subject = Subject(
        open_remains(out, gone),
        aligned,
        sft,
        golden=golden,
        tensor_facts=facts,
        reports=children.reports,
        is_fresh=True,
    )
    subject.asked_dtype = asked_dtype
    steps(1)
    return judge(subject, stop_at, lambda done: steps(1 + done))


def _steps(checking: Progress | None) -> Callable[[int], None]:
    """How far a verification is: the wait for the child processes is a step, as every check is."""
    in_all = 1 + len(CHECKS)
    return (lambda done: checking(done, in_all)) if checking else lambda _: None


def judge(
    subject: Subject, stop_at: StopAt = "error", each: Callable[[int], None] = lambda _: None
) -> VerifyResult:
    """Run the table; `each` is called with the number of checks done."""
    results = tuple(_run_all(subject, each))
    bad = ("error",) if stop_at == "error" else ("error", "warning")
    return VerifyResult(all(result.status not in bad for result in results), results)


def _run_all(subject: Subject, each: Callable[[int], None]) -> Iterator[CheckResult]:
    for done, check in enumerate(ADAPTER_CHECKS if subject.is_adapter else CHECKS, 1):
        yield run(check, subject)
        each(done)


def record_vectors(out: Path) -> str:
    """Golden vectors, as YAML, of what the folder's tokenizer and template give.

    Raises:
        SpecError: there is no such directory.
        TokenizerError: there is no tokenizer, or it does not load.
    """
    check_directory(out)
    with Children(out) as children:
        subject = Subject(open_directory(out), reports=children.reports)
    try:
        found = subject.tokenizer
    except Skipped as reason:
        report = subject.reports.out
        why = report.failure if report and report.failure else reason
        raise TokenizerError(f"{out} has no tokenizer to record: {why}") from None
    return record(found.facts, found.texts, found.conversations, subject.out.label)


def check_model(out: Path) -> None:
    """Refuse what is neither a directory nor a model in one file."""
    if not (is_one_file(out) and out.exists()):
        check_directory(out)


def check_directory(out: Path) -> None:
    if not out.is_dir():
        what = "is a file, not a model directory" if out.exists() else "does not exist"
        raise SpecError(f"{out} {what}")


def shapes_of(subject: Subject) -> Shapes | None:
    """Those of a folder's tensors; None where the weights are known not to be whole, are codes, or are no model of
    transformers'."""
    try:
        tensors, _ = subject.tensors, subject.config
    except Skipped:
        return None
    if subject.is_bare or subject.coded:
        return None
    if not all(name.endswith(".safetensors") for name in subject.shards):
        return {}
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _generated(subject: Subject, aligned: Checkpoint | None) -> Reports:
    reports = subject.reports
    try:
        weight_bytes = sum(tensor.nbytes for tensor in subject.tensors.values())
        _ = subject.template
    except Skipped:
        return reports
    whole = aligned is not None and aligned.adapter is None and aligned.reference.model.path
    request = {
        "task": "generate",
        "folder": str(subject.folder.resolve()),
        "aligned": str(whole.resolve()) if whole else None,
        "conversations": [prompt.request() for prompt in generation.PROMPTS],
        "new_tokens": generation.NEW_TOKENS,
    }
    memory_bytes = _GENERATION_BYTES + 4 * weight_bytes
    with Process(request, memory_bytes=memory_bytes, seconds=_GENERATION_SECONDS) as process:
        return Reports(
            reports.out, reports.aligned, reports.load, process.report(_GENERATION_SECONDS)
        )


def _has_tokenizer(files: Files) -> bool:
    return any(map(is_tokenizer_file, files.sizes))


@contextmanager
def _donor_folder(aligned: Checkpoint) -> Iterator[Path]:
    """The donor's configuration and tokenizer in one folder, as OUT has them: links, no copies."""
    with temporary_folder() as folder:
        for name, files in _donor_files(aligned).items():
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files.local_path(name).resolve())
        yield folder


def _donor_files(aligned: Checkpoint) -> dict[str, Files]:
    """The donor's configuration and tokenizer, by name, and where each lies."""
    model = dict.fromkeys(filter(is_model_sidecar, aligned.files.sizes), aligned.files)
    tokenizer = aligned.tokenizer_files
    return model | dict.fromkeys(filter(is_tokenizer_file, tokenizer.sizes), tokenizer)


def _is_same_but_for_weights(out: Path, aligned: Checkpoint) -> bool:
    """Whether configuration and tokenizer of OUT are the donor's, byte for byte."""
    mine, theirs = open_directory(out), _donor_files(aligned)
    names = {name for name in mine.sizes if is_tokenizer_file(name) or is_model_sidecar(name)}
    return names == theirs.keys() and all(
        mine.sizes[name] == files.sizes[name] and mine.read(name) == files.read(name)
        for name, files in theirs.items()
    )
