"""What the checks look at: the folder, the aligned model, and what child processes and hashing said.

Nothing here judges. A fact that cannot be had raises `Skipped`, and the one check whose matter it is
reports why.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from expo.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from expo.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from expo.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, bare_weights, is_bare, read_shard
from expo.checkpoint.files import Directory, Files, read_json
from expo.checkpoint.headers import Shard, TensorInfo
from expo.checkpoint.names import INPUTS
from expo.checkpoint.quantized import coded_among, is_quantized
from expo.checkpoint.sidecars import MANIFEST, is_tokenizer_file
from expo.checkpoint.templates import DEFAULT
from expo.checkpoint.vocabulary import read_vocabulary
from expo.errors import CheckpointError
from expo.output.manifest import AdapterManifest, Manifest
from expo.results import CheckResult
from expo.verification.check import UNREAD, Skipped
from expo.verification.conversations import (
    BASICS,
    CONVERSATIONS,
    QUESTION,
    Basics,
    Conversation,
)
from expo.verification.golden import Golden
from expo.verification.process import Report

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Values:
    """What one tensor holds: its largest element and its norm. `zero_rows` are known of embeddings and heads.

    The sums over its elements w, and over the aligned model's a, are taken side by side: None where
    that one's tensor could not be read along (another shape, an adapter, not on this disk).
    """

    largest: float
    norm: float
    zero_rows: tuple[int, ...] = ()
    sums: "Sums | None" = None


@dataclass(frozen=True)
class Sums:
    """Σw², Σa², Σwa and Σ(w−a)²."""

    mine: float = 0.0
    theirs: float = 0.0
    both: float = 0.0
    apart: float = 0.0

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.mine) * math.sqrt(self.theirs)
        return self.both / norms if norms else 1.0

    @property
    def ratio(self) -> float:
        """Of the norms, mine over theirs."""
        return math.sqrt(self.mine / self.theirs) if self.theirs else 1.0

    @property
    def distance(self) -> float:
        """‖w − a‖ / ‖a‖."""
        return math.sqrt(self.apart / self.theirs) if self.theirs else 0.0


@dataclass(frozen=True)
class TensorFacts:
    """What the one read of every shard found: SHA-256 by file, what could not be read, and by
    tensor name what is in it. `aligned` is what was seen of the aligned model beside it."""

    sha256: dict[str, str]
    failures: tuple[str, ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)
    zero: frozenset[str] = frozenset()
    values: dict[str, Values] = field(default_factory=dict)
    aligned: "TensorFacts | None" = None


@dataclass(frozen=True)
class Tokenized:
    """A tokenizer as its child process reported it."""

    facts: dict
    texts: dict[str, dict]
    conversations: list[dict]
    failure: str | None

    def conversation(self, wanted: Conversation) -> dict:
        """What became of a canonical conversation: `rendered` and `ids`, or `error`."""
        number = CONVERSATIONS.index(wanted)
        if number >= len(self.conversations):
            raise Skipped(f"the child process {self.failure} before it came to {wanted.name}")
        return self.conversations[number]

    def says_its_text(self, wanted: Conversation) -> bool:
        return QUESTION in self.conversation(wanted).get("rendered", "")


@dataclass(frozen=True)
class Reports:
    """What the child processes said; None where they were not asked."""

    out: Report | None = None
    aligned: Report | None = None
    load: Report | None = None
    generation: Report | None = None


@dataclass
class Subject:
    """The folder under verification and all that is known about it.

    `aligned` is the donor, `sft` the files of the model before the alignment (for its template).
    A fresh folder is a merge's own, just written: its manifest comes last.
    """

    out: Files
    aligned: Checkpoint | None = None
    sft: Files | None = None
    golden: Golden | None = None
    tensor_facts: TensorFacts | None = None
    reports: Reports = Reports()
    is_fresh: bool = False

    @cached_property
    def as_donor(self) -> "Subject":
        """The aligned model in the place of the folder: what the same checks find there is shared."""
        files = self.donor.model_files
        facts = self.tensor_facts.aligned if self.tensor_facts else None
        return Subject(files, tensor_facts=facts, reports=Reports(out=self.reports.aligned))

    @property
    def donor(self) -> Checkpoint:
        if self.aligned is None:
            raise Skipped("no aligned model to compare with: add --against ALIGNED")
        return self.aligned

    @property
    def folder(self) -> Path:
        if not isinstance(self.out, Directory):
            raise Skipped("it is no local folder")
        return self.out.root

    def has(self, name: str) -> bool:
        return name in self.out.sizes

    def json(self, name: str) -> dict:
        """A JSON file of OUT, empty where there is none."""
        if not self.has(name):
            return {}
        try:
            return read_json(self.out, name)
        except CheckpointError as error:
            raise Skipped(f"{name} cannot be read") from error

    @property
    def config(self) -> dict:
        if not self.has("config.json"):
            raise Skipped("there is no config.json")
        if self.is_bare:
            raise Skipped("config.json is of another library than transformers")
        return self.json("config.json")

    def text_config(self, key: str) -> object:
        """A field of the config, or where it has none of its language model's."""
        inner = self.config.get("text_config")
        return self.config.get(key, inner.get(key) if isinstance(inner, dict) else None)

    @cached_property
    def is_bare(self) -> bool:
        """Whether it is weights alone: nothing says, or by the manifest said, that transformers loads them."""
        lost = "config.json" in self.listed.keys() - self.out.sizes.keys()
        try:
            return is_bare(self.out) and not (self.is_adapter or lost)
        except CheckpointError:
            return False

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a LoRA adapter, not a model."""
        return self.has(ADAPTER_CONFIG) and not self.has("config.json")

    def read_manifest(self) -> Manifest | AdapterManifest:
        """Raises CheckpointError: it cannot be read."""
        kind = AdapterManifest if self.is_adapter else Manifest
        return kind.from_json(self.out.read(MANIFEST))

    @cached_property
    def listed(self) -> dict[str, str]:
        """SHA-256 by name of every file that the manifest names, empty where the folder was not made by expo, or
        it cannot be read: that is the matter of the check of its name."""
        try:
            return self.read_manifest().listed if self.has(MANIFEST) else {}
        except CheckpointError:
            return {}

    @cached_property
    def manifest(self) -> Manifest | None:
        """A model's manifest, None as for `listed`."""
        try:
            found = self.read_manifest() if self.has(MANIFEST) else None
        except CheckpointError:
            return None
        return found if isinstance(found, Manifest) else None

    @property
    def was_merged(self) -> bool:
        """Whether expo made this folder: only then can its merge be run again."""
        return self.is_fresh or self.has(MANIFEST)

    @cached_property
    def found_at_merge(self) -> dict[str, CheckResult]:
        """What the merge's own verification came to, by check."""
        results = self.manifest.verification if self.manifest else None
        return {result.name: result for result in results or ()}

    @cached_property
    def asked_dtype(self) -> str | None:
        """The dtype that the merge was asked for, by its torch name."""
        asked = self.manifest.spec.get("out_dtype") if self.manifest else None
        return asked if isinstance(asked, str) else None

    @cached_property
    def index_name(self) -> str | None:
        """The index that a loader reads, if it reads one."""
        for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
            if self.has(index) and not self.has(single):
                return index
            if self.has(single):
                return None
        return bare_weights(self.out)[1] if self.is_bare else None

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor → file by the index; empty without one that can be read."""
        try:
            found = self.json(self.index_name).get("weight_map") if self.index_name else None
        except Skipped:
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        return {name: file for name, file in entries if isinstance(file, str)}

    @cached_property
    def weight_files(self) -> list[str]:
        """The weight files that a loader reads and that are there."""
        if self.is_adapter:
            return [ADAPTER_WEIGHTS] if self.has(ADAPTER_WEIGHTS) else []
        if self.index_name is not None:
            return [name for name in sorted(set(self.weight_map.values())) if self.has(name)]
        bare = bare_weights(self.out)[0] if self.is_bare else []
        return next(([name] for name in (SINGLE, BIN) if self.has(name)), bare)

    @cached_property
    def _headers(self) -> tuple[dict[str, Shard], dict[str, str]]:
        shards: dict[str, Shard] = {}
        faults: dict[str, str] = {}
        for name in self.weight_files:
            try:
                shards[name] = read_shard(self.out, name)
            except CheckpointError as error:
                faults[name] = str(error).removeprefix(f"{self.out.label}/")
        return shards, faults

    @property
    def shards(self) -> dict[str, Shard]:
        return self._headers[0]

    @property
    def shard_faults(self) -> dict[str, str]:
        return self._headers[1]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that a loader would find. Needs all shards: half a list misleads."""
        if self.shard_faults or not self.shards:
            raise Skipped("the weight files cannot all be read")
        missing = set(self.weight_map.values()) - self.shards.keys()
        if missing:
            raise Skipped("weight files are missing")
        return {t.name: t for shard in self.shards.values() for t in shard.tensors}

    @cached_property
    def coded(self) -> list[str]:
        """The tensors that hold codes or scales of a quantized model: what they stand for is not looked at."""
        tensors = [tensor for shard in self.shards.values() for tensor in shard.tensors]
        is_said = False
        with suppress(Skipped):
            is_said = is_quantized(self.json("config.json"))
        return [tensor.name for tensor in coded_among(tensors, is_said=is_said)]

    def require_numbers(self) -> None:
        """As `require_all_read`, for what is asked of values."""
        self.require_all_read()
        self.refuse_codes()

    def refuse_codes(self) -> None:
        if self.coded:
            raise Skipped("its weights are codes of a quantized model")

    @property
    def scanned(self) -> TensorFacts:
        if self.tensor_facts is None:
            raise Skipped("--quick reads no tensors")
        if not self.shards:
            raise Skipped("there are no weight files that can be read")
        return self.tensor_facts

    def require_all_read(self) -> None:
        """What was not looked at is not a pass."""
        _ = self.tensors
        if self.scanned.failures:
            raise Skipped("the weight files cannot all be read")

    @property
    def values(self) -> dict[str, Values]:
        self.refuse_codes()
        if not self.scanned.values:
            self.require_all_read()
            raise Skipped(UNREAD)
        return self.scanned.values

    @cached_property
    def tokenizer(self) -> Tokenized:
        """OUT's tokenizer as a fresh process sees it."""
        self.require_tokenizer()
        return _tokenized(self.reports.out, "the tokenizer did not load")

    @cached_property
    def donor_tokenizer(self) -> Tokenized:
        """The aligned model's tokenizer, loaded in the same way."""
        if not any(map(is_tokenizer_file, self.donor.tokenizer_files.sizes)):
            raise Skipped("the aligned model has no tokenizer")
        return _tokenized(
            self.reports.aligned, "the aligned model's tokenizer does not load either"
        )

    @cached_property
    def names(self) -> dict[int, str]:
        """OUT's token strings by id, for messages."""
        own = {index: token for token, index in self.tokenizer.facts["added"].items()}
        return (read_vocabulary(self.out) or {}) | own

    def require_tokenizer(self) -> None:
        if not any(map(is_tokenizer_file, self.out.sizes)):
            raise Skipped("there is no tokenizer")

    @property
    def template(self) -> str:
        """The chat template that is applied to a conversation without tools."""
        value = self.tokenizer.facts["template"]
        text = value.get(DEFAULT) if isinstance(value, dict) else value
        if text is None:
            raise Skipped("there is no chat template")
        return text

    @cached_property
    def basics(self) -> Basics:
        """The plainest conversations in the form that the template takes: text, or parts of it."""
        _ = self.template
        forms = [form for form in BASICS if self.tokenizer.says_its_text(form.question)]
        return forms[0] if forms else BASICS[0]

    @cached_property
    def rows(self) -> int | None:
        """Rows of the input embedding, None where there is not one such tensor."""
        tensors = [tensor for shard in self.shards.values() for tensor in shard.tensors]
        found = [t.shape[0] for t in tensors if t.name.endswith(INPUTS) and t.shape]
        return found[0] if len(found) == 1 else None

    @property
    def loads_by_itself(self) -> bool:
        """Whether transformers made model and tokenizer without any code of theirs."""
        return not any(r and r.failure for r in (self.reports.load, self.reports.out))

    @property
    def generates(self) -> bool:
        """Whether the model answers with text; without a config that says otherwise, it does."""
        names = self.config.get("architectures")
        return not any(
            "Classification" in str(a) for a in (names if isinstance(names, list) else ())
        )


def _tokenized(report: Report | None, otherwise: str) -> Tokenized:
    if report is None or (loaded := report.first("loaded")) is None:
        raise Skipped(otherwise)
    return Tokenized(
        loaded["loaded"],
        {line["text"]: line for line in report.lines if "text" in line},
        [line for line in report.lines if "conversation" in line],
        report.failure,
    )


def generated(report: Report | None, of: Literal["out", "aligned"]) -> dict[int, dict]:
    """The answers of one of the models, by the number of the prompt."""
    lines = [line for line in report.lines if "generated" in line] if report else []
    return {line["generated"]: line for line in lines if line["of"] == of}


def same_json(a: object, b: object) -> bool:
    """Equality that tells 1 from 1.0 and from true, as a strict reader does."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
