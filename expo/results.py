"""What every verb returns: frozen dataclasses with the keys of `--json`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

Rounding = Literal["nearest", "stochastic"]
Status = Literal["pass", "info", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Statistics:
    """What a merge did, over some tensors. Shares are of the elements that both sides have.

    `alpha` is what was asked for over these tensors, `effective_alpha` what came out after rounding,
    `rounding_noise` the RMS of the rounding error over the RMS of the increment; None where Δ is
    zero. Of methods other than ExPO, Δ is the intended change and the asked α is 1.
    """

    elements: int
    alpha: float | None
    effective_alpha: float | None
    rounding_noise: float | None
    zero_share: float | None
    unmoved_share: float | None
    delta_norm: float
    delta_rms: float
    relative_delta: float | None
    nonfinite: int = 0  # a run that meets one is refused


@dataclass(frozen=True)
class Alternative:
    """What the other rounding would give, estimated from one block of every tensor."""

    rounding: Rounding
    effective_alpha: float | None
    rounding_noise: float | None


@dataclass(frozen=True)
class EditReport:
    """What an edit did to a matrix: rank kept of how many, share of ΣS² removed.

    `on` is "result", or the model whose Δ it was. The noise level and how well the bulk fits (0 is pure
    noise) are known where the whole spectrum was computed, `ulp_ratio` = σ̂/σ_ulp of a Δ as well.
    `gain` says of a randomized SVD by how much its last iteration still lowered the residual. `fell_back`: the
    device had no room for the matrix, and the processor cut it.
    """

    matrix: str
    on: str
    keep: str
    rank: int
    full_rank: int
    removed_energy: float
    noise_sigma: float | None
    bulk_fit: float | None
    ulp_ratio: float | None = None
    gain: float | None = None
    fell_back: bool = False


@dataclass(frozen=True)
class CheckResult:
    """What a check came to. `cure` is empty where there is nothing to cure."""

    name: str
    status: Status
    message: str
    cure: str


@dataclass(frozen=True)
class VerifyResult:
    """What `expo verify` found, in the order of the table; `ok` where no check found an error."""

    ok: bool
    checks: tuple[CheckResult, ...]


@dataclass(frozen=True)
class MergeResult:
    """A placed output; `modules` holds the parts of `statistics`.

    `engine` is "expo" or "mergekit", whose statistics are of no element. `edits` are the matrices that
    were cut, in the order of the files.
    `alpha` is None where it differs between tensors or models, or the method is not ExPO; `alpha_range` is
    what was asked for, from the lowest to the highest. `statistics.alpha` is what the exact result has of Δ:
    less where a part of Δ was cut.
    `verified` is None where the verification was skipped, else whether no check found an error.
    """

    out: Path
    method: str
    alpha: float | None
    paper_alpha: float | None
    statistics: Statistics
    alternative: Alternative | None
    modules: dict[str, Statistics]
    edits: tuple[EditReport, ...]
    written_bytes: int
    seconds: float
    warnings: tuple[str, ...]
    verified: bool | None
    checks: tuple[CheckResult, ...]
    engine: str = "expo"
    alpha_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerResult:
    """What one worker of several has done, where others are still to come.

    Of all `shards` of an output so many are `missing`, which are others' to compute.
    """

    outs: tuple[Path, ...]
    worker: str
    shards: int
    missing: int


@dataclass(frozen=True)
class SourceReport:
    """One side: what was taken for it, at which Hub commit if any."""

    model: str
    kind: str
    commit: str | None
    adapter: str | None
    adapter_commit: str | None


@dataclass(frozen=True)
class TensorReport:
    """Counts of what is computed and copied, names of what does not fit."""

    matched: int
    copied: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    edited_matrices: int


Part = Literal["disk", "bus", "compute", "hash"]


@dataclass(frozen=True)
class Bound:
    """What a run on a device waits for most: `limit`, by rates that were measured on this machine just before.

    `seconds` is what each would take by itself. The disk is left out where inputs lie elsewhere, the bus of the
    processor does not count. `rates`, a second: bytes of `disk`, `to_device`, `from_device` and `hash`, `elements` of the
    pair's formula (on the device; `elements_here` on this processor), of matrices that are edited `spectrum` in m²n
    and `small_rank` in m·n·rank. `says` is what follows, in one sentence.
    """

    device: str
    backend: str
    limit: Part
    seconds: dict[Part, float]
    rates: dict[str, float]
    says: str


@dataclass(frozen=True)
class CodingNoise:
    """The noise that the codes of quantized inputs leave in the change, estimated from a sample of `tensors` tensors:
    RMS an element of the noise and of the change itself, and their `ratio`, 100 where it is more."""

    ratio: float
    noise_rms: float
    delta_rms: float
    tensors: int


@dataclass(frozen=True)
class PlanReport:
    """What a merge would do. It runs only where `refusals` is empty.

    Of a spec of several documents, `expo.plan` gives the last one's, or that of the first one that would be
    refused; `earlier` are those before it.

    `sources` are all models by their role; `sft` and `aligned` are None where there is no such role.
    `alpha` is None where it differs between tensors or models, `alpha_range` what it ranges over. `out` is None
    where no place was named, `bound` where no device was, `noise` where no input of an extrapolation is quantized.
    """

    method: str
    engine: str
    sft: SourceReport | None
    aligned: SourceReport | None
    sources: dict[str, SourceReport]
    alpha: float | None
    paper_alpha: float | None
    alpha_range: tuple[float, float] | None
    dtypes: tuple[str, ...]
    rounding: str
    seed: int
    tensors: TensorReport
    read_bytes: int
    write_bytes: int
    download_bytes: int
    stream_bytes: int
    memory_bytes: int
    free_disk_bytes: int
    shards: dict[str, int]
    tokenizer_donor: str | None
    sidecars: tuple[str, ...]
    left_behind: dict[str, int]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]
    earlier: "tuple[PlanReport, ...]" = ()
    out: Path | None = None
    bound: Bound | None = None
    noise: CodingNoise | None = None

    @property
    def ok(self) -> bool:
        return not self.refusals


@dataclass(frozen=True)
class DeltaStatistics:
    """How far B is from A. Norms are Frobenius norms, `delta_rms` is per element."""

    elements: int
    delta_norm: float
    delta_rms: float
    relative_delta: float | None
    zero_share: float | None
    cosine: float | None


@dataclass(frozen=True)
class ModuleDelta:
    """One module of one layer; layer is None outside the layers."""

    layer: int | None
    module: str
    statistics: DeltaStatistics


@dataclass(frozen=True)
class DiffResult:
    """`missing` is only in B, `extra` only in A, `mismatched` differs in shape or kind."""

    a: str
    b: str
    total: DeltaStatistics
    tensors: dict[str, DeltaStatistics]
    modules: tuple[ModuleDelta, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    references: dict[str, float]
    notes: tuple[str, ...]

    @property
    def same_structure(self) -> bool:
        return not (self.missing or self.extra or self.mismatched)


@dataclass(frozen=True)
class MatrixSpectrum:
    """One matrix: noise level and edge in its units, ranks by each rule, signal against noise.

    `snr_compat` is Spectrum's (None where that is infinite), `bulk_fit` the Kolmogorov–Smirnov distance
    of what lies below the edge to pure noise. `fell_back`: the device had no room for it, the processor did it.
    """

    tensor: str
    shape: tuple[int, int]
    noise_sigma: float
    mp_edge: float
    rank_mp: int
    rank_gavish_donoho: int
    rank_laser_rmt: int
    snr_mp: float | None
    snr_compat: float | None
    effective_rank: float
    bulk_fit: float | None
    fell_back: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ChangeSpectrum(MatrixSpectrum):
    """The same of a change; `ulp_ratio` = noise_sigma over the noise of one rounding of the weights.

    Near 1 the bulk is rounding noise; √2 is what two independent roundings give. None where an
    adapter's change was never rounded.
    """

    ulp_ratio: float | None


@dataclass(frozen=True)
class AdaptedModule:
    """A module of the adapter: `error` = ‖Δ − s·B·A‖/‖Δ‖ as stored, `relative_delta` = ‖Δ‖/‖W_sft‖, None where
    that is not defined."""

    module: str
    rank: int
    error: float
    relative_delta: float | None


@dataclass(frozen=True)
class OtherTensor:
    """A changed tensor that is not in B·A: `saved` whole, or left as it is in SFT, and why."""

    tensor: str
    relative_delta: float | None
    saved: bool
    why: str


@dataclass(frozen=True)
class ExtractResult:
    """A placed adapter. `energy` is the share of ΣΔ² over all tensors that it holds; `modules` is empty where it
    was an adapter before."""

    out: Path
    modules: tuple[AdaptedModule, ...]
    others: tuple[OtherTensor, ...]
    energy: float
    scale: float
    written_bytes: int
    seconds: float
    verified: bool | None
    checks: tuple[CheckResult, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardResult:
    """A model card. `files` were written; `license` is the Hub's id, None where it is not clear, which
    `warnings` explain."""

    text: str
    license: str | None
    warnings: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Paired:
    """A mean over `n` prompts, the interval that covers it at the level asked for, its standard error."""

    mean: float
    low: float
    high: float
    standard_error: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SweepPoint:
    """A candidate: what it is (`at`), and what it came to on the prompts it was tried on.

    `alpha` and `paper_alpha` are None where something else was swept. `difference` is the paired
    difference of its reward to the baseline's, None of the baseline itself. `length` is in tokens;
    `repetition` the share of 4-grams that came before; `log_likelihood` that of its answers under the
    baseline, in nats a token, and `perplexity` its exponential. `beyond_cliff` is a bound: such a
    candidate is not chosen.
    """

    at: dict[str, float]
    alpha: float | None
    paper_alpha: float | None
    prompts: int
    reward: Paired
    difference: Paired | None
    second_reward: Paired | None
    length: float
    unfinished: float
    repetition: float
    log_likelihood: float
    perplexity: float
    beyond_cliff: bool


@dataclass(frozen=True)
class Verdict:
    """What the sweep came to. `at` is what to publish: the candidate where it beats the baseline, else the
    baseline.

    The candidate was chosen on one half of the prompts; `reward` is its mean on the other half, the
    differences are candidate − baseline there, the pairs (baseline, candidate). `detectable` is the
    difference that this half would have shown in four of five trials.
    """

    at: dict[str, float]
    beats: bool
    candidate: dict[str, float]
    best: dict[str, float]
    prompts: int
    reward: Paired
    difference: Paired
    second_reward: Paired | None
    at_matched_length: Paired | None
    length: tuple[float, float]
    unfinished: tuple[float, float]
    repetition: tuple[float, float]
    accuracy: tuple[float, float] | None
    accuracy_difference: Paired | None
    detectable: float
    text: str


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep; `points` in rising order. `chosen` is the spec of `verdict.at`."""

    out: Path
    baseline: dict[str, float]
    points: tuple[SweepPoint, ...]
    verdict: Verdict
    prompts: int
    answers: int
    chosen: Path
    plot: Path | None
    seconds: float


@dataclass(frozen=True)
class EvaluateResult:
    """A file of answers. `reward` is the mean of the answers kept, `first_reward` of each prompt's first.

    `length` is in tokens a conversation, None where a server did not say; `unfinished_share` of the
    conversations had no room to end.
    """

    out: Path
    format: str
    generator: str
    prompts: int
    candidates: int
    length: float | None
    unfinished_share: float
    reward: Paired | None
    first_reward: float | None
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """One line of a results file (`expo.results/1`).

    `task` is the dataset's own name of a part of it, `interval` the value's (low, high), `source` a link to the run,
    `model` another model that was measured alike: it gets a column beside this one's.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    dataset: str
    metric: str
    value: float
    task: str | None = None
    interval: tuple[float, float] | None = None
    source: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class CompareResult:
    """B against A on the same prompts. `difference` is B − A, `win_rate` the share on which B is better.

    The `matched` ones hold were the answers equally long (`length_unit`), None with fewer than four prompts.
    `detectable` is the difference that these prompts would have shown in four of five trials.
    """

    a: str
    b: str
    prompts: int
    mean_a: float
    mean_b: float
    difference: Paired
    win_rate: Paired
    matched_difference: Paired | None
    matched_win_rate: Paired | None
    detectable: float
    length_a: float
    length_b: float
    length_unit: Literal["tokens", "characters"]


@dataclass(frozen=True)
class DemoPoint:
    """One model of the demo. `reward` is the mean probability of the preferred answer."""

    alpha: float
    paper_alpha: float
    effective_alpha: float | None
    reward: float


@dataclass(frozen=True)
class DemoResult:
    out: Path
    points: tuple[DemoPoint, ...]
    plot: Path | None

    @property
    def best(self) -> DemoPoint:
        return max(self.points, key=lambda point: point.reward)


@dataclass(frozen=True)
class PublishPlan:
    """What a publication would do. Files are listed by name with their bytes.

    `send` are those that the branch lacks or has in another version, `skip` those that it has, `delete` weights
    and indexes there that the manifest does not name, `keep` whatever else is there, `leave` what lies in OUT and
    is not of the model. `signs`: a signature is made and sent too. `head` is None where the repository is new.
    """

    repo_id: str
    url: str
    revision: str
    is_new: bool
    private: bool
    pull_request: bool
    account: str
    head: str | None
    licence: str
    send: dict[str, int]
    skip: dict[str, int]
    delete: dict[str, int]
    keep: dict[str, int]
    leave: dict[str, int]
    signs: bool
    bytes_to_send: int
    bytes_in_all: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PublishResult:
    """A receipt: what the commit at `url` holds of OUT (`files`, SHA-256 by name), checked on the Hub.

    `bytes_sent` are of files that the branch lacked, `bytes_skipped` of those that it had. `pull_request` is its
    URL where one was opened.
    """

    url: str
    commit: str
    files: dict[str, str]
    bytes_sent: int
    bytes_skipped: int
    deleted: tuple[str, ...]
    pull_request: str | None


@dataclass(frozen=True)
class PushPlan:
    """What a push would do: the merge, and the publication as far as it is known before (the shards' hashes are not:
    they are all in `send`). `staging` is where it works, of which it takes up to `staging_bytes`."""

    merge: PlanReport
    publish: PublishPlan
    staging: Path
    staging_bytes: int


@dataclass(frozen=True)
class PushResult:
    """A merge that went to the Hub: `merge.out` is the repository's id. `unchecked` are the checks that need weights
    on a disk: `expo verify` of a download makes up for them."""

    merge: MergeResult
    receipt: PublishResult
    unchecked: tuple[str, ...]
