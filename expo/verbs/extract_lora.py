"""A PEFT adapter from a change: W_aligned − W_sft of every linear module as B·A (LoRA, 2106.09685)."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import expo
from expo.checkpoint.adapter import CONFIG, WEIGHTS
from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.checkpoint.names import is_of_kind
from expo.checkpoint.sidecars import CARD, is_tokenizer_file
from expo.compute.inputs import OpenFiles, Sources, fetch, read_tensor
from expo.compute.threads import side_by_side
from expo.errors import CheckpointError, OutputError
from expo.operators.decompose import factors, square_sum
from expo.operators.rules import Keep
from expo.output.claim import check_out
from expo.output.journal import fingerprint, identities
from expo.output.outputs import copy_file, write_file, write_manifest
from expo.output.staging import claimed
from expo.planning.build import build_plan
from expo.planning.chunks import CHUNK_BYTES, buffer_bytes
from expo.planning.matrices import is_router_gate
from expo.planning.plan import Plan, TensorJob
from expo.spec.request import Request

Progress = Callable[[int, int], None]

_PREFIX = "base_model.model."
_ITERATIONS = 2  # of the randomized SVD: the error is 3e-6 above the best
_SAVED = ("embeddings", "head", "norms")  # a bias would take the weight of its module with it
_CONV1D = frozenset({"gpt2"})  # model types whose linear modules hold the transpose


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
    """A placed adapter. `energy` is the share of ΣΔ² over all tensors that it holds."""

    out: Path
    modules: tuple[AdaptedModule, ...]
    others: tuple[OtherTensor, ...]
    energy: float
    scale: float
    written_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Piece:
    """What came of one tensor: entries of the adapter, and the squares of Δ and of what is missed."""

    entries: dict[str, Tensor]
    delta_square: float
    missed_square: float
    report: AdaptedModule | OtherTensor | None


def run_extract(
    request: Request,
    out: Path,
    keep: Keep,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    save_whole: bool = False,
    overwrite: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
) -> ExtractResult:
    """Write the adapter that turns SFT into aligned, or for scale = α into the ExPO model.

    Args:
        request: plain ExPO of the pair, without α.
        keep: `rank` or `energy`.
        scale: what PEFT multiplies B·A with.
        dtype: of the matrices; their error is in the report.
        save_whole: save what no B·A can hold (norms, embeddings, head) as `modules_to_save`.
        progress: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: the models do not fit, hold NaN, or are equal.
        OutputError: `out` is taken or cannot be written.
    """
    started = time.monotonic()
    plan = build_plan(request)
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    check_out(out, request, overwrite=overwrite)
    fetch(plan)
    known = identities(plan)
    jobs = [job for job in plan.jobs if job.action == "extrapolate"]
    files = OpenFiles()

    def one(job: TensorJob) -> _Piece:
        sources = Sources(files, buffer_bytes(CHUNK_BYTES))
        return _piece(job, plan, sources, keep, scale, dtype, save_whole)

    with claimed(out, request, overwrite=overwrite) as staging:
        staging.start_afresh(fingerprint(plan, known))
        try:
            pieces = list(side_by_side(one, jobs, threads, progress))
            content = _write(staging.path, plan, pieces, scale)
            write_manifest(staging.path, content | {"inputs": known})
            staging.place()
        except CheckpointError:
            staging.discard()
            raise
        except OSError as error:
            staging.discard()
            raise OutputError(f"{staging.out} cannot be written: {error.strerror}") from error
        finally:
            files.close()
    return ExtractResult(
        staging.out,
        tuple(p.report for p in pieces if isinstance(p.report, AdaptedModule)),
        tuple(p.report for p in pieces if isinstance(p.report, OtherTensor)),
        content["energy"],
        scale,
        sum((staging.out / name).stat().st_size for name in content["files"]),
        time.monotonic() - started,
    )


def _piece(
    job: TensorJob,
    plan: Plan,
    sources: Sources,
    keep: Keep,
    scale: float,
    dtype: torch.dtype,
    save_whole: bool,
) -> _Piece:
    if job.rows:
        return _Piece({}, 0.0, 0.0, OtherTensor(job.name, None, False, "has other rows in SFT"))
    assert job.base is not None
    aligned = read_tensor(sources, job.aligned, job.shape)
    base = read_tensor(sources, job.base, job.shape)
    delta = aligned - base
    square, norm = square_sum(delta), square_sum(base)
    if not math.isfinite(square):
        raise CheckpointError(f"{printable(job.name)} holds NaN or Inf: it is damaged")
    if square == 0.0:
        return _Piece({}, 0.0, 0.0, None)
    relative = math.sqrt(square / norm) if norm else None
    why = _why_not(job.name, job.shape)
    if why is not None:
        tied = plan.donor.ties_embeddings and is_of_kind(job.name, ("embeddings", "head"))
        saves = save_whole and not tied and is_of_kind(job.name, _SAVED)
        report = OtherTensor(job.name, relative, saves, why)
        # What is saved whole takes its place unscaled: at scale α, it is the extrapolated tensor.
        whole = {_PREFIX + job.name: (base + scale * delta).to(dtype)} if saves else {}
        return _Piece(whole, square, 0.0 if saves else square, report)
    matrix = delta.T.contiguous() if plan.donor.config.get("model_type") in _CONV1D else delta
    found = factors(matrix, keep, seed=plan.request.seed, name=job.name, iterations=_ITERATIONS)
    strength = found.right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    b, a = (found.left * strength).to(dtype), (found.right / strength[:, None]).to(dtype)
    missed = square_sum(matrix - b.float() @ a.float())
    module = job.name.removesuffix(".weight")
    entries = {
        f"{_PREFIX}{module}.lora_A.weight": a.contiguous(),
        f"{_PREFIX}{module}.lora_B.weight": b.contiguous(),
    }
    error = math.sqrt(missed / square)
    return _Piece(entries, square, missed, AdaptedModule(module, a.shape[0], error, relative))


def _why_not(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor is not the matrix of a linear module; None where it is one."""
    if len(shape) == 3:
        return "is a stack of experts, which is no linear module"
    for kind, what in {"embeddings": "an embedding", "head": "the head", "norms": "a norm", "biases": "a bias"}.items():  # fmt: skip
        if is_of_kind(name, (kind,)):
            return f"is {what}"
    if is_router_gate(name):
        return "is a router"
    return None if len(shape) == 2 and name.endswith(".weight") else "is no matrix"


def _write(folder: Path, plan: Plan, pieces: list[_Piece], scale: float) -> dict:
    """The files of the adapter; its manifest, without the inputs."""
    modules = [p.report for p in pieces if isinstance(p.report, AdaptedModule)]
    others = [p.report for p in pieces if isinstance(p.report, OtherTensor)]
    if not modules:
        raise CheckpointError(
            "no linear module differs between aligned and SFT: there is nothing to put in an adapter"
        )
    entries = {key: tensor for piece in pieces for key, tensor in piece.entries.items()}
    hashes = {WEIGHTS: write_file(folder / WEIGHTS, save(entries, metadata={"format": "pt"}))}
    config = json.dumps(_config(plan, modules, others, scale), indent=2) + "\n"
    hashes[CONFIG] = write_file(folder / CONFIG, config.encode())
    for sidecar in plan.sidecars:
        if is_tokenizer_file(sidecar.name):
            source = sidecar.files.local_path(sidecar.name)
            hashes[sidecar.name] = copy_file(source, folder / sidecar.name)
    whole = sum(piece.delta_square for piece in pieces)
    energy = 1.0 - sum(piece.missed_square for piece in pieces) / whole
    hashes[CARD] = write_file(folder / CARD, _card(plan, len(modules), energy, scale).encode())
    return {
        "schema": "expo.adapter/1",
        "sources": {role: checkpoint.files.label for role, checkpoint in plan.sources.items()},
        "scale": scale,
        "energy": energy,
        "modules": [asdict(module) for module in modules],
        "others": [asdict(other) for other in others],
        "versions": {"expo": expo.__version__, "torch": torch.__version__},
        "files": dict(sorted(hashes.items())),
    }


def _config(
    plan: Plan, modules: list[AdaptedModule], others: list[OtherTensor], scale: float
) -> dict:
    """`adapter_config.json`. s = lora_alpha/r is the same for every module, whatever its rank, so that
    readers without `alpha_pattern` (vLLM) scale alike."""
    rank = max(module.rank for module in modules)
    uneven = [module for module in modules if module.rank != rank]
    saved = sorted({other.tensor.rpartition(".")[0] for other in others if other.saved})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.sources["sft"].files.label,
        "revision": plan.sources["sft"].files.commit,
        "r": rank,
        "lora_alpha": _plain(scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": plan.donor.config.get("model_type") in _CONV1D,
        "inference_mode": True,
        "target_modules": [module.module for module in modules],
        "rank_pattern": {module.module: module.rank for module in uneven},
        "alpha_pattern": {module.module: _plain(scale * module.rank) for module in uneven},
        "modules_to_save": saved or None,
        "use_rslora": False,
        "use_dora": False,
    }


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _card(plan: Plan, modules: int, energy: float, scale: float) -> str:
    names = [_name(plan.sources[role]) for role in ("aligned", "sft")]
    sft = plan.sources["sft"].files
    front = ["---", "library_name: peft", "tags:", "- lora", "- expo"]
    front += [f"base_model: {sft.label}"] if sft.commit else []
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# What {names[0]} learned from {names[1]}, as an adapter",
            "",
            f"θ_aligned − θ_sft of {modules} linear modules as low-rank products, times {scale:g}; they "
            f"hold {100 * energy:.2f} % of the change's energy. Load it on {names[1]}.",
            "",
            f"Made with expo {expo.__version__}; the error of every module is in `expo.json`.",
            "",
        ]
    )


def _name(checkpoint: Checkpoint) -> str:
    return f"`{printable(checkpoint.label).replace('`', '')}`"
