"""Matrices on a device: spectra by torch's library against a float64 SVD, merges and verbs that lend it matrices, and
what becomes of those that it has no room for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import expo as door
from expo.compute.decompositions import Decompositions
from expo.compute.device import Device
from expo.compute.stream import Tuning
from expo.demo.toy import MODELS
from expo.operators import spectra
from expo.operators.decompose import cut, factors, singular_values
from expo.operators.rules import parse_keep
from expo.operators.spectra import LAPACK, ON_DEVICE, ON_DEVICE_DOUBLE, Library
from expo.output.manifest import AdapterManifest, Manifest, read_manifest
from expo.planning.build import build_plan
from expo.spec.read import read_request
from expo.verbs.manifests import device_flags

from .conftest import Ran, run_plan
from .devices import PLACES, Full, needs_cuda
from .test_decompose import RULES, SHAPES, noise, reference, spiked

LIBRARIES = [pytest.param(ON_DEVICE, id="float32"), pytest.param(ON_DEVICE_DOUBLE, id="float64")]
SFT, ALIGNED = str(MODELS / "sft"), str(MODELS / "aligned")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kept_part_is_the_svds(
    shape: tuple[int, int], library: Library, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectra, "_BLOCK", 1 << 13)  # several blocks of columns of every matrix
    for rule in RULES:
        matrix, keep = spiked(*shape), parse_keep(rule)
        expected, rank = reference(matrix, keep)
        got = cut(matrix.to(place), keep, library=library)
        assert got.rank == rank
        assert got.matrix.dtype == torch.float32
        assert got.matrix.is_contiguous()
        error = float((got.matrix.cpu() - expected).norm() / expected.norm())
        assert error < (
            1e-3 if got.gain is not None else 1e-4
        )  # randomized where the rank is small
        removed = 1 - float(expected.square().sum() / matrix.double().square().sum())
        assert got.removed_energy == pytest.approx(removed, abs=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("strongest", [5.0, 3000.0])
def test_spectra_of_noise_under_a_signal(strongest: float, library: Library, place: str) -> None:
    for shape in SHAPES:
        matrix = spiked(*shape, strongest=strongest)
        exact = torch.linalg.svdvals(matrix.double())
        got = singular_values(matrix.to(place), library)
        assert (got.dtype, got.device.type) == (torch.float64, "cpu")
        assert float((got - exact).abs().max()) < 2e-4 * float(exact[len(exact) // 2])
        for rule in ("mp", "laser_rmt", "rho=0.5"):
            expected, rank = reference(matrix, parse_keep(rule))
            done = cut(matrix.to(place), parse_keep(rule), library=library)
            assert done.rank == rank
            assert float((done.matrix.cpu() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("library", LIBRARIES)
def test_products_are_first_in_the_dtype_that_a_device_is_good_at(library: Library) -> None:
    asked: list[torch.dtype] = []

    def reduce(short: Tensor, dtype: torch.dtype, *, with_vectors: bool) -> spectra.Spectrum:
        asked.append(dtype)
        return library.reduce(short, dtype, with_vectors=with_vectors)

    watched = Library(reduce, library.first, library.blocks)
    for strongest, again in ((5.0, False), (3000.0, True)):
        for work in (lambda m: cut(m, parse_keep("mp"), library=watched), lambda m: singular_values(m, watched)):  # fmt: skip
            asked.clear()
            work(spiked(96, 240, strongest=strongest))
            is_repeated = again and library is ON_DEVICE
            assert asked == [library.first, *([torch.float64] if is_repeated else [])]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("rule", ["rank=3", "rank=30", "energy=0.9"])
def test_factors_are_the_kept_part(rule: str, library: Library) -> None:
    for shape in ((160, 160), (64, 512), (512, 64)):
        matrix = spiked(*shape)
        found = factors(matrix, parse_keep(rule), iterations=6, library=library)
        expected, rank = reference(matrix, parse_keep(rule))
        assert found.left.shape == (shape[0], rank)
        assert float((found.left @ found.right - expected).norm() / expected.norm()) < 1e-4


def test_degenerate_matrices() -> None:
    for matrix in (torch.zeros(20, 30), torch.ones(20, 30), torch.ones(1, 7), torch.ones(7, 1)):
        for rule in ("energy=1", "mp", "rank=1", "shrink=frobenius"):
            for library in (ON_DEVICE, ON_DEVICE_DOUBLE):
                got = cut(matrix, parse_keep(rule), library=library)
                assert torch.allclose(got.matrix, cut(matrix, parse_keep(rule)).matrix, atol=1e-6)


def test_a_small_rank_starts_alike_on_every_device() -> None:
    matrix, keep = noise(320, 480), parse_keep("rank=9")
    here = cut(matrix, keep, seed=3, name="a")
    there = cut(matrix, keep, seed=3, name="a", library=ON_DEVICE_DOUBLE)
    assert torch.equal(here.matrix, there.matrix)


@pytest.mark.parametrize(("rule", "every"), [("rank=3", 1), ("mp", 3), ("rho=0.9", 4)])
def test_a_matrix_without_room_is_tried_alone_and_then_goes_to_the_processor(
    rule: str, every: int
) -> None:
    matrix, keep, whole = spiked(64, 96), parse_keep(rule), Full(lambda *_: False)
    there, _ = Decompositions(whole).cut(matrix, keep, name="m")
    for number in range(1, whole.done + 1, every):
        once = Decompositions(Full(lambda done, _, at=number: done == at))
        done, fell_back = once.cut(matrix, keep, name="m")
        assert torch.equal(done.matrix, there.matrix)
        assert not fell_back
    here = cut(matrix, keep, name="m")
    for number in range(1, whole.done, 15):
        ever = Decompositions(Full(lambda done, _, at=number: done >= at))
        done, fell_back = ever.cut(matrix, keep, name="m")
        assert torch.equal(done.matrix, here.matrix)
        assert fell_back
    assert whole.done > 50


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    ],
)
def test_a_library_without_room_for_its_handle_is_a_full_device(said: str) -> None:
    matrix, keep = spiked(64, 96), parse_keep("mp")
    ever = Full(lambda done, _: done >= 9, error=lambda _: RuntimeError(said))
    done, fell_back = Decompositions(ever).cut(matrix, keep)
    assert torch.equal(done.matrix, cut(matrix, keep).matrix)
    assert fell_back
    assert ever.refused == 2  # among others, and alone


@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError,  # pyright: ignore[reportPrivateImportUsage]
        lambda _: RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `x`"),
    ],
)
def test_a_library_that_fails_leaves_the_matrix_to_the_processor(
    error: Callable[[str], RuntimeError],
) -> None:
    matrix, keep = spiked(64, 96), parse_keep("mp")
    failing = Full(lambda done, _: done == 9, error=error)
    done, fell_back = Decompositions(failing).cut(matrix, keep)
    assert torch.equal(done.matrix, cut(matrix, keep).matrix)
    assert fell_back
    assert failing.refused == 1


def test_where_nothing_goes_the_matrix_comes_back_itself() -> None:
    matrix = spiked(64, 96)
    by = Decompositions(Device(torch.device("cpu")))
    assert by.cut(matrix, parse_keep("energy=1"))[0].matrix is matrix


def test_products_are_of_all_bits_whatever_the_program_has_set() -> None:
    known, seen = torch.backends.cuda.matmul, []
    before = known.fp32_precision
    known.fp32_precision = "tf32"
    try:

        def work(matrix: Tensor, library: Library) -> Tensor:
            seen.append(known.fp32_precision)
            return matrix @ matrix

        Decompositions(Device(torch.device("cpu"))).of(torch.eye(3), work)
        assert (seen, known.fp32_precision) == (["ieee"], "tf32")
    finally:
        known.fp32_precision = before


def edited(more: dict[str, object]) -> dict[str, object]:
    models = [{"model": ALIGNED, "parameters": {"alpha": 1.5}}]
    return {"merge_method": "expo", "base_model": SFT, "models": models} | more


CUTS = {
    "transforms": [{"low_rank": {"keep": "mp", "force": True, "target": "mlp"}}],
    "edits": [{"laser": {"keep": "rho=0.9", "target": "self_attn"}}],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_merge_with_edits(tmp_path: Path, place: str) -> None:
    plan = build_plan(read_request(edited(CUTS)))
    here = run_plan(plan, tmp_path / "here")
    there = run_plan(plan, tmp_path / "there", tuning=Tuning(2, device=Device(torch.device(place))))
    again = run_plan(plan, tmp_path / "again", tuning=Tuning(3, 4096, 1024, Device(torch.device(place))))  # fmt: skip
    assert (there.out / "model.safetensors").read_bytes() == (again.out / "model.safetensors").read_bytes()  # fmt: skip
    assert [e.rank for e in there.edits] == [e.rank for e in here.edits]
    assert not any(e.fell_back for e in there.edits)
    assert not any("no room" in warning for warning in there.warnings)
    result, other = here.statistics, there.statistics
    assert result.effective_alpha == pytest.approx(other.effective_alpha, abs=1e-3)


def test_a_merge_on_a_device_without_room_is_the_processors_and_says_so(tmp_path: Path) -> None:
    plan = build_plan(read_request(edited(CUTS)))
    here = run_plan(plan, tmp_path / "here")
    there = run_plan(plan, tmp_path / "there", tuning=Tuning(2, device=Full(lambda *_: True)))
    assert (here.out / "model.safetensors").read_bytes() == (there.out / "model.safetensors").read_bytes()  # fmt: skip
    assert all(edit.fell_back for edit in there.edits)
    (warning,) = set(there.warnings) - set(here.warnings)
    count = len({edit.matrix for edit in there.edits})
    assert warning.startswith(f"the device had no room for {count} matrices, or its library failed: the processor took them apart")  # fmt: skip
    assert json.loads((there.out / "expo.json").read_text())["edits"][0]["fell_back"] is True


def test_what_makes_an_edited_model_again_names_the_device() -> None:
    assert device_flags("cpu") == ()
    assert device_flags("cuda: NVIDIA H200, torch 2.13.0+cu130") == ("--device", "cuda")


@pytest.fixture(params=["has room", "is full"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Full:
    """What `--device cuda` opens: this processor in its place, as torch's kernels have it, with room or without."""
    device = Full(lambda *_: request.param == "is full")
    monkeypatch.setattr("expo.compute.device.open_device", lambda _: device)
    return device


def test_verbs_lend_their_matrices(cuda: Full, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    ran = expo("spectrum", ALIGNED, "--minus", SFT, "--json", "--device", "cuda")
    fell_back = {one["fell_back"] for one in json.loads(ran.out)}
    assert fell_back == {bool(cuda.refused)}
    assert ("warning: the device had no room" in ran.err) is bool(cuda.refused)
    here = {one.tensor: one for one in door.spectrum(ALIGNED, minus=SFT)}
    for mine in json.loads(ran.out):
        assert mine["rank_mp"] == here[mine["tensor"]].rank_mp
        assert mine["noise_sigma"] == pytest.approx(here[mine["tensor"]].noise_sigma, rel=1e-4)
    assert expo("laser", ALIGNED, tmp_path / "laser", "--keep", "rho=0.5", "--device", "cuda").code == 0  # fmt: skip
    written = Manifest.of_folder(tmp_path / "laser")
    assert written is not None
    assert {edit.fell_back for edit in written.edits} == fell_back
    assert cuda.done


@pytest.mark.parametrize("cuda", ["has room", pytest.param("is full", marks=pytest.mark.slow)], indirect=True)  # fmt: skip
def test_extract_lora_lends_its_matrices(cuda: Full, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    extracted = door.extract_lora(ALIGNED, out, minus=SFT, rank=4, device="cuda")
    (module,) = (m for m in extracted.modules if m.module == "model.layers.0.mlp.up_proj")
    both = (load_file(MODELS / n / "model.safetensors") for n in ("sft", "aligned"))
    sft, aligned = (one[f"{module.module}.weight"].double() for one in both)
    squares = torch.linalg.svdvals(aligned - sft).square()
    best = float(squares[4:].sum() / squares.sum()) ** 0.5
    assert best <= module.error < 1.01 * best
    assert cuda.done
    assert any("no room" in warning for warning in extracted.warnings) is bool(cuda.refused)
    manifest = read_manifest(out)
    assert isinstance(manifest, AdapterManifest)
    assert manifest.backend == cuda.backend


def test_diff_and_merge_go_through_it(cuda: Full, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    there = json.loads(expo("diff", SFT, ALIGNED, "--json", "--device", "cuda").out)
    here = json.loads(expo("diff", SFT, ALIGNED, "--json").out)
    assert there["total"] == pytest.approx(here["total"], rel=1e-6)
    merged = door.merge(edited({}), tmp_path / "there", verify=False, device="cuda")
    expo("extrapolate", SFT, ALIGNED, tmp_path / "here", "--alpha", 1.5)
    assert (merged.out / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()  # fmt: skip
    assert cuda.done


@pytest.mark.parametrize(
    ("capability", "library"),
    [((8, 0), ON_DEVICE_DOUBLE), ((9, 0), ON_DEVICE_DOUBLE), ((8, 9), ON_DEVICE), ((10, 3), ON_DEVICE), ((12, 0), ON_DEVICE)],
)  # fmt: skip
def test_float64_is_taken_where_the_device_is_good_at_it(
    capability: tuple[int, int], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert Device(torch.device("cuda:0")).library is library


@needs_cuda
def test_tensorfloat_is_off_on_a_device() -> None:
    matrix, keep = spiked(256, 512), parse_keep("rank=9")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for library in (ON_DEVICE, ON_DEVICE_DOUBLE):
            by = Decompositions(Device(torch.device("cuda"), library))
            got = by.cut(matrix, keep)[0].matrix
            assert float((got - cut(matrix, keep).matrix).norm()) < 1e-4 * float(got.norm())
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_lapack_is_what_the_processor_takes() -> None:
    matrix = spiked(64, 96)
    done, fell_back = Decompositions().cut(matrix, parse_keep("mp"))
    assert torch.equal(done.matrix, cut(matrix, parse_keep("mp"), library=LAPACK).matrix)
    assert not fell_back
