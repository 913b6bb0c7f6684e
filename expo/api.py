"""The functions of the public door: thin, typed, silent. The command line calls the same ones."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from expo.checkpoint.reference import parse_reference
from expo.errors import CheckpointError, SpecError
from expo.operators.rules import parse_keep
from expo.spec.request import (
    DTYPES,
    ROUNDINGS,
    Request,
    Rounding,
    dtype_name,
    expo_request,
    resolve_alpha,
)

if TYPE_CHECKING:
    from torch import Tensor

    from expo.planning.report import PlanReport
    from expo.verbs.diff import DiffResult
    from expo.verbs.extract_lora import ExtractResult
    from expo.verbs.merge import MergeResult
    from expo.verbs.spectrum import MatrixSpectrum
    from expo.verification.check import VerifyResult

Spec = Mapping[str, object] | str | PathLike[str] | Request
Progress = Callable[[int, int], None]


def extrapolate(
    sft: str | PathLike[str],
    aligned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    alpha: float,
    dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    verify: bool = True,
) -> "MergeResult":
    """Write θ_sft + α(θ_aligned − θ_sft) to the directory `out` (ExPO, arXiv 2404.16792).

    Args:
        sft, aligned: a directory, a Hub id (`org/name@revision`), or `model+adapter`.
        alpha: 0 is SFT, 1 is aligned, 1.5 is what the paper calls 0.5. Taken as given: a card's 0.3
            is 1.3 here (only the command line and specs refuse 0 < alpha < 1).
        dtype: of the output's floats; by default each tensor keeps the aligned model's.
        rounding: "nearest", or "stochastic" (seeded, unbiased).
        verify: run the quick checks of `expo.verify` on the output before it appears; it appears
            either way, `verified` of the result says what they found.

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    request = make_request(
        str(sft), str(aligned), alpha=alpha, dtype=dtype, rounding=rounding, seed=seed
    )
    return merge(request, out, verify=verify)


def merge(
    spec: Spec,
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> "MergeResult":
    """Run a merge spec (a YAML file, or a mapping of the same form) into the directory `out`.

    Args:
        overwrite: replace what `out` holds, once the new model is whole.
        verify: as in `extrapolate`.
        progress: called with (bytes written, bytes in all).

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    from expo.planning.build import build_plan
    from expo.spec.stages import read_stages
    from expo.verbs.merge import run_plan
    from expo.verbs.stages import run_stages

    def run(request: Request, place: Path, is_part: bool) -> "MergeResult":
        plan = build_plan(request)
        replaces = overwrite or is_part
        checks = verify and not is_part
        return run_plan(plan, place, overwrite=replaces, verify=checks, progress=progress)

    if isinstance(spec, Request | Mapping):
        return run(_request(spec), Path(out), False)
    return run_stages(read_stages(Path(spec)), Path(out), run)


def extract_lora(
    aligned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    minus: str | PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    alpha: float = 1.0,
    dtype: str = "float32",
    save_whole: bool = False,
    overwrite: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
) -> "ExtractResult":
    """Write α(θ_aligned − θ_sft) of the linear modules as a PEFT adapter for `minus`, the SFT model.

    Args:
        rank, energy: one of them: the rank of every module, or the share of ΣS² that it has to hold.
        alpha: 1 gives the aligned model, 1.5 the ExPO model of that α.
        dtype: of the adapter: "float32", "bfloat16" or "float16".
        save_whole: save norms, embeddings and head whole (`modules_to_save`).
        progress: called with (tensors done, tensors in all).

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    import torch

    from expo.verbs.extract_lora import run_extract

    if (rank is None) == (energy is None):
        raise SpecError("give rank or energy, one of them")
    keep = parse_keep(f"rank={rank}" if energy is None else f"energy={energy}")
    pair = (parse_reference(str(minus), role="SFT"), parse_reference(str(aligned), role="ALIGNED"))
    return run_extract(
        expo_request(*pair, None),
        Path(out),
        keep,
        scale=alpha,
        dtype=getattr(torch, dtype),
        save_whole=save_whole,
        overwrite=overwrite,
        threads=threads,
        progress=progress,
    )


def plan(spec: Spec) -> "PlanReport":
    """What a merge would do, from headers alone; `refusals` says why it would not run.

    Raises:
        SpecError, CheckpointError, HubError: an input cannot be used at all.
    """
    from expo.planning.build import build_plan
    from expo.planning.report import report

    return report(build_plan(_request(spec)))


def diff(
    a: str | PathLike[str], b: str | PathLike[str], *, progress: Progress | None = None
) -> "DiffResult":
    """How far checkpoint `b` is from `a`: per tensor, per module, in total.

    Raises:
        SpecError, CheckpointError, HubError: an input cannot be used at all.
    """
    from expo.planning.build import build_plan
    from expo.verbs.diff import run_diff

    request = expo_request(
        parse_reference(str(a), role="A"), parse_reference(str(b), role="B"), None
    )
    return run_diff(build_plan(request), progress=progress)


def verify(
    out: str | PathLike[str],
    *,
    against: str | PathLike[str] | None = None,
    vectors: str | PathLike[str] | None = None,
    quick: bool = False,
    generate: bool = False,
    progress: Progress | None = None,
) -> "VerifyResult":
    """Whether the model directory `out` is whole, tokenizes and speaks as it should.

    Tokenizer and template are tried in child processes: offline, without secrets or remote code.

    Args:
        against: the aligned model, to compare with: a directory, a Hub id, or `model+adapter`.
        vectors: a file of golden vectors (`expo.golden/1`).
        quick: read headers, configuration and tokenizer only, not the tensors.
        generate: build the model for real (in its size of memory) and let it answer.
        progress: called with (bytes read, bytes in all).

    Raises:
        SpecError: no such directory, or invalid vectors. What is wrong inside of `out` is a finding.
        CheckpointError, HubError: `against` cannot be read.
    """
    from expo.checkpoint.checkpoint import open_checkpoint
    from expo.verification.golden import read_golden
    from expo.verification.run import check_directory, verify_folder

    check_directory(Path(out))
    golden = None if vectors is None else read_golden(Path(vectors))
    aligned = None
    if against is not None:
        aligned = open_checkpoint(parse_reference(str(against), role="ALIGNED"))
    return verify_folder(
        Path(out),
        aligned=aligned,
        golden=golden,
        quick=quick,
        generate=generate,
        progress=progress,
    )


def spectrum(
    model: str | PathLike[str],
    *,
    minus: str | PathLike[str] | None = None,
    target: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
    values: dict[str, "Tensor"] | None = None,
) -> "tuple[MatrixSpectrum, ...]":
    """Singular values of every matrix, summed up; of the change since `minus`, if that is given.

    Args:
        target: only matrices in whose label (the tensor's full name, and the part of a fused one) this
            regular expression is found; by default those of the layers, without embeddings, head, norms and router gates.
        threads: matrices at a time, each on one core.
        progress: called with (matrices done, matrices in all).
        values: where to leave the singular values, float64 in descending order, by tensor.

    Raises:
        SpecError: `target` is not a regular expression.
        CheckpointError, HubError: an input cannot be used.
    """
    from expo.verbs.spectrum import run_spectrum

    try:
        re.compile(target or "")
    except re.error as error:
        raise SpecError(f"{target}: not a regular expression: {error}") from error
    base = None if minus is None else parse_reference(str(minus), role="BASE")
    reference = parse_reference(str(model), role="MODEL")
    return run_spectrum(
        reference, minus=base, pattern=target, threads=threads, progress=progress, values=values
    )


def apply(
    sft: Mapping[str, "Tensor"], aligned: Mapping[str, "Tensor"], *, alpha: float
) -> Iterator[tuple[str, "Tensor"]]:
    """θ_sft + α(θ_aligned − θ_sft) of two state dicts in memory, one (name, tensor) at a time.

    Floats are computed in float32 (float64 where an input is) and rounded once to the aligned
    tensor's dtype; integers and booleans must be equal. The bytes are those of `extrapolate`.

    Raises:
        SpecError: alpha is not finite.
        CheckpointError: names, shapes or integers differ, or a tensor is not finite.
    """
    from expo.compute.memory import apply_tensor

    value = resolve_alpha(alpha, None, interpolate=True)
    assert value is not None
    if sft.keys() != aligned.keys():
        names = ", ".join(sorted(sft.keys() ^ aligned.keys())[:5])
        raise CheckpointError(f"the state dicts do not hold the same tensors: {names}")
    for name, tensor in aligned.items():
        yield name, apply_tensor(name, sft[name], tensor, value)


def make_request(
    sft: str,
    aligned: str,
    *,
    alpha: float | None = None,
    paper_alpha: float | None = None,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> Request:
    """A checked request for the pair.

    Raises:
        SpecError: an argument is invalid.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    if dtype is not None and dtype not in DTYPES:
        raise SpecError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if rounding not in ROUNDINGS:
        raise SpecError(f"rounding {rounding} is not one of {', '.join(ROUNDINGS)}")
    request = expo_request(
        parse_reference(sft, role="SFT"),
        parse_reference(aligned, role="ALIGNED"),
        resolve_alpha(alpha, paper_alpha, interpolate=True),
    )
    chosen: Rounding = "stochastic" if rounding == "stochastic" else "nearest"
    return replace(request, dtype=dtype, rounding=chosen, seed=seed)


def _request(spec: Spec) -> Request:
    if isinstance(spec, Request):
        return spec
    from expo.spec.read import read_spec

    return read_spec(spec if isinstance(spec, Mapping) else Path(spec))
