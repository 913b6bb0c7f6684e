"""`expo extract-lora`: W_aligned − W_sft of every linear module as B·A, a PEFT adapter (LoRA, 2106.09685)."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from expo.checkpoint.adapter import PREFIX, WEIGHTS
from expo.checkpoint.headers import printable
from expo.checkpoint.names import is_of_kind
from expo.checkpoint.reference import parse_reference
from expo.compute.choice import arithmetic_for
from expo.compute.decompositions import Decompositions
from expo.compute.inputs import Inputs, Readers, fetch, read_tensor
from expo.compute.stream import Tuning
from expo.errors import CheckpointError, SpecError
from expo.operators.decompose import factors, square_sum
from expo.operators.rules import Keep, parse_keep
from expo.operators.spectra import Library
from expo.output.durable import write_file
from expo.output.journal import identities
from expo.output.manifest import AdapterManifest, Identities, source_entry, versions
from expo.planning.build import build_plan
from expo.planning.chunks import CHUNK_BYTES, buffer_bytes
from expo.planning.edits import rank_above
from expo.planning.findings import fell_back, listing
from expo.planning.jobs import Blend, TensorJob
from expo.planning.matrices import is_router_gate
from expo.planning.noise import noise_refusal
from expo.planning.plan import Plan
from expo.results import AdaptedModule, ExtractResult, OtherTensor
from expo.spec.request import ADAPTER_DTYPES, Request, dtype_name, expo_request, resolve_alpha
from expo.threads import side_by_side
from expo.verbs.adapters import (
    adapter_staging,
    between,
    extract_result,
    finish,
    plain,
    write_beside,
)
from expo.verbs.manifests import device_flags

Progress = Callable[[int, int], None]

_ITERATIONS = 2  # of the randomized SVD: the error is 3e-6 above the best
_SAVED = ("embeddings", "head", "norms")  # a bias would take the weight of its module with it
_CONV1D = frozenset({"gpt2"})  # model types whose linear modules hold the transpose


@dataclass(frozen=True)
class _Piece:
    """What came of one tensor: entries of the adapter, the squares of Δ and of what is missed, the shape of the
    matrix that was taken apart, and its name where that `fell_back` from a device to the processor."""

    entries: dict[str, Tensor]
    delta_square: float
    missed_square: float
    report: AdaptedModule | OtherTensor | None
    shape: tuple[int, ...] = ()
    fell_back: tuple[str, ...] = ()


def extract_lora(
    aligned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    minus: str | PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    alpha: float = 1.0,
    interpolate: bool = False,
    dtype: str = "float32",
    save_whole: bool = False,
    overwrite: bool = False,
    force: bool = False,
    threads: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExtractResult:
    """Write α(θ_aligned − θ_sft) of the linear modules as a PEFT adapter for `minus`, the SFT model.

    Args:
        rank, energy: one of them: the rank of every module, or the share of ΣS² that it has to hold.
        alpha: 1 gives the aligned model, 1.5 the ExPO model of that α.
        interpolate: allow 0 < alpha < 1.
        dtype: of the adapter: "float32", "bfloat16" or "float16".
        save_whole: save norms, embeddings and head whole (`modules_to_save`).
        force: extrapolate quantized models whose noise outweighs the change.
        device: "cpu", "cuda" or "cuda:1": where matrices are taken apart.
        progress: called with (tensors done, tensors in all).

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    if (rank is None) == (energy is None):
        raise SpecError("give rank or energy, one of them")
    if (name := dtype_name(dtype)) not in ADAPTER_DTYPES:
        raise SpecError(f"dtype {dtype} is not one of {', '.join(ADAPTER_DTYPES)}")
    keep = parse_keep(f"rank={rank}" if energy is None else f"energy={energy}")
    alpha = resolve_alpha(alpha, None, interpolate=interpolate) or 0.0
    pair = parse_reference(str(minus), role="SFT"), parse_reference(str(aligned), role="ALIGNED")
    how = _How(keep, alpha, getattr(torch, name), save_whole, force)
    return _run(
        expo_request(*pair, None),
        Path(out),
        how,
        Tuning.on(device, threads),
        overwrite=overwrite,
        progress=progress,
    )


@dataclass(frozen=True)
class _How:
    """What the adapter is to hold: `scale` is what PEFT multiplies B·A with, `dtype` that of the matrices."""

    keep: Keep
    scale: float
    dtype: torch.dtype
    save_whole: bool
    force: bool

    def flags(self) -> tuple[str, ...]:
        """On the command line."""
        name, _, value = str(self.keep).partition("=")
        dtype = str(self.dtype).removeprefix("torch.")
        flags = (
            f"--{name}",
            value,
            "--alpha",
            f"{self.scale:.12g}",
            *between(self.scale),
            "--dtype",
            dtype,
        )
        more = {"--save-whole": self.save_whole, "--force": self.force}
        return (*flags, *(flag for flag, is_given in more.items() if is_given))


def _run(
    request: Request,
    out: Path,
    how: _How,
    tuning: Tuning,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> ExtractResult:
    started = time.monotonic()
    plan = build_plan(request)
    if names := sorted({*plan.missing, *plan.extra}):
        raise CheckpointError(
            f"{plan.sources['sft'].label} and {plan.donor.label} do not hold the same tensors "
            f"({listing(map(printable, names))}): is --minus the model that the other was trained from?"
        )
    if refusals := (*plan.refusals, *noise_refusal(plan.noise, (how.scale,), force=how.force)):
        raise CheckpointError("; ".join(refusals))
    fetch(plan)
    known = identities(plan)
    jobs = [job for job in plan.jobs if isinstance(job.rule, Blend)]
    readers, by = Readers(), Decompositions(tuning.device)

    def one(job: TensorJob) -> _Piece:
        inputs = Inputs(readers, buffer_bytes(CHUNK_BYTES))
        return _piece(job, plan, inputs, how, by)

    with readers, adapter_staging(plan, out, known, overwrite=overwrite) as staging:
        pieces = list(side_by_side(one, jobs, tuning.threads, progress))
        manifest = _write(staging.folder, plan, pieces, how, known, tuning.backend)
        manifest = finish(staging.folder, manifest, plan.sources["sft"])
    return extract_result(staging.out, manifest, time.monotonic() - started)


def _piece(job: TensorJob, plan: Plan, inputs: Inputs, how: _How, by: Decompositions) -> _Piece:
    if job.rows:
        return _Piece({}, 0.0, 0.0, OtherTensor(job.name, None, False, "has other rows in SFT"))
    assert isinstance(job.rule, Blend)
    why = _why_not(job.name, job.shape)
    tied = plan.donor.ties_embeddings and is_of_kind(job.name, ("embeddings", "head"))
    saves = why is not None and how.save_whole and not tied and is_of_kind(job.name, _SAVED)
    aligned = base = delta = torch.empty(0)
    square = norm = 0.0
    for aligned, base in _sides(job, inputs, whole=why is None or saves):
        delta = aligned - base
        square, norm = square + square_sum(delta), norm + square_sum(base)
    if not math.isfinite(square):
        raise CheckpointError(f"{printable(job.name)} holds NaN or Inf: it is damaged")
    if square == 0.0:
        return _Piece({}, 0.0, 0.0, None)
    relative = math.sqrt(square / norm) if norm else None
    if why is not None:
        report = OtherTensor(job.name, relative, saves, why)
        # What is saved whole takes its place unscaled: at scale α, it is the extrapolated tensor.
        whole = {PREFIX + job.name: (base + how.scale * delta).to(how.dtype)} if saves else {}
        return _Piece(whole, square, 0.0 if saves else square, report)
    matrix = delta.T.contiguous() if plan.donor.config.get("model_type") in _CONV1D else delta
    work = partial(_product, how=how, seed=plan.request.seed, name=job.name)
    (b, a, missed), is_processors = by.of(matrix, work)
    module = job.name.removesuffix(".weight")
    entries = {
        f"{PREFIX}{module}.lora_A.weight": a.contiguous(),
        f"{PREFIX}{module}.lora_B.weight": b.contiguous(),
    }
    error = math.sqrt(missed / square)
    report = AdaptedModule(module, a.shape[0], error, relative)
    fallen = (job.name,) if is_processors else ()
    return _Piece(entries, square, missed, report, tuple(matrix.shape), fallen)


def _sides(job: TensorJob, inputs: Inputs, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensor of both models, aligned first: `whole`, or where that is not needed a stack of matrices one by one."""
    assert isinstance(job.rule, Blend)
    shape = job.shape if whole or len(job.shape) < 3 else job.shape[-2:]
    count, arithmetic = math.prod(shape), arithmetic_for(job)
    for first in range(0, job.count, max(count, 1)):
        aligned, base = (
            torch.from_numpy(read_tensor(inputs, side, count, arithmetic, first=first)).view(shape)
            for side in (job.rule.terms[0].weight, job.rule.start)
        )
        yield aligned, base


def _product(
    matrix: Tensor, library: Library, *, how: _How, seed: int, name: str
) -> tuple[Tensor, Tensor, float]:
    """B and A as the adapter has them, and the square of what B·A misses of the matrix."""
    found = factors(matrix, how.keep, seed=seed, name=name, iterations=_ITERATIONS, library=library)
    strength = found.right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    b, a = (found.left * strength).to(how.dtype), (found.right / strength[:, None]).to(how.dtype)
    return b.cpu(), a.cpu(), square_sum(matrix - b.float() @ a.float())


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


def _nothing(others: list[OtherTensor]) -> str:
    """Why there is no adapter."""
    text = "no linear module differs between aligned and SFT: there is nothing to put in an adapter"
    if not others:
        return text
    names = [f"{printable(other.tensor)} ({other.why})" for other in others]
    return f"{text}; what differs is {listing(names)}: only `expo extrapolate` takes that along"


def _write(
    folder: Path,
    plan: Plan,
    pieces: list[_Piece],
    how: _How,
    inputs: Identities,
    backend: str,
) -> AdapterManifest:
    """The files of the adapter; its manifest."""
    modules = [p.report for p in pieces if isinstance(p.report, AdaptedModule)]
    others = [p.report for p in pieces if isinstance(p.report, OtherTensor)]
    if not modules:
        raise CheckpointError(_nothing(others))
    entries = {key: tensor for piece in pieces for key, tensor in piece.entries.items()}
    hashes = {WEIGHTS: write_file(folder / WEIGHTS, save(entries, metadata={"format": "pt"}))}
    hashes |= write_beside(folder, _config(plan, modules, others, how.scale), plan.sidecars)
    whole = sum(piece.delta_square for piece in pieces)
    return AdapterManifest(
        sources={role: source_entry(checkpoint) for role, checkpoint in plan.sources.items()},
        scale=how.scale,
        energy=1.0 - sum(piece.missed_square for piece in pieces) / whole,
        modules=tuple(modules),
        others=tuple(others),
        warnings=(
            *plan.warnings,
            *rank_above(how.keep, [piece.shape for piece in pieces if piece.shape]),
            *fell_back(name for piece in pieces for name in piece.fell_back),
        ),
        versions=versions("torch"),
        files=dict(sorted(hashes.items())),
        inputs=inputs,
        command=("extract-lora", *how.flags(), *device_flags(backend)),
        backend=backend,
    )


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
        "lora_alpha": plain(scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": plan.donor.config.get("model_type") in _CONV1D,
        "inference_mode": True,
        "target_modules": [module.module for module in modules],
        "rank_pattern": {module.module: module.rank for module in uneven},
        "alpha_pattern": {module.module: plain(scale * module.rank) for module in uneven},
        "modules_to_save": saved or None,
        "use_rslora": False,
        "use_dora": False,
    }
