"""One formula for a pair and for several models: what was once built twice cannot drift."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import expo as door
from expo.compute.blending import Target
from expo.compute.choice import plain_arithmetic
from expo.compute.inputs import Inputs, Readers
from expo.compute.stream import Tuning, stream, tensors
from expo.compute.worker import BlockWorker
from expo.errors import SpecError
from expo.output.manifest import Manifest
from expo.output.sink import FinishedShard
from expo.planning.build import build_plan
from expo.planning.chunks import buffer_bytes, cut
from expo.planning.plan import Plan, ShardPlan
from expo.planning.rows import RowMatch, RowRun, SharedRows, share_rows
from expo.spec.read import read_spec
from expo.spec.request import make_request
from expo.verbs.running import run_plans

from .conftest import CONFIG, Pair, nudged, run_plan, weights, write_checkpoint
from .test_merge import assert_same, digest, load, naive
from .test_plan import tokenizer

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def spec(base: Path, *aligned: Path, alpha: float = 1.5, **more: object) -> dict:
    models = [{"model": str(path), "parameters": {"alpha": alpha}} for path in aligned]
    return {"merge_method": "expo", "base_model": str(base), "models": models, **more}


def three(tmp_path: Path, **config: object) -> tuple[Path, Path, Path]:
    base = weights()
    folders = (tmp_path / "sft", tmp_path / "a", tmp_path / "b")
    for seed, folder in enumerate(folders):
        moved = base if seed == 0 else nudged(base, seed)
        write_checkpoint(folder, moved, config=CONFIG | config)
    return folders


def test_a_tied_head_under_another_name_follows_for_one_and_for_two(tmp_path: Path) -> None:
    folders = three(tmp_path)
    for folder in folders:
        held = load(folder)
        held["embed_out.weight"] = held.pop(HEAD)
        if folder is not folders[0]:
            del held["embed_out.weight"]
        write_checkpoint(folder, held, config=CONFIG | {"tie_word_embeddings": True})
    for aligned in (folders[1:2], folders[1:]):
        report = door.plan(spec(folders[0], *aligned))
        assert report.ok, report.refusals
        assert any("embed_out.weight is only in" in note for note in report.notes)


def test_an_untied_head_beside_a_tied_one_follows_the_aligned_model(tmp_path: Path) -> None:
    sft = weights()
    aligned = nudged({name: t for name, t in sft.items() if name != HEAD})
    write_checkpoint(tmp_path / "sft", sft, config=CONFIG | {"tie_word_embeddings": False})
    write_checkpoint(tmp_path / "aligned", aligned, config=CONFIG | {"tie_word_embeddings": True})
    report = door.plan(spec(tmp_path / "sft", tmp_path / "aligned"))
    assert report.ok, report.refusals
    assert f"{HEAD} is only in the SFT model: dropped" in report.notes


def test_what_is_excluded_counts_alike_for_one_and_for_two(tmp_path: Path) -> None:
    base, a, b = three(tmp_path)
    more = {"exclude": ["norms", "head"], "fix_first_layers": 1}
    counts = []
    for number, aligned in enumerate(((a,), (a, b))):
        asked = spec(base, *aligned, **more)
        report = door.plan(asked)
        result = door.merge(asked, tmp_path / f"out{number}", verify=False)
        manifest = Manifest.of_folder(result.out)
        assert manifest is not None
        counts.append((report.tensors.matched, report.tensors.copied, result.statistics.elements, set(manifest.tensors)))  # fmt: skip
        assert torch.equal(load(result.out)["model.norm.weight"], load(a)["model.norm.weight"])
    assert counts[0] == counts[1]
    assert counts[0][:2] == (3, 6)


@pytest.mark.parametrize("rule", ["rank=999", "energy=1", "rho=1"])
@pytest.mark.parametrize("where", ["delta", "result"])
def test_an_edit_that_removes_nothing_changes_nothing(
    tmp_path: Path, rule: str, where: str
) -> None:
    sft = {name: t.float() for name, t in weights().items()}
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", nudged(sft))
    edit = {"delta": {"transforms": [{"low_rank": {"keep": rule}}]}, "result": {"edits": [{"laser": {"keep": rule}}]}}  # fmt: skip
    plain = spec(tmp_path / "sft", tmp_path / "aligned", out_dtype="float32")
    door.merge(plain, tmp_path / "plain", verify=False)
    edited = door.merge(plain | edit[where], tmp_path / "edited", verify=False)
    assert edited.edits
    assert_same(load(tmp_path / "plain"), load(tmp_path / "edited"))


def test_the_other_rounding_is_estimated_for_several_models(tmp_path: Path) -> None:
    base, a, b = three(tmp_path)
    result = door.merge(spec(base, a, b), tmp_path / "out", verify=False)
    other = result.alternative
    assert other is not None
    assert other.rounding == "stochastic"
    drawn = door.merge(spec(base, a, b, rounding="stochastic"), tmp_path / "drawn", verify=False)
    assert other.effective_alpha == pytest.approx(drawn.statistics.effective_alpha, abs=0.02)


def test_rows_of_several_models_match_by_token(tmp_path: Path) -> None:
    """The second aligned model has two tokens swapped, the SFT model lacks one of the donor's."""
    words = [f"t{i}" for i in range(12)]
    base, a, b = three(tmp_path)
    swapped = words.copy()
    swapped[3], swapped[4] = words[4], words[3]
    tokenizer(a, words)
    tokenizer(b, swapped)
    tokenizer(base, [*words[:11], "other"])
    order = [0, 1, 2, 4, 3, *range(5, 12)]
    held = load(b)
    for name in (EMBED, HEAD):
        held[name] = held[name][order]
    write_checkpoint(b, held)
    result = door.merge(spec(base, a, b), tmp_path / "out", verify=False)
    mine, sft, one, two = (load(folder) for folder in (result.out, base, a, b))
    back = two[EMBED][order].double()
    expected = sft[EMBED].double() + 1.5 * (one[EMBED] - sft[EMBED].double()) + 1.5 * (back - sft[EMBED].double())  # fmt: skip
    assert (
        torch.equal(mine[EMBED][:11], expected.float().bfloat16()[:11])
        or float((mine[EMBED][:11].double() - expected[:11]).abs().max()) < 1e-4
    )  # float32 sums, one bfloat16 rounding
    assert torch.equal(mine[EMBED][11], one[EMBED][11])  # only SFT lacks it: the donor's own
    assert result.statistics.elements < sum(t.numel() for t in mine.values())


def test_runs_of_several_models_are_cut_where_any_of_them_breaks() -> None:
    first = RowMatch((RowRun(0, 5, 4), RowRun(4, None, 2)))
    second = RowMatch((RowRun(0, 0, 2), RowRun(2, 9, 4)))
    assert share_rows([first, second], 6) == (
        SharedRows(0, (5, 0), 2),
        SharedRows(2, (7, 9), 2),
        SharedRows(4, None, 2),
    )
    assert share_rows([RowMatch(), RowMatch()], 6) == ()
    assert share_rows([RowMatch(), second], 6)[1] == SharedRows(2, (2, 9), 4)


def test_a_plan_at_another_alpha_is_the_plan_of_that_alpha(pair: Pair, tmp_path: Path) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned)))
    run_plan(plan.at(1.3), tmp_path / "at")
    run_plan(
        build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.3)), tmp_path / "new"
    )
    assert digest(tmp_path / "at") == digest(tmp_path / "new")
    with pytest.raises(SpecError, match="finite"):
        plan.at(float("nan"))
    linear = {"merge_method": "linear", "models": [{"model": str(pair.sft), "parameters": {"weight": 1}}]}  # fmt: skip
    with pytest.raises(SpecError, match="linear has no alpha"):
        build_plan(read_spec(linear)).at(1.3)


@pytest.mark.parametrize("more", [{}, {"exclude": ["norms"]}, {"transforms": [{"dare": {"density": 0.5}}]}, {"transforms": [{"low_rank": {"keep": "rank=2"}}], "edits": [{"laser": {"keep": "rank=5"}}]}])  # fmt: skip
def test_several_alphas_from_one_read_are_those_of_several_runs(
    tmp_path: Path, more: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, a, _ = three(tmp_path)
    alphas = (0.0, 1.0, 1.3, 8.0)
    plan = build_plan(read_spec(spec(base, a, **more)))
    for alpha in alphas:
        run_plan(plan.at(alpha), tmp_path / f"alone-{alpha}")
    opened: list[str] = []
    original = Inputs.open

    def counted(self: Inputs, weight, begin, count, *, side=0):
        opened.append(weight.stored.name)
        return original(self, weight, begin, count, side=side)

    monkeypatch.setattr(Inputs, "open", counted)
    outs = [tmp_path / f"together-{alpha}" for alpha in alphas]
    results = run_plans([plan.at(alpha) for alpha in alphas], outs)
    for alpha, out, result in zip(alphas, outs, results, strict=True):
        assert result.alpha == (alpha if not more or "low_rank" in str(more) else None)
        assert_same(load(out), load(tmp_path / f"alone-{alpha}"))
    if not more:
        assert len(opened) == 2 * 9  # each tensor of each side once, whatever the number of alphas


def test_several_alphas_resume_each_at_its_own_shard(pair: Pair, tmp_path: Path) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned)))
    plans, outs = [plan.at(1.2), plan.at(1.5)], [tmp_path / "x", tmp_path / "y"]
    tuning = Tuning(threads=1, chunk_bytes=64, block_elements=8)

    def interrupt(done: int, _: int) -> None:
        journal = tmp_path / ".x.expo-staging" / "journal.jsonl"
        if done and journal.exists() and journal.read_text().count("\n") >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plans(plans, outs, tuning=tuning, progress=interrupt)
    journal = tmp_path / ".y.expo-staging" / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])  # y has no shard
    said: list[str] = []
    run_plans(plans, outs, tuning=tuning, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("resuming: ")
    for alpha, out in zip((1.2, 1.5), outs, strict=True):
        assert_same(load(out), naive(pair.sft_tensors, pair.aligned_tensors, alpha))


def test_tensors_for_a_live_model_are_those_of_the_merge(tmp_path: Path) -> None:
    base, a, b = three(tmp_path)
    plan = build_plan(read_spec(spec(base, a, b, rounding="stochastic", seed=3)))
    run_plan(plan, tmp_path / "out")
    assert_same(dict(tensors(plan)), load(tmp_path / "out"))
    assert [name for name, _ in tensors(plan)] == list(load(tmp_path / "out"))


class MemoryShard:
    """A shard of a `MemorySink`."""

    def __init__(self, nbytes: int) -> None:
        self.data, self.nbytes = bytearray(nbytes + 8192), nbytes

    def write(self, offset: int, data: np.ndarray) -> None:
        assert offset % 4096 == 0
        self.data[offset : offset + len(data)] = data.tobytes()

    def finish(self) -> None:
        del self.data[self.nbytes :]

    def close(self) -> None:
        raise AssertionError("left unfinished")


class MemorySink:
    """A sink that keeps its shards in memory: the second implementation of the port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, MemoryShard] = {}
        self.recorded: list[FinishedShard] = []
        self.manifest: Manifest | None = None

    def open(self, shard: ShardPlan) -> MemoryShard:
        return self.shards.setdefault(shard.file, MemoryShard(shard.file_bytes))

    def record(self, shard: FinishedShard) -> None:
        self.recorded.append(shard)

    def commit(self, manifest: Manifest) -> None:
        self.manifest = manifest


def test_a_stream_ends_in_any_sink_and_does_the_shards_it_is_told(
    pair: Pair, tmp_path: Path
) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    run_plan(plan, tmp_path / "out")
    sink = MemorySink(tmp_path)
    (first,) = stream([plan], [sink], shards=[1])
    assert [shard.file for shard in first] == [plan.shards[1].file]
    (whole,) = stream([plan], [sink], finished=[first])
    assert [shard.file for shard in whole] == [shard.file for shard in plan.shards]
    for shard in plan.shards:
        assert bytes(sink.shards[shard.file].data) == (tmp_path / "out" / shard.file).read_bytes()


def pieces_of(plan: Plan) -> Iterator:
    for number, shard in enumerate(plan.shards):
        for chunk in cut(shard, number):
            yield from chunk.pieces


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "more", [{}, {"transforms": [{"ties": {"density": 0.3}}]}, {"transforms": [{"dare": {"density": 0.3}}]}, {"transforms": [{"della": {"density": 0.4}}]}, {"transforms": [{"breadcrumbs": {"density": 0.4, "gamma": 0.1}}]}],
    ids=["plain", "ties", "dare", "della", "breadcrumbs"],
)  # fmt: skip
@pytest.mark.parametrize("models", [1, 2])
def test_the_torch_worker_gives_the_bytes_and_sums_of_the_compiled_one(
    tmp_path: Path, dtype: str, rounding: str, more: dict, models: int
) -> None:
    base, *aligned = three(tmp_path)
    asked = spec(base, *aligned[:models], out_dtype=dtype, rounding=rounding, **more)
    plan = build_plan(read_spec(asked))
    with Readers() as readers:
        compiled, plain = (
            BlockWorker(Inputs(readers, buffer_bytes(1 << 20)), **how)
            for how in ({}, {"arithmetic": lambda _: plain_arithmetic()})
        )
        for piece in pieces_of(plan):
            rooms = [np.zeros(piece.nbytes, np.uint8) for _ in range(2)]
            results = [
                worker.run(piece, [Target(piece.job, room, plan.request.rounding, 0)])[0]
                for worker, room in zip((compiled, plain), rooms, strict=True)
            ]
            assert rooms[0].tobytes() == rooms[1].tobytes(), piece.job.name
            assert results[0].blocks == results[1].blocks
            assert results[0].sample == results[1].sample


def test_apply_takes_rows_and_several_models(tmp_path: Path) -> None:
    base, a, b = three(tmp_path)
    words = {f"t{i}": i for i in range(12)}
    grown = {name: torch.cat([t, t[:1]]) if name in (EMBED, HEAD) else t for name, t in load(a).items()}  # fmt: skip
    vocabularies = [words, words | {"new": 12}]
    found = dict(door.apply(load(base), grown, alpha=1.5, vocabularies=vocabularies))
    plain = dict(door.apply(load(base), load(a), alpha=1.5))
    assert torch.equal(found[EMBED][:12], plain[EMBED])
    assert torch.equal(found[EMBED][12], grown[EMBED][12])
    with pytest.raises(door.CheckpointError, match=r"add its tokenizer\.json"):
        dict(door.apply(load(base), grown, alpha=1.5))
    door.merge(spec(base, a, b, alpha=1.2), tmp_path / "out", verify=False)
    several = dict(door.apply(load(base), [load(a), load(b)], alpha=[1.2, 1.2]))
    assert_same(several, load(tmp_path / "out"))
    with pytest.raises(SpecError, match="one alpha for every aligned model"):
        dict(door.apply(load(base), [load(a), load(b)], alpha=[1.2]))


def test_a_manifest_of_another_schema_or_a_damaged_one_is_not_read(
    pair: Pair, tmp_path: Path
) -> None:
    result = door.extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5, verify=False)
    path = result.out / "expo.json"
    manifest = Manifest.of_folder(result.out)
    assert manifest is not None
    assert Manifest.from_json(manifest.to_json()) == manifest
    whole = json.loads(path.read_text())
    older = {key: value for key, value in whole.items() if key not in ("engine", "reasons")}
    assert Manifest.from_json(json.dumps(older)) == manifest  # as earlier versions wrote it
    for damaged, what in (
        (whole | {"schema": "expo.manifest/9"}, "schema 'expo.manifest/9'"),
        (whole | {"alpha": "x"}, "alpha"),
        ({key: value for key, value in whole.items() if key != "files"}, "files"),
    ):
        with pytest.raises(door.CheckpointError, match=rf"expo\.json is .*{what}"):
            Manifest.from_json(json.dumps(damaged))
    assert replace(manifest, alpha=1.4) != manifest


@pytest.mark.parametrize("more", [{}, {"transforms": [{"ties": {"density": 0.5}}]}])
@pytest.mark.parametrize("models", [1, 2])
def test_infinities_on_both_sides_are_one_line_without_a_warning(
    tmp_path: Path, more: dict, models: int
) -> None:
    """∞ − ∞ is no matter of NumPy's warnings: the model that holds it is named."""
    base, *aligned = three(tmp_path)
    for folder in (base, aligned[0]):
        held = load(folder)
        held["model.norm.weight"][2] = float("inf")
        write_checkpoint(folder, held)
    with pytest.raises(door.CheckpointError, match=r"model\.norm\.weight holds NaN or Inf in "):
        door.merge(spec(base, *aligned[:models], **more), tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
