"""The kernels of low-rank edits, against float64 decompositions and the published rules."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

from expo.compute.preparations import Preparations, Unit
from expo.errors import CheckpointError, SpecError
from expo.operators.decompose import cut, factors
from expo.operators.keep import kept_values, unit_in_last_place
from expo.operators.lapack import apply_reflectors, gram, one_thread, tridiagonal
from expo.operators.low_rank import mp_edge
from expo.operators.rules import Keep, parse_keep
from expo.planning.jobs import Copy, MatrixJob, TensorJob

RULES = ("mp", "gd", "laser_rmt", "rank=3", "rank=9", "rho=0.3", "energy=0.9", "shrink=frobenius", "shrink=operator")  # fmt: skip
SHAPES = [(160, 160), (96, 240), (240, 96), (64, 512), (512, 64)]


def noise(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def spiked(m: int, n: int, rank: int = 9, strongest: float = 10.0) -> Tensor:
    """Noise, and `rank` spikes from twice the edge up."""
    left, right = (torch.linalg.qr(noise(k, rank, k)).Q for k in (m, n))
    spikes = torch.linspace(strongest, 2.0, rank) * mp_edge(0.01, *sorted((m, n)))
    return 0.01 * noise(m, n) + (left * spikes) @ right.T


def reference(matrix: Tensor, keep: Keep) -> tuple[Tensor, int]:
    """By an SVD in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = kept_values(keep, s, *sorted(matrix.shape))
    return (u[:, : len(kept)] * kept) @ v[: len(kept)], len(kept)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_kept_part_is_the_svds(shape: tuple[int, int], rule: str) -> None:
    matrix, keep = spiked(*shape), parse_keep(rule)
    expected, rank = reference(matrix, keep)
    got = cut(matrix, keep)
    assert got.rank == rank
    assert got.matrix.shape == matrix.shape
    assert got.matrix.dtype == torch.float32
    assert got.matrix.is_contiguous()
    error = float((got.matrix - expected).norm() / expected.norm())
    assert error < (1e-3 if got.gain is not None else 1e-4)  # randomized where the rank is small
    removed = 1 - float(expected.square().sum() / matrix.double().square().sum())
    assert got.removed_energy == pytest.approx(removed, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strongest", [30.0, 3000.0])
def test_a_strong_signal_takes_the_float64_path(shape: tuple[int, int], strongest: float) -> None:
    matrix = spiked(*shape, strongest=strongest)
    for rule in ("mp", "laser_rmt", "rho=0.5"):
        expected, rank = reference(matrix, parse_keep(rule))
        got = cut(matrix, parse_keep(rule))
        assert got.rank == rank
        assert float((got.matrix - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planted_spikes_are_found(shape: tuple[int, int]) -> None:
    for rule in ("mp", "gd", "shrink=frobenius", "shrink=operator"):
        assert cut(spiked(*shape), parse_keep(rule)).rank == 9


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (torch.zeros(20, 30), 0),
        (torch.ones(20, 30), 1),
        (torch.eye(20), 20),
        (torch.ones(1, 7), 1),
        (torch.ones(7, 1), 1),
        (torch.diag(torch.tensor([1.0] * 3 + [0.0] * 17)), 3),
    ],
    ids=["zeros", "ones", "identity", "row", "column", "rank 3"],
)
def test_degenerate_matrices(matrix: Tensor, rank: int) -> None:
    for rule in ("energy=1", "mp", "rank=2", "shrink=frobenius"):
        got = cut(matrix, parse_keep(rule))
        assert bool(got.matrix.isfinite().all())
    exact = cut(matrix, parse_keep("energy=0.999999"))
    assert exact.rank == rank
    assert float((exact.matrix - matrix).abs().max()) < 1e-5


def test_randomized_is_nearly_the_best_and_the_same_every_time() -> None:
    matrix = noise(320, 480) @ torch.diag(torch.arange(1, 481).float().rsqrt())
    keep = parse_keep("rank=20")
    values = torch.linalg.svdvals(matrix.double())
    best = float(values[20:].square().sum().sqrt())
    got = cut(matrix, keep, seed=1, name="a")
    assert got.gain is not None
    assert got.gain < 0.03
    assert float((matrix - got.matrix).norm()) < 1.02 * best
    assert torch.equal(got.matrix, cut(matrix, keep, seed=1, name="a").matrix)
    assert not torch.equal(got.matrix, cut(matrix, keep, seed=1, name="b").matrix)
    assert not torch.equal(got.matrix, cut(matrix, keep, seed=2, name="a").matrix)


@pytest.mark.parametrize("shape", [(160, 160), (64, 512), (512, 64)], ids=str)
@pytest.mark.parametrize("rule", ["rank=3", "rank=30", "energy=0.9"])
def test_factors_are_the_kept_part(shape: tuple[int, int], rule: str) -> None:
    matrix = spiked(*shape)
    found = factors(matrix, parse_keep(rule), iterations=6)
    expected, rank = reference(matrix, parse_keep(rule))
    assert found.left.shape == (shape[0], rank)
    assert found.right.shape == (rank, shape[1])
    assert float((found.left @ found.right - expected).norm() / expected.norm()) < 1e-4


def test_the_bytes_do_not_depend_on_threads() -> None:
    matrices = [spiked(200, 300, strongest=s) for s in (5.0, 8.0, 11.0)]
    keep = parse_keep("gd")
    alone = [cut(matrix, keep).matrix for matrix in matrices]
    beside: dict[int, Tensor] = {}

    def run(number: int) -> None:
        torch.set_num_threads(1)
        beside[number] = cut(matrices[number], keep).matrix

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    alone_again = [cut(matrix, keep).matrix for matrix in matrices]
    assert all(torch.equal(beside[n], alone_again[n]) for n in range(3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, alone_again, strict=True))


def test_rules_as_text() -> None:
    for text in ("mp", "gd", "laser_rmt", "rank=64", "rho=0.25", "energy=0.9", "shrink=frobenius"):
        assert str(parse_keep(text)) == text
    for text, message in {
        "rank=0": "rank takes a whole number above 0",
        "rank=2.5": "rank takes a whole number",
        "rho=2": "rho takes a share above 0 and up to 1",
        "energy=x": "energy takes a share",
        "shrink=nuclear": "not a rule: mp, gd,",
        "gd=3": "not a rule",
        "": "not a rule",
    }.items():
        with pytest.raises(SpecError, match=message):
            parse_keep(text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unit_in_last_place(dtype: torch.dtype) -> None:
    values = (noise(50, 20) ** 7).to(dtype)
    following = torch.nextafter(values.abs(), torch.tensor(torch.inf, dtype=dtype))
    expected = following.double() - values.abs().double()
    assert torch.equal(unit_in_last_place(values.double(), dtype), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 65])
def test_the_reduction_is_one(dtype: type, size: int) -> None:
    """Q T Qᵀ is the Gram matrix, and T's eigenvectors turned by Q are its own."""
    a = np.asfortranarray(noise(90, size).numpy().astype(dtype))
    lower = gram(a)
    exact = a.T.astype(np.float64) @ a
    tolerance = 1e-4 if dtype is np.float32 else 1e-12
    assert np.allclose(np.tril(lower), np.tril(exact), atol=tolerance * size)
    diagonal, beside, scales = tridiagonal(lower)
    turned = np.eye(size, dtype=dtype, order="F")
    apply_reflectors(lower, scales, turned)
    middle = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    assert np.allclose(turned @ middle @ turned.T, exact, atol=10 * tolerance * size)
    assert np.allclose(turned.T @ turned, np.eye(size), atol=tolerance)


def test_other_threads_go_on_meanwhile() -> None:
    """scipy's wrappers would hold Python's lock through the whole reduction."""
    lower = gram(np.asfortranarray(noise(1200, 1200).double().numpy()))
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.monotonic())

    watch = threading.Thread(target=tick)
    watch.start()
    began = time.monotonic()
    tridiagonal(lower)
    ended = time.monotonic()
    done.set()
    watch.join()
    assert [t for t in ticks if began < t < ended]


def test_the_next_matrices_are_made_while_one_waits() -> None:
    """Two workers that need the same matrix: the second makes the next one, nothing is made twice."""
    weight: Any = None
    matrices = tuple(MatrixJob(str(n), n, (1, 1)) for n in range(4))
    job = TensorJob("t", "F32", weight, Copy(), matrices=matrices)
    made: list[int | None] = []
    both = threading.Barrier(2, timeout=20)

    def make(unit: Unit) -> int | None:
        made.append(unit[1])
        if unit[1] in (0, 1):
            both.wait()  # passes only if matrices 0 and 1 are made side by side
        return unit[1]

    preparations: Preparations[int | None] = Preparations([job], ahead=1)
    found: list[int | None] = []

    def work() -> None:
        found.extend(preparations.get((job, n), make) for n in range(4))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(map(str, made)) == ["0", "1", "2", "3"]
    assert sorted(map(str, found)) == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_blas_has_one_thread_in_any_thread_that_asks_for_it() -> None:
    """Threads come and go in any order; when all are out, the limits are those of before."""
    gram(np.ones((4, 4), np.float32))  # loads the library
    before = _blas_threads()
    second_is_in, first_is_out = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def first() -> None:
        with one_thread:
            second_is_in.wait(20)
            seen.append(_blas_threads())
        first_is_out.set()

    def second() -> None:
        with one_thread:
            second_is_in.set()
            first_is_out.wait(20)
            seen.append(_blas_threads())

    for _ in range(3):
        second_is_in.clear()
        first_is_out.clear()
        threads = [threading.Thread(target=work) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert _blas_threads() == before
    assert seen == [{1}] * 6


def _blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_a_failure_reaches_every_worker_that_waits() -> None:
    weight: Any = None
    job = TensorJob("t", "F32", weight, Copy(), matrices=(MatrixJob("m", 0, (1, 1)),))
    preparations: Preparations[int] = Preparations([job], ahead=2)
    failures: list[str] = []

    def make(_: Unit) -> int:
        time.sleep(0.05)
        raise CheckpointError("damaged")

    def work() -> None:
        try:
            preparations.get((job, 0), make)
        except CheckpointError as error:
            failures.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=20)
    assert failures == ["damaged"] * 3
