"""Work on a device: the bytes of the processor, whatever fits; and what a device cannot do goes on without it."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import expo as door
from expo.checkpoint.headers import ALIGNMENT
from expo.checkpoint.memory import state_dict_checkpoint
from expo.compute.blending import Target
from expo.compute.choice import arithmetic_for, plain_arithmetic
from expo.compute.device import Device, Turnstile, is_full
from expo.compute.device_worker import DeviceWorker
from expo.compute.devices import device_name
from expo.compute.inputs import Inputs, Readers
from expo.compute.stream import Tuning
from expo.compute.worker import BlockWorker, PieceResult, Worker
from expo.errors import CheckpointError, ExpoError, SpecError
from expo.operators.spectra import ON_DEVICE_DOUBLE
from expo.operators.statistics import Sample, Sums
from expo.output.manifest import Manifest
from expo.planning.build import build_plan, plan_of
from expo.planning.chunks import Piece, buffer_bytes, pieces
from expo.planning.plan import Plan
from expo.spec.read import read_request
from expo.spec.request import Operand, Request, Rounding, Slice, make_request
from expo.threads import side_by_side
from expo.verbs.running import run_plans

from .conftest import Pair, Ran, Tensors, run_plan
from .devices import PLACES, Full, needs_cuda

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
COUNT = 20_011  # not a multiple of a row, nor of a block
BLOCK, CHUNK = 2048, 1 << 17


def values(dtype: torch.dtype, seed: int) -> Tensor:
    """Weights, and among them ±0 and subnormals of the dtype and of float32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(COUNT, generator=generator, dtype=torch.float64) * 0.02
    drawn[seed : seed + 6] = torch.tensor([0.0, -0.0, 1e-40, -3e-42, 6e-8, -2e-7])
    return drawn.to(dtype)


def pair_plan(sft: Tensors, aligned: Tensors, **asked: object) -> Plan:
    """The plan of a pair in memory at α 1.5."""
    both = state_dict_checkpoint(sft, "SFT"), state_dict_checkpoint(aligned, "aligned")
    slices = (Slice((Operand(both[1].reference, {"alpha": 1.5}),)),)
    request = Request(slices, base=both[0].reference, **asked)  # type: ignore[arg-type]
    return plan_of(request, {checkpoint.reference: checkpoint for checkpoint in both})


def tensors(pairs: Iterable[tuple[torch.dtype, torch.dtype]]) -> tuple[Tensors, Tensors]:
    """A tensor of every pair of dtypes; a third of the elements are the same on both sides."""
    sft, aligned = {}, {}
    for base, top in pairs:
        b, a = values(base, 1), values(top, 12)
        a[::3] = b[::3].to(top)
        sft[f"{base} {top}"], aligned[f"{base} {top}"] = b, a
    return sft, aligned


Outcome = dict[str, tuple[bytes, list[Sums], list[Sample]]]


def outcomes(worker: Worker, plans: Sequence[Plan]) -> list[Outcome]:
    """The bytes, the sums of every block and the samples of every tensor, by plan."""
    found: list[Outcome] = [{} for _ in plans]
    jobs = [list(plan.jobs) for plan in plans]
    for number, job in enumerate(jobs[0]):
        done: list[list[tuple[bytes, PieceResult]]] = [[] for _ in plans]
        for piece in pieces(job, 0, chunk_bytes=CHUNK, block_elements=BLOCK):
            targets = [
                Target(mine[number], np.empty(_bytes(piece, mine[number].nbytes, job.count), np.uint8),
                       plan.request.rounding, plan.request.seed)
                for mine, plan in zip(jobs, plans, strict=True)
            ]  # fmt: skip
            results = worker.run(piece, targets)
            for rows, target, result in zip(done, targets, results, strict=True):
                rows.append((target.out.tobytes(), result))
        for one, rows in zip(found, done, strict=True):
            samples = [result.sample for _, result in rows if result.sample]
            sums = [block for _, result in rows for block in result.blocks]
            one[job.name] = (b"".join(data for data, _ in rows), sums, [*samples])
    return found


def _bytes(piece: Piece, nbytes: int, count: int) -> int:
    return piece.count * nbytes // count if count else 0


def on_device(device: Device, plans: Sequence[Plan]) -> list[Outcome]:
    with Readers() as readers:
        inputs = Inputs(readers, buffer_bytes(CHUNK), device.buffer)
        return outcomes(DeviceWorker(inputs, device, block_elements=BLOCK), plans)


def here(plans: Sequence[Plan], *, compiled: bool = False) -> list[Outcome]:
    """By the processor: torch's operators block by block, or the compiled kernels, which take a while to make."""
    arithmetic = arithmetic_for if compiled else lambda _: plain_arithmetic()
    with Readers() as readers:
        inputs = Inputs(readers, buffer_bytes(CHUNK))
        return outcomes(BlockWorker(inputs, block_elements=BLOCK, arithmetic=arithmetic), plans)


def assert_alike(got: Sequence[Outcome], want: Sequence[Outcome]) -> None:
    """The same bytes, and sums of the same blocks, which differ in their order only."""
    for one, two in zip(got, want, strict=True):
        for name, (data, sums, samples) in two.items():
            assert one[name][0] == data, name
            for mine, theirs in zip(one[name][1], sums, strict=True):
                assert_close(mine, theirs)
            assert len(one[name][2]) == len(samples) == 1
            assert one[name][2][0].elements == samples[0].elements
            assert one[name][2][0][1:3] == pytest.approx(samples[0][1:3], rel=1e-5)


def assert_close(mine: Sums, theirs: Sums) -> None:
    """Squares agree to a few roundings of float32, a product of both signs to those of what it is made of."""
    least = 1e-5 * (theirs.error_square * theirs.delta_square) ** 0.5
    assert mine.error_delta == pytest.approx(theirs.error_delta, abs=least)
    assert mine._replace(error_delta=0.0) == pytest.approx(
        theirs._replace(error_delta=0.0), rel=1e-5
    )


ALPHAS = (0.0, 1.0, 1.3, -0.5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_are_those_of_the_compiled_kernels(place: str, rounding: Rounding) -> None:
    plan = pair_plan(*tensors((dtype, dtype) for dtype in DTYPES), rounding=rounding, seed=7)
    plans = [plan.at(alpha) for alpha in ALPHAS]
    device = Full(lambda *_: False, place=place)
    assert_alike(on_device(device, plans), here(plans, compiled=True))
    assert device.done


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(None, "stochastic"), *product(("bfloat16", "float16"), ("nearest", "stochastic")),
     ("float32", "nearest"), ("float64", "nearest")],
)  # fmt: skip
def test_bytes_of_every_pair_of_dtypes(place: str, dtype: str | None, rounding: Rounding) -> None:
    plan = pair_plan(*tensors(product(DTYPES, DTYPES)), dtype=dtype, rounding=rounding, seed=7)
    plans = [plan.at(alpha) for alpha in (1.0, 1.3)]
    assert_alike(on_device(Device(torch.device(place)), plans), here(plans))


def test_sums_are_those_of_float64() -> None:
    b, a = values(torch.float32, 1), values(torch.float32, 2)
    plan = pair_plan({"w": b}, {"w": a}, dtype="bfloat16")
    ((data, sums, _),) = on_device(Device(torch.device("cpu")), [plan])[0].values()
    out = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double()
    base, top = b.double(), a.double()
    delta = (a - b).double()
    error = out - (a + 0.5 * (a - b)).double()
    got = Sums()
    for block in sums:
        got = got.plus(block)
    assert len(sums) == -(-COUNT // BLOCK)
    assert (got.elements, got.zeros) == (COUNT, int((delta == 0).sum()))
    assert got.unmoved == int((out == top).sum())
    for mine, one, two in (
        (got.base_square, base, base), (got.delta_square, delta, delta), (got.error_square, error, error),
        (got.error_delta, error, delta), (got.asked_delta, 1.5 * delta, delta),
        (got.asked_square, 1.5 * delta, 1.5 * delta),
    ):  # fmt: skip
        assert abs(mine - float(one @ two)) <= 1e-6 * float(one.norm() * two.norm())


@pytest.mark.parametrize("place", PLACES)
def test_two_sides_are_compared_as_the_processor_does(place: str) -> None:
    plan = pair_plan(*tensors(zip(DTYPES, DTYPES, strict=True)))
    device = Full(lambda *_: False, place=place)
    with Readers() as readers:
        inputs = Inputs(readers, buffer_bytes(CHUNK), device.buffer)
        there = DeviceWorker(inputs, device, block_elements=BLOCK)
        processor = BlockWorker(inputs, block_elements=BLOCK)
        for job in plan.jobs:
            for piece in pieces(job, 0, chunk_bytes=CHUNK, block_elements=BLOCK):
                both = zip(there.compare(piece), processor.compare(piece), strict=True)
                for mine, theirs in both:
                    assert_close(mine, theirs)
                    assert mine.aligned_square
    assert device.done


def damaged() -> Iterator[tuple[Tensors, Tensors, dict[str, object]]]:
    for side in (0, 1):
        for bad in (torch.nan, torch.inf):
            both = [values(torch.float64, seed) for seed in (1, 2)]
            both[side][COUNT - 1] = bad
            yield {"w": both[0]}, {"w": both[1]}, {}
    large = torch.full((COUNT,), 6e4).double()
    yield {"w": torch.zeros_like(large)}, {"w": large}, {"dtype": "float16"}


def test_what_is_not_finite_is_said_as_the_processor_says_it() -> None:
    for sft, aligned, asked in damaged():
        plan = pair_plan(sft, aligned, **asked)
        said = []
        for run in (here, partial(on_device, Device(torch.device("cpu")))):
            with pytest.raises(CheckpointError) as error:
                run([plan])
            said.append(str(error.value))
        assert said[0] == said[1]


def test_a_damaged_side_of_two_that_are_compared_is_named() -> None:
    sft, aligned, _ = next(damaged())
    (job,) = pair_plan(sft, aligned).jobs
    whole = Piece(job, 0, (0, 0), job.count, 0)
    with Readers() as readers:
        worker = DeviceWorker(Inputs(readers, CHUNK), Device(torch.device("cpu")))
        with pytest.raises(CheckpointError, match="w holds NaN or Inf in SFT: it is damaged"):
            worker.compare(whole)


def test_squares_that_leave_float32_are_summed_by_the_processor() -> None:
    plan = pair_plan({"w": torch.full((COUNT,), 1e30)}, {"w": torch.full((COUNT,), 2e30)})
    assert on_device(Device(torch.device("cpu")), [plan]) == here([plan], compiled=True)


def test_other_formulas_and_copies_do_not_go_to_the_device() -> None:
    integers = {"steps": torch.arange(7)}
    plan = pair_plan(integers, integers)
    sft, aligned = ({"w": values(torch.float64, n)} for n in (1, 2))
    three = [state_dict_checkpoint(one, f"{n}") for n, one in enumerate((sft, aligned, aligned))]
    operands = tuple(Operand(one.reference, {"alpha": 0.7}) for one in three[1:])
    request = Request((Slice(operands),), base=three[0].reference)
    several = plan_of(request, {checkpoint.reference: checkpoint for checkpoint in three})
    for one in (plan, several):
        device = Full(lambda *_: True)
        assert on_device(device, [one]) == here([one])
        assert not device.done


@pytest.fixture
def small() -> list[Plan]:
    """Three blocks and a part."""
    count = 3 * BLOCK + 7
    both = (values(dtype, n)[:count] for n, dtype in enumerate((torch.float16, torch.bfloat16)))
    sft, aligned = ({"w": side} for side in both)
    return [pair_plan(sft, aligned, rounding="stochastic")]


def test_out_of_memory_at_any_operation_changes_nothing(small: list[Plan]) -> None:
    want, number, refused = here(small), 0, True
    while refused:
        number += 1
        once = Full(lambda done, _, at=number: done == at)
        assert_alike(on_device(once, small), want)
        refused = once.refused
    assert number > 100
    for number in range(1, 100, 9):
        ever = Full(lambda done, _, at=number: done >= at)
        assert_alike(on_device(ever, small), want)
        assert ever.refused > 1


def test_what_does_not_fit_goes_through_in_parts_down_to_a_block(small: list[Plan]) -> None:
    want = here(small)
    for most in (2 * BLOCK, BLOCK):
        device = Full(lambda _, elements, most=most: elements > most)
        assert_alike(on_device(device, small), want)
        assert BLOCK <= device.largest <= most
    nothing = Full(lambda _, elements: elements >= BLOCK)
    assert_alike(on_device(nothing, small), want)
    assert nothing.largest < BLOCK


def test_other_errors_are_not_taken_for_a_full_device(small: list[Plan]) -> None:
    with pytest.raises(RuntimeError, match="says the test"):
        on_device(Full(lambda *_: True, error=RuntimeError), small)
    assert is_full(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    for said in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    ):
        assert is_full(RuntimeError(said))
    assert not is_full(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_one_that_is_alone_waits_for_those_inside_and_others_wait_for_it() -> None:
    turnstile, order = Turnstile(), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with turnstile.entered(alone=False):
            inside.set()
            leave.wait(20)
            order.append("first")

    def alone() -> None:
        with turnstile.entered(alone=True):
            order.append("alone")

    threads = [threading.Thread(target=work) for work in (first, alone)]
    threads[0].start()
    inside.wait(20)
    threads[1].start()
    while not turnstile._want_all:  # it is there, and waits
        pass
    threads.append(threading.Thread(target=lambda: _enter(turnstile, order)))
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "alone", "later"]


def _enter(turnstile: Turnstile, order: list[str]) -> None:
    with turnstile.entered(alone=False):
        order.append("later")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def plan(pair: Pair) -> Plan:
    return build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))


@pytest.mark.parametrize("place", PLACES)
def test_a_run_at_several_alphas(plan: Plan, tmp_path: Path, place: str) -> None:
    plans = [plan.at(1.2), plan.at(1.5)]
    tuning = Tuning(2, device=Device(torch.device(place)))
    names = [tmp_path / "a", tmp_path / "b"]
    results = run_plans(plans, names, tuning=tuning)
    for one, folder, result in zip(plans, names, results, strict=True):
        other = run_plan(one, tmp_path / f"here-{folder.name}")
        assert shards(folder) == shards(other.out)
        assert result.statistics.elements == other.statistics.elements
        assert result.statistics.effective_alpha == pytest.approx(other.statistics.effective_alpha)
        written = Manifest.of_folder(folder)
        assert written is not None
        assert written.backend.startswith(f"{place}:")
        assert f"torch {torch.__version__}" in written.backend
        assert "--device" not in written.flags  # no byte depends on it
    written = Manifest.of_folder(tmp_path / "here-a")
    assert written is not None
    assert written.backend == "cpu"


def test_a_resumed_run_on_another_backend_starts_afresh_and_says_so(
    plan: Plan, tmp_path: Path
) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", tuning=Tuning(1, 64, 8), progress=interrupt)
    tuning = Tuning(device=Device(torch.device("cpu")))
    run_plan(plan, tmp_path / "out", tuning=tuning, say=said.append)
    assert said == ["an unfinished run was for another plan (backend changed): starting afresh"]
    again = run_plan(plan, tmp_path / "again")
    assert shards(tmp_path / "out") == shards(again.out)


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (("extrapolate", "sft", "aligned", "out", "--alpha", "1.5"), True),
        (("extrapolate", "sft", "aligned", "out", "--alpha", "1.5", "--dry-run"), True),
        (("laser", "aligned", "out", "--keep", "rho=0.5"), True),
        (("extract-lora", "aligned", "out", "--minus", "sft", "--rank", "2"), True),
        (("diff", "sft", "aligned"), False),
        (("spectrum", "aligned"), False),
        (("plan", "sft", "aligned"), False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_device_that_is_not_there(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran], words: tuple[str, ...], out: bool
) -> None:  # fmt: skip
    monkeypatch.chdir(pair.sft.parent)
    ran = expo(*words, "--device", "cuda:99")
    assert ran.code == 1
    assert ran.err.startswith("expo: device cuda:99 cannot be used: ")
    assert "--device cpu" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert sorted(p.name for p in Path().iterdir()) == ["aligned", "sft"]
    ran = expo(*words, "--device", "gpu")
    assert ran.code == 2
    assert "device 'gpu' is none of cpu, cuda, cuda:N" in ran.err


def test_names_of_devices() -> None:
    for name in ("cpu", "cuda", "cuda:0", "cuda:12"):
        assert device_name(name) == name
    for name in ("", "cpu:0", "CUDA", "cuda:", "cuda:-1", "cuda:1 ", "mps"):
        with pytest.raises(SpecError, match="is none of cpu, cuda, cuda:N"):
            device_name(name)
    assert Tuning.on("cpu") == Tuning.on(None) == Tuning()


def test_a_device_is_refused_where_nothing_would_hear_of_it(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    adapted = (pair.sft, f"{pair.sft}+{pair.aligned}", tmp_path / "out", "--alpha", 1.5)
    ran = expo("extrapolate", *adapted, "--as-adapter", "--device", "cpu")
    assert (ran.code, ran.err) == (2, "expo: --device: not with --as-adapter, which copies the adapter's own matrices\n")  # fmt: skip
    ran = expo("plan", pair.sft, pair.aligned, "--resolved", "--alpha", 1.5, "--device", "cpu")
    assert (ran.code, ran.err) == (2, "expo: --device: not with --resolved: a spec names none\n")


def test_a_run_of_mergekit_takes_no_device(pair: Pair, tmp_path: Path) -> None:
    models = [{"model": str(pair.sft)}, {"model": str(pair.aligned)}]
    spec = {"merge_method": "karcher", "models": models, "dtype": "float32"}
    said = "--device: not with mergekit's engine (karcher does not stream through expo), which computes on the CPU: leave it out"  # fmt: skip
    with pytest.raises(SpecError, match=re.escape(said)):
        door.plan(spec, device="cpu")
    built = build_plan(read_request(spec))
    tuning = Tuning(device=Device(torch.device("cpu")))
    with pytest.raises(SpecError, match=re.escape(said)):
        run_plan(built, tmp_path / "out", tuning=tuning)
    assert not (tmp_path / "out").exists()


class Stream:
    """One of CUDA's, as far as a lane uses it."""

    def __init__(self, _: torch.device) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The stream of every lane, in their order."""
    streams: list[Stream] = []

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        streams.append(one)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return streams


def test_a_lane_waits_for_its_stream_however_it_is_left(used: list[Stream]) -> None:
    device = Device(torch.device("cuda:0"), ON_DEVICE_DOUBLE)
    with device.lane():
        assert used[0].waits == 0
    assert used[0].waits == 1
    for error in (torch.OutOfMemoryError("CUDA out of memory"), ValueError("what")):
        with pytest.raises(type(error)), device.lane():
            raise error
    said = "CUDA error: an illegal memory access was encountered\nFor debugging consider"
    with pytest.raises(ExpoError) as raised, device.lane():
        raise torch.AcceleratorError(said)
    assert str(raised.value) == (
        "the device cuda:0 failed (CUDA error: an illegal memory access was encountered): run the same command again, or with "
        "--device cpu; nvidia-smi and dmesg say more"
    )
    with pytest.raises(torch.AcceleratorError), device.lane():
        raise torch.AcceleratorError("CUDA error: out of memory")
    assert {id(one) for one in used} == {id(used[0])}
    assert used[0].waits == 5


def test_a_stream_is_of_one_lane_at_a_time_and_then_of_the_next(used: list[Stream]) -> None:
    device = Device(torch.device("cuda:0"), ON_DEVICE_DOUBLE)

    def work(_: int) -> None:
        with device.lane():
            pass

    for _ in range(20):  # a crew for every shard
        list(side_by_side(work, range(3), 1))
    assert len(set(used)) == 1
    with device.lane():
        list(side_by_side(work, range(3), 1))
    assert used[-1] is not used[-4]
    assert len(set(used)) == 2


@needs_cuda
def test_buffers_are_locked_and_start_on_a_page() -> None:
    device = Device(torch.device("cuda"))
    for nbytes in (1, 4096, 9_000_001):
        buffer = device.buffer(nbytes)
        assert buffer.size == nbytes
        assert buffer.ctypes.data % ALIGNMENT == 0
        assert torch.from_numpy(buffer).is_pinned()
