"""Low-rank edits in merges: of Δ before it is scaled, of the result, and `expo laser`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import expo as door
from expo.compute.stream import Tuning
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, SpecError
from expo.operators.keep import kept_values
from expo.operators.low_rank import mp_edge, noise_level
from expo.operators.rules import parse_keep
from expo.planning.build import build_plan
from expo.spec.read import read_spec
from expo.verbs.laser import _check_halves, perplexity

from .conftest import Tensors, run_plan, write_checkpoint

Q, UP, NORM, EMBED = (
    "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.mlp.up_proj.weight",
    "model.layers.{}.input_layernorm.weight",
    "model.embed_tokens.weight",
)


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def model(seed: int = 0) -> Tensors:
    tensors = {EMBED: random((40, 96), seed, 0.02)}
    for layer in (0, 1):
        tensors[Q.format(layer)] = random((96, 96), seed + 10 * layer + 1, 0.02)
        tensors[UP.format(layer)] = random((160, 96), seed + 10 * layer + 2, 0.02)
        tensors[NORM.format(layer)] = random((96,), seed + 10 * layer + 3, 0.02)
    return tensors


def low_rank_change(tensors: Tensors, rank: int, size: float) -> Tensors:
    """Every matrix moved by a signal of `rank`, `size` of its norm; the rest by a little noise."""
    moved = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        change = random(tuple(tensor.shape), number + 77)
        if tensor.ndim == 2:
            left, right = random((tensor.shape[0], rank), number), random((rank, tensor.shape[1]), number + 50)  # fmt: skip
            change = left @ right
        moved[name] = tensor + change * (size * tensor.norm() / change.norm())
    return moved


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT in float32 and an aligned model of rank 5 from it; both rounded to bfloat16 beside them."""
    root = tmp_path_factory.mktemp("edits")
    sft = {name: t.to(torch.bfloat16).double() for name, t in model().items()}
    aligned = low_rank_change(sft, 5, 0.02)
    for name, tensors in {"sft": sft, "aligned": aligned}.items():
        write_checkpoint(root / name, {k: t.float() for k, t in tensors.items()})
        write_checkpoint(root / f"{name}16", {k: t.to(torch.bfloat16) for k, t in tensors.items()})
    return root


def spec(root: Path, more: dict, *, bits: str = "") -> dict:
    return {
        "merge_method": "expo",
        "base_model": str(root / f"sft{bits}"),
        "models": [{"model": str(root / f"aligned{bits}"), "parameters": {"alpha": 2.0}}],
        "out_dtype": "float32",
        **more,
    }


def laser(
    folder: Path,
    out: Path,
    *,
    keep: str,
    target: str | None = None,
    layers: list[int] | None = None,
) -> door.MergeResult:
    edit = {"keep": keep, "target": target, "layers": layers}
    given = {key: value for key, value in edit.items() if value is not None}
    asked = {
        "merge_method": "passthrough",
        "models": [{"model": str(folder)}],
        "edits": [{"laser": given}],
    }
    return door.merge(asked, out, verify=False)


def tensors(folder: Path) -> Tensors:
    return {
        name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()
    }


def truncated(matrix: Tensor, rule: str) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = kept_values(parse_keep(rule), s, *sorted(matrix.shape))
    return (u[:, : len(kept)] * kept) @ v[: len(kept)]


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return float((got - expected).abs().max()) < tolerance


@pytest.mark.parametrize("rule", ["rank=2", "rank=40", "energy=0.9", "rho=0.03"])
def test_the_delta_is_cut_before_it_is_scaled(pair: Path, tmp_path: Path, rule: str) -> None:
    result = door.merge(spec(pair, {"transforms": [{"low_rank": {"keep": rule}}]}), tmp_path / "out", verify=False)  # fmt: skip
    sft, aligned, out = tensors(pair / "sft"), tensors(pair / "aligned"), tensors(tmp_path / "out")
    for name in sft:
        delta = aligned[name] - sft[name]
        if "proj" in name:
            delta = truncated(delta, rule)
        assert close(out[name], sft[name] + 2.0 * delta), name
    assert [edit.matrix for edit in result.edits] == [n for n in sft if "proj" in n]
    assert {edit.on for edit in result.edits} == {"aligned"}
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    assert manifest["spec"]["transforms"] == [{"low_rank": {"keep": rule}}]
    assert manifest["mergekit_spec"] is None
    assert [edit["keep"] for edit in manifest["edits"]] == [rule] * 4


def test_lox_adds_the_strongest_directions_to_the_aligned_model(pair: Path, tmp_path: Path) -> None:
    """θ = W₁ + a·topₖ(Δ) of the matrices, the rest as aligned (2506.15606)."""
    lox = spec(pair, {"onto": str(pair / "aligned"), "donor": str(pair / "aligned"),
        "exclude": ["embeddings", "head", "norms", "biases"],
        "transforms": [{"low_rank": {"keep": "rank=2"}}]})  # fmt: skip
    door.merge(lox, tmp_path / "out", verify=False)
    sft, aligned, out = tensors(pair / "sft"), tensors(pair / "aligned"), tensors(tmp_path / "out")
    for name in sft:
        change = truncated(aligned[name] - sft[name], "rank=2") if "proj" in name else 0.0
        assert close(out[name], aligned[name] + 2.0 * change), name


@pytest.mark.parametrize("rule", ["laser_rmt", "gd", "rho=0.2", "shrink=frobenius", "energy=0.8"])
def test_the_result_is_cut(pair: Path, tmp_path: Path, rule: str) -> None:
    edits = [{"laser": {"keep": rule, "target": r"up_proj", "layers": [1, 2]}}]
    plain = door.merge(spec(pair, {}), tmp_path / "plain", verify=False)
    assert plain.edits == ()
    if rule == "gd":  # nothing of a random matrix is above its noise
        with pytest.raises(
            CheckpointError, match=r"keeps nothing of model\.layers\.1\.mlp\.up_proj"
        ):
            door.merge(spec(pair, {"edits": edits}), tmp_path / "out", verify=False)
        assert not (tmp_path / "out").exists()
        return
    result = door.merge(spec(pair, {"edits": edits}), tmp_path / "out", verify=False)
    before, out = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    for name in before:
        if name == UP.format(1):
            expected = truncated(before[name], rule)
            assert close(out[name], expected)
            assert result.edits[0].removed_energy == pytest.approx(
                1 - float(expected.square().sum() / before[name].square().sum()), abs=1e-4
            )
        else:
            assert torch.equal(out[name], before[name]), name


def test_edits_follow_each_other_and_go_with_other_methods(pair: Path, tmp_path: Path) -> None:
    linear = {
        "merge_method": "linear",
        "models": [{"model": str(pair / m), "parameters": {"weight": 0.5}} for m in ("sft", "aligned")],
        "edits": [{"laser": {"keep": "rank=50", "target": "q_proj"}}, {"laser": {"keep": "rank=3", "target": r"layers\.0.*proj"}}],
        "out_dtype": "float32",
    }  # fmt: skip
    result = door.merge(linear, tmp_path / "out", verify=False)
    sft, aligned, out = tensors(pair / "sft"), tensors(pair / "aligned"), tensors(tmp_path / "out")
    mean = {name: (sft[name] + aligned[name]) / 2 for name in sft}
    assert close(out[Q.format(1)], truncated(mean[Q.format(1)], "rank=50"))
    got = out[Q.format(0)]
    assert int(torch.linalg.matrix_rank(got, rtol=1e-4)) == 3
    assert [(e.matrix, e.keep) for e in result.edits] == [
        (UP.format(0), "rank=3"),
        (Q.format(0), "rank=50"),
        (Q.format(0), "rank=3"),
        (Q.format(1), "rank=50"),
    ]
    assert close(out[UP.format(1)], mean[UP.format(1)])


def test_excluded_tensors_are_edited_as_the_donor_has_them(pair: Path, tmp_path: Path) -> None:
    edits = {"edits": [{"laser": {"keep": "rank=9", "target": "embed_tokens|q_proj"}}],
             "exclude": ["embeddings"], "fix_first_layers": 1}  # fmt: skip
    door.merge(spec(pair, edits), tmp_path / "out", verify=False)
    aligned, out = tensors(pair / "aligned"), tensors(tmp_path / "out")
    for name in (EMBED, Q.format(0)):
        residual, best = (
            float((x - aligned[name]).norm())
            for x in (out[name], truncated(aligned[name], "rank=9"))
        )
        assert residual < 1.02 * best


@pytest.mark.parametrize(("threads", "chunk_bytes", "block"), [(1, 1 << 20, 131_072), (2, 4096, 1024), (4, 70_000, 520)])  # fmt: skip
def test_the_bytes_do_not_depend_on_how_it_ran(
    pair: Path, tmp_path: Path, threads: int, chunk_bytes: int, block: int
) -> None:
    more = {"transforms": [{"low_rank": {"keep": "rank=40"}}], "edits": [{"laser": {"keep": "rho=0.7"}}]}  # fmt: skip
    plan = build_plan(read_spec(spec(pair, more)))
    expected = run_plan(plan, tmp_path / "expected", tuning=Tuning(threads=3))
    got = run_plan(
        plan, tmp_path / "got", tuning=Tuning(threads, chunk_bytes, block_elements=block)
    )
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("expected", "got")]
    assert files[0] == files[1]
    assert got.edits == expected.edits


def test_a_gate_lets_rounding_noise_be_cut(pair: Path, tmp_path: Path) -> None:
    """A change of rank 5 under bfloat16's rounding: the cut takes the noise and leaves the change."""
    cut = spec(pair, {"transforms": [{"low_rank": {"keep": "gd"}}]}, bits="16")
    result = door.merge(cut, tmp_path / "cut", verify=False)
    door.merge(spec(pair, {}, bits="16"), tmp_path / "plain", verify=False)
    sft, aligned = tensors(pair / "sft"), tensors(pair / "aligned")
    exact = {name: sft[name] + 2.0 * (aligned[name] - sft[name]) for name in sft}
    for edit in result.edits:
        assert edit.rank == 5
        assert edit.ulp_ratio == pytest.approx(1.0, abs=0.12)
        errors = [
            float((tensors(tmp_path / n)[edit.matrix] - exact[edit.matrix]).norm())
            for n in ("cut", "plain")
        ]
        assert errors[0] < 0.6 * errors[1]


def full_rank_pair(root: Path, noise: float) -> Path:
    sft = {name: t.to(torch.bfloat16) for name, t in model().items()}
    aligned = {
        name: (t.double() + random(tuple(t.shape), 5, noise)).to(torch.bfloat16)
        for name, t in sft.items()
    }
    write_checkpoint(root / "sft16", sft)
    write_checkpoint(root / "aligned16", aligned)
    return root


def test_a_change_of_full_rank_is_refused_with_the_numbers(tmp_path: Path, expo) -> None:
    root = full_rank_pair(tmp_path, 2e-4)
    more = {"transforms": [{"low_rank": {"keep": "gd"}}]}
    with pytest.raises(CheckpointError) as caught:
        door.merge(spec(root, more, bits="16"), tmp_path / "out", verify=False)
    message = str(caught.value)
    assert "keep gd would cut the change of model.layers.0.mlp.up_proj.weight" in message or (
        "keep gd would cut the change of model.layers.0.self_attn.q_proj.weight" in message
    )
    assert "times the noise of rounding its weights; from 0.8 to 1.15" in message
    assert "--force" in message
    assert {p.name for p in tmp_path.iterdir()} == {"sft16", "aligned16"}
    forced = {"transforms": [{"low_rank": {"keep": "gd", "force": True}}]}
    result = door.merge(spec(root, forced, bits="16"), tmp_path / "out", verify=False)
    assert all(edit.ulp_ratio is not None and edit.ulp_ratio > 1.15 for edit in result.edits)
    import yaml

    (tmp_path / "spec.yml").write_text(yaml.safe_dump(spec(root, more, bits="16")))
    assert expo("merge", tmp_path / "spec.yml", tmp_path / "b").code == 1
    ran = expo("merge", tmp_path / "spec.yml", tmp_path / "b", "--force")
    assert ran.code == 0, ran.err
    assert "got    4 of 4 matrices cut: " in ran.out


def test_two_roundings_are_told_of(tmp_path: Path) -> None:
    """Both sides rounded from float32: σ̂ is √2 of one rounding, which a real change can give as well."""
    sft = model()
    aligned = low_rank_change(sft, 5, 0.02)
    for name, both in {"sft16": sft, "aligned16": aligned}.items():
        write_checkpoint(tmp_path / name, {k: t.to(torch.bfloat16) for k, t in both.items()})
    with pytest.raises(CheckpointError, match=r"1\.41 is what SFT and aligned give that were each"):
        door.merge(
            spec(tmp_path, {"transforms": [{"low_rank": {"keep": "mp"}}]}, bits="16"),
            tmp_path / "out",
            verify=False,
        )


def test_an_adapters_change_has_no_rounding_noise(pair: Path, tmp_path: Path) -> None:
    """What was never rounded passes: nothing lies in the bulk, and the rank is the adapter's."""
    sft = tensors(pair / "sft16")
    aligned = {n: (t + truncated(random(tuple(t.shape), 3, 1e-3), "rank=4")).float() if "proj" in n else t.float() for n, t in sft.items()}  # fmt: skip
    write_checkpoint(tmp_path / "sft16", {n: t.to(torch.bfloat16) for n, t in sft.items()})
    write_checkpoint(tmp_path / "aligned16", aligned)
    more = {"transforms": [{"low_rank": {"keep": "gd"}}]}
    result = door.merge(spec(tmp_path, more, bits="16"), tmp_path / "out", verify=False)
    assert {edit.rank for edit in result.edits} == {4}


def test_nan_is_refused(pair: Path, tmp_path: Path) -> None:
    broken = load_file(pair / "aligned" / "model.safetensors")
    broken[UP.format(1)][3, 4] = float("nan")
    write_checkpoint(tmp_path / "aligned", broken)
    write_checkpoint(tmp_path / "sft", load_file(pair / "sft" / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        door.merge(spec(tmp_path, {"edits": [{"laser": {"keep": "rank=3"}}]}), tmp_path / "out", verify=False)  # fmt: skip


def test_laser_edits_one_model(pair: Path, tmp_path: Path, expo) -> None:
    ran = expo("laser", pair / "aligned16", tmp_path / "out", "--keep", "rho=0.25", "--layers", 1, 2, "-q")  # fmt: skip
    assert ran.code == 0, ran.err
    source, out = tensors(pair / "aligned16"), tensors(tmp_path / "out")
    for name in source:
        if "layers.1" in name and "proj" in name:
            expected = truncated(source[name], "rho=0.25").to(torch.bfloat16).double()
            assert float((out[name] - expected).norm() / expected.norm()) < 1e-3
        else:
            assert torch.equal(out[name], source[name])
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    assert manifest["method"] == "passthrough"
    assert [edit["rank"] for edit in manifest["edits"]] == [24, 24]
    assert manifest["spec"]["edits"] == [{"laser": {"keep": "rho=0.25", "layers": [1, 2]}}]
    again = laser(pair / "aligned16", tmp_path / "two", keep="rho=0.25", layers=[1, 2])  # fmt: skip
    assert load_file(again.out / "model.safetensors").keys() == source.keys()
    assert (again.out / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_an_expert_and_a_part_of_a_fused_tensor_can_be_named(tmp_path: Path) -> None:
    fused = {
        "model.layers.0.self_attn.qkv_proj.weight": random((64, 32), 1).float(),
        "model.layers.0.mlp.experts.gate_up_proj": random((3, 48, 32), 2).float(),
    }
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}  # fmt: skip
    folder = write_checkpoint(tmp_path / "m", fused, config=config)
    result = laser(folder, tmp_path / "out", keep="rank=5", target=r":v$|\[1\]:up")  # fmt: skip
    out = load_file(tmp_path / "out" / "model.safetensors")
    labels = {edit.matrix.rsplit(".", 1)[1] for edit in result.edits}
    assert labels == {"gate_up_proj[1]:up", "weight:v"}
    for name, tensor in fused.items():
        expected = tensor.clone().double()
        part = expected[48:] if "qkv" in name else expected[1, 24:]
        part.copy_(truncated(part, "rank=5"))
        assert close(out[name].double(), expected, 2e-5)


def test_the_plan_says_what_is_cut(pair: Path, expo) -> None:
    planned = expo("laser", pair / "aligned", "nowhere", "--keep", "gd", "--dry-run")
    assert planned.code == 0, planned.err
    assert "edits      4 matrices are cut" in planned.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"edits": [{"lazer": {"keep": "gd"}}]}, "'lazer' is not an edit (did you mean laser?)"),
        ({"edits": [{"laser": {}}]}, "edits.0.laser: needs keep: mp, gd,"),
        ({"edits": [{"laser": {"keep": "half"}}]}, "keep half: not a rule: mp, gd, laser_rmt, rank=R"),
        ({"edits": [{"laser": {"keep": "gd", "force": True}}]}, "force: is not a parameter of laser"),
        ({"edits": [{"laser": {"keep": "gd", "target": "("}}]}, "target: '(' is not a regular expression: missing )"),
        ({"edits": [{"laser": {"keep": "gd", "layers": [4]}}]}, "layers: [first, after the last], not [4]"),
        ({"transforms": [{"low_rank": {"keep": "gd", "force": 3}}]}, "force: true or false, not 3"),
        ({"transforms": [{"low_rank": {"keep": "gd"}}, {"dare": {"density": 0.5}}]}, "one transform at a time"),
        ({"transforms": [{"lowrank": {"keep": "gd"}}]}, "'lowrank' is not a transform (did you mean low_rank?)"),
        ({"edits": [{}]}, "needs one name and its parameters, such as {laser: {keep: gd}}"),
    ],
)  # fmt: skip
def test_bad_edits(pair: Path, more: dict, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(spec(pair, more))
    assert message in str(caught.value)


def test_a_target_that_finds_nothing_is_refused(pair: Path, expo, tmp_path: Path) -> None:
    ran = expo("laser", pair / "aligned", tmp_path / "out", "--keep", "gd", "--target", "v_proj")  # fmt: skip
    assert ran.code == 1
    assert "target 'v_proj' finds no matrix of aligned" in ran.err
    ran = expo("laser", pair / "aligned", tmp_path / "out", "--keep", "gd", "--layers", 7, 9)  # fmt: skip
    assert "the edit finds no matrix in layers 7 to 9 of aligned" in ran.err


def test_the_published_rank_is_reproduced() -> None:
    """laserRMT's and LASER's own arithmetic, as published, on the same matrices."""
    for m, n in ((96, 96), (160, 96), (96, 400)):
        matrix = random((m, n), m + n) + 4 * random((m, 1), 1) @ random((1, n), 2)
        s = torch.linalg.svdvals(matrix)
        sigma = (torch.quantile(s, 0.75) - torch.quantile(s, 0.25)) / 1.349
        threshold = sigma * (1 + (min(m, n) / max(m, n)) ** 0.5)
        short = sorted((m, n))
        assert len(kept_values(parse_keep("laser_rmt"), s, *short)) == int((s > threshold).sum())
        assert len(kept_values(parse_keep("rho=0.1"), s, *short)) == int(min(m, n) * 0.1)
        edge = mp_edge(noise_level(s, *short), *short)
        assert len(kept_values(parse_keep("mp"), s, *short)) == int((s > edge).sum())


TEXTS = "u:hello\nok world\nno gnome\num birds\nok plane\nno tiger\n"


def test_an_edit_stays_only_where_held_out_texts_agree(tmp_path: Path, expo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "texts.txt").write_text(TEXTS)
    aligned = MODELS / "aligned"
    ran = expo("laser", aligned, tmp_path / "out", "--keep", "rho=0.5", "--accept-if", "perplexity",
               "--texts", tmp_path / "texts.txt")  # fmt: skip
    assert ran.code == 0, ran.err
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    (note,) = manifest["notes"]
    assert note in ran.err
    found = re.fullmatch(
        r"(\d+) of 14 edits accepted; perplexity (\S+) → (\S+) on the half that decided, (\S+) → (\S+) on the other",
        note,
    )
    assert found
    kept = [edit["matrix"] for edit in manifest["edits"]]
    assert len(kept) == int(found[1])
    assert 0 < len(kept) < 14
    assert float(found[3]) <= float(found[2])
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    tokens = [tokenizer(t, return_tensors="pt")["input_ids"] for t in TEXTS.splitlines()]
    for folder, places in ((aligned, (2, 4)), (tmp_path / "out", (3, 5))):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for half, place in zip((tokens[::2], tokens[1::2]), places, strict=True):
            assert perplexity(model, half) == pytest.approx(float(found[place]), rel=1e-3)
    names = "|".join(map(re.escape, kept))
    laser(aligned, tmp_path / "again", keep="rho=0.5", target=f"^({names})$")
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "again")]
    assert files[0] == files[1]


def test_what_cannot_be_accepted(tmp_path: Path, expo) -> None:
    (tmp_path / "one.txt").write_text("one\n\n")
    arguments = ("laser", MODELS / "aligned", tmp_path / "out", "--keep", "rank=1")
    ran = expo(*arguments, "--accept-if", "perplexity")
    assert (ran.code, "--accept-if and --texts go together" in ran.err) == (2, True)
    ran = expo(*arguments, "--accept-if", "perplexity", "--texts", tmp_path / "one.txt")
    assert (ran.code, "needs two texts at least" in ran.err) == (2, True)
    (tmp_path / "texts.txt").write_text(TEXTS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "theirs").touch()
    ran = expo("laser", MODELS / "aligned", tmp_path / "taken", *arguments[3:], "--accept-if", "perplexity", "--texts", tmp_path / "texts.txt")  # fmt: skip
    assert (ran.code, "exists and is not empty" in ran.err) == (1, True)
    assert "matrices tried" not in ran.err  # refused before the model was tried
    ran = expo(*arguments, "--target", "layers.0.*v_proj", "--accept-if", "perplexity", "--texts", tmp_path / "texts.txt")  # fmt: skip
    assert ran.code == 1
    assert "none of 1 edits keeps the perplexity of" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_reports_every_edit(pair: Path, tmp_path: Path) -> None:
    more = {"transforms": [{"low_rank": {"keep": "rank=40"}}]}
    request = replace(read_spec(spec(pair, more)), max_shard_bytes=100_000)
    whole = run_plan(build_plan(request), tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2

    def interrupt(written: int, total: int) -> None:
        if list(tmp_path.glob(".out.expo-staging/model-00002-*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(
            build_plan(request),
            tmp_path / "out",
            tuning=Tuning(threads=1, chunk_bytes=4096, block_elements=1024),
            progress=interrupt,
        )
    said: list[str] = []
    resumed = run_plan(build_plan(request), tmp_path / "out", say=said.append)
    assert said
    assert said[0].startswith("resuming: ")
    assert resumed.edits == whole.edits
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_half_without_a_text_decides_nothing(tmp_path: Path) -> None:
    """No text has perplexity 1 before and after: every edit would be accepted."""
    with pytest.raises(SpecError, match="needs two texts at least"):
        _check_halves([[torch.zeros(1, 3)], []], tmp_path / "texts.txt")
