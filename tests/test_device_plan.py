"""What `expo plan --device` finds: rates that were measured, and what follows from them."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import expo as door
from expo.checkpoint.files import Directory
from expo.compute import pairs, rates
from expo.compute.bounds import measured_bound
from expo.compute.device import Device
from expo.compute.pairs import pair_of
from expo.compute.stream import Tuning
from expo.demo.toy import MODELS
from expo.planning.build import build_plan
from expo.results import Bound
from expo.spec.read import read_request
from expo.spec.request import make_request
from expo.verbs.several import plans_at

from .conftest import Pair, Ran, write_checkpoint
from .devices import PLACES

SFT, ALIGNED = str(MODELS / "sft"), str(MODELS / "aligned")
SPEC = {"merge_method": "expo", "base_model": SFT, "models": [{"model": ALIGNED, "parameters": {"alpha": 1.5}}]}  # fmt: skip
CUT = {"transforms": [{"low_rank": {"keep": "mp", "force": True, "target": "mlp"}}],
       "edits": [{"laser": {"keep": "rank=2", "target": "self_attn"}}]}  # fmt: skip


def check(bound: Bound) -> None:
    assert set(bound.seconds) <= {"disk", "bus", "compute", "hash"}
    assert all(rate > 0 for rate in bound.rates.values())
    assert bound.limit == max(bound.seconds, key=lambda part: bound.seconds[part])


def test_a_plan_says_what_bounds_the_run(expo: Callable[..., Ran]) -> None:
    words = ("plan", SFT, ALIGNED, "--alpha", 1.5)
    assert json.loads(expo(*words, "--json").out)["bound"] is None
    assert "\nbound " not in expo(*words).out
    shown = json.loads(expo(*words, "--json", "--device", "cpu").out)
    bound = Bound(**shown["bound"])
    check(bound)
    assert (bound.device, bound.backend) == ("cpu", "cpu")
    assert bound.rates.keys() == {"disk", "elements", "hash"}
    moved = shown["read_bytes"] + shown["write_bytes"]
    assert bound.seconds["disk"] == pytest.approx(moved / bound.rates["disk"])
    assert bound.seconds["hash"] == pytest.approx(shown["write_bytes"] / bound.rates["hash"])
    if bound.limit == "disk":
        assert bound.says == "the disk bounds an elementwise merge: no device makes it faster"
    told = expo("extrapolate", SFT, ALIGNED, "out", "--alpha", 1.5, "--dry-run", "--device", "cpu")
    (line,) = (line for line in told.out.splitlines() if line.startswith("bound "))
    assert "bounds" in line
    assert "each by itself: disk " in line
    assert any(row.startswith("measured   disk ") for row in told.out.splitlines())


@pytest.mark.parametrize("place", PLACES)
def test_what_crosses_the_bus_and_what_is_computed(place: str) -> None:
    plan = build_plan(read_request(SPEC | CUT))
    bound = measured_bound([plan], Tuning(2, device=Device(torch.device(place))))
    check(bound)
    rates, seconds = bound.rates, bound.seconds
    assert bound.device.startswith(place)
    edited = [job for job in plan.jobs if job.matrices]
    plain = [job for job in plan.jobs if not job.matrices]
    lent = sum(4 * matrix.count for job in edited for matrix in job.matrices)
    there = lent + sum(w.stored.nbytes for job in plain for w in job.inputs)
    back = lent + sum(job.nbytes for job in plain)
    bus = max(there / rates["to_device"], back / rates["from_device"])
    assert seconds["bus"] == pytest.approx(bus)
    cubes = {"mlp": 0.0, "self_attn": 0.0}
    for job in edited:
        m, n = sorted(job.shape)
        cubes["mlp" if "mlp" in job.name else "self_attn"] += m * n * (m if "mlp" in job.name else 2)  # fmt: skip
    computed = {
        "spectrum": cubes["mlp"],
        "small_rank": cubes["self_attn"],
        "elements": sum(job.count for job in plain),
        "elements_here": sum(job.count for job in edited),
    }
    expected = sum(amount / rates[name] for name, amount in computed.items())
    assert seconds["compute"] == pytest.approx(expected)
    assert "elementwise" not in bound.says


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_device_is_measured_by_the_formula_of_the_run(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = (write_checkpoint(tmp_path / name, {"w": torch.ones(8, 8, dtype=dtype)}) for name in "ab")  # fmt: skip
    (job,) = build_plan(make_request(*map(str, sides), alpha=1.5)).jobs
    seen: list[torch.dtype] = []

    def watched(base: torch.Tensor, aligned: torch.Tensor, dtype: torch.dtype, block: int) -> pairs.Pair:  # fmt: skip
        seen.append(dtype)
        return pair_of(base, aligned, dtype, block)

    monkeypatch.setattr(pairs, "pair_of", watched)
    rates.pair_rate_on(Device(torch.device("cpu")), job)
    assert set(seen) == {torch.promote_types(dtype, torch.float32)}


def test_several_alphas_read_once_and_write_each() -> None:
    plans, _ = plans_at(make_request(SFT, ALIGNED), (1.2, 1.5), Path("out"))
    bound = measured_bound(plans, Tuning())
    moved = plans[0].read_bytes + sum(plan.write_bytes for plan in plans)
    assert bound.seconds["disk"] == pytest.approx(moved / bound.rates["disk"])
    elements = sum(2 * job.count for job in plans[0].jobs)
    assert bound.seconds["compute"] == pytest.approx(elements / bound.rates["elements"])


def test_inputs_that_lie_elsewhere_leave_the_disk_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(make_request(SFT, ALIGNED, alpha=1.5))
    monkeypatch.setattr(Directory, "is_local", lambda *_: False)
    bound = measured_bound([plan], Tuning())
    check(bound)
    assert "disk" not in bound.seconds
    assert bound.says.startswith("the inputs are not all on this disk, and how fast they come was not measured; of the rest, ")  # fmt: skip


@pytest.mark.parametrize("begins_with", ["open", "preadv"])
def test_a_disk_that_is_read_by_way_of_the_page_cache_only(
    begins_with: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filesystems refuse O_DIRECT when a file is opened, or take it and refuse the read."""
    real = {"open": os.open, "preadv": os.preadv}

    def refusing(*given: Any, **more: Any) -> int:
        flags = given[1] if begins_with == "open" else fcntl.fcntl(given[0], fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real[begins_with](*given, **more)

    plan = build_plan(make_request(SFT, ALIGNED, alpha=1.5))
    monkeypatch.setattr(os, begins_with, refusing)
    bound = measured_bound([plan], Tuning())
    check(bound)
    assert "disk" in bound.seconds


def test_nothing_is_measured_of_what_would_be_refused(pair: Pair, tmp_path: Path) -> None:
    fewer = {name: t for name, t in pair.aligned_tensors.items() if "norm" not in name}
    aligned = write_checkpoint(tmp_path / "fewer", fewer)
    report = door.plan(str(pair.sft), str(aligned), alpha=1.5, device="cpu")
    assert not report.ok
    assert report.bound is None
    assert door.plan(SPEC, device="cpu").bound is not None


def test_several_documents_are_not_measured(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    first = {"name": "half", **SPEC}
    second = SPEC | {"base_model": "half"}
    (tmp_path / "two.yml").write_text("---\n".join(map(yaml.safe_dump, (first, second))))
    for words in (("plan",), ("merge", tmp_path / "out", "--dry-run")):
        ran = expo(words[0], tmp_path / "two.yml", *words[1:], "--device", "cpu")
        assert ran.code == 2
        assert "--device: the spec has 2 documents, and what bounds a run is measured of one: make the others first" in ran.err  # fmt: skip
    with pytest.raises(door.SpecError, match="the spec has 2 documents"):
        door.plan(tmp_path / "two.yml", device="cpu")
