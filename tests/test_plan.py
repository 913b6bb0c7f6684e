"""What the plan matches, copies, drops, refuses and says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import expo as door
from expo.checkpoint.vocabulary import read_vocabulary
from expo.planning.modules import module_of
from expo.planning.rows import RowMatch, RowRun, match_rows

from .conftest import CONFIG, Pair, Ran, Tensors, nudged, weights, write_checkpoint
from .test_merge import assert_same, load, naive


def tokenizer(folder: Path, tokens: list[str], added: dict[str, int] | None = None) -> None:
    """The parts of a tokenizer.json that say which token has which id."""
    content = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
        "added_tokens": [{"id": i, "content": t} for t, i in (added or {}).items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def two(tmp_path: Path, sft: Tensors, aligned: Tensors, **config: object) -> tuple[Path, Path]:
    return (
        write_checkpoint(tmp_path / "sft", sft, config=CONFIG | config),
        write_checkpoint(tmp_path / "aligned", aligned, config=CONFIG | config),
    )


def plan(sft: Path, aligned: Path) -> door.PlanReport:
    return door.plan(
        {
            "merge_method": "expo",
            "base_model": str(sft),
            "models": [{"model": str(aligned), "parameters": {"alpha": 1.5}}],
        }
    )


def test_a_matching_pair(pair: Pair) -> None:
    report = plan(pair.sft, pair.aligned)
    assert report.ok
    assert (report.tensors.matched, report.tensors.copied) == (9, 0)
    data = sum(t.numel() * 2 for t in pair.sft_tensors.values())
    assert report.read_bytes == 2 * data
    assert len(report.shards) == 3
    assert sum(report.shards.values()) == report.write_bytes > data
    assert report.alpha == 1.5
    assert report.paper_alpha == 0.5
    assert report.free_disk_bytes > 0
    assert report.tokenizer_donor is None


def test_missing_extra_and_mismatched_are_all_refused_at_once(tmp_path: Path) -> None:
    sft, aligned = weights(), nudged(weights())
    del aligned["model.layers.0.mlp.up_proj.weight"]
    aligned["model.new.weight"] = torch.ones(3).bfloat16()
    aligned["model.norm.weight"] = torch.ones(11).bfloat16()
    aligned["model.layers.0.input_layernorm.weight"] = torch.ones(10, dtype=torch.int32)
    report = plan(*two(tmp_path, sft, aligned))
    assert not report.ok
    assert report.tensors.missing == ("model.new.weight",)
    assert report.tensors.extra == ("model.layers.0.mlp.up_proj.weight",)
    assert len(report.tensors.mismatched) == 2
    text = "\n".join(report.refusals)
    assert "1 tensor only in the aligned model (sft → aligned): model.new.weight" in text
    assert "model.norm.weight ([10] in SFT, [11] in aligned)" in text
    assert "(BF16 in SFT, I32 in aligned)" in text
    assert "--allow-missing REGEX" in text


def test_allow_missing_copies_and_drops(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    sft, aligned = weights(), nudged(weights())
    dropped = aligned.pop("model.layers.1.mlp.up_proj.weight")
    aligned["value_head.weight"] = torch.randn(3).bfloat16()
    folders = two(tmp_path, sft, aligned)
    flags = ("--alpha", 1.5, "--allow-missing", r"value_head|layers\.1\.mlp")
    ran = expo("plan", *folders, *flags)
    assert ran.code == 0
    assert "value_head.weight is only in the aligned model: copied" in ran.out
    assert "model.layers.1.mlp.up_proj.weight is only in the SFT model: dropped" in ran.out
    assert expo("extrapolate", *folders, tmp_path / "out", *flags).code == 0
    result = load(tmp_path / "out")
    assert torch.equal(result["value_head.weight"], aligned["value_head.weight"])
    assert dropped.shape
    assert "model.layers.1.mlp.up_proj.weight" not in result
    assert expo("plan", *folders, "--allow-missing", "(").code == 2


def test_derived_buffers_follow_the_aligned_model(tmp_path: Path) -> None:
    sft, aligned = weights(), nudged(weights())
    sft["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    report = plan(*two(tmp_path, sft, aligned))
    assert report.ok
    assert "rotary_emb.inv_freq is only in the SFT model: dropped" in report.notes[0]


@pytest.mark.parametrize("tied_side", ["sft", "aligned"])
def test_tied_embeddings_on_one_side(tmp_path: Path, tied_side: str) -> None:
    sft = weights()
    sft["lm_head.weight"] = sft["model.embed_tokens.weight"].clone()
    aligned = nudged(sft)
    aligned["lm_head.weight"] = aligned["model.embed_tokens.weight"].clone()
    stored = {"sft": dict(sft), "aligned": dict(aligned)}
    del stored[tied_side]["lm_head.weight"]
    folders = two(tmp_path, stored["sft"], stored["aligned"], tie_word_embeddings=True)
    report = plan(*folders)
    assert report.ok, report.refusals
    assert any("lm_head.weight" in note for note in report.notes)
    door.extrapolate(*folders, tmp_path / "out", alpha=1.5, verify=False)
    expected = naive(sft, aligned, 1.5)
    assert_same(load(tmp_path / "out"), {name: expected[name] for name in stored["aligned"]})


def test_an_untied_head_on_one_side_is_refused(tmp_path: Path) -> None:
    sft, aligned = weights(), nudged(weights())
    del aligned["lm_head.weight"]
    report = plan(*two(tmp_path, sft, aligned, tie_word_embeddings=False))
    assert not report.ok
    assert report.tensors.extra == ("lm_head.weight",)


def test_extra_rows_are_matched_by_token(tmp_path: Path) -> None:
    sft = weights()
    aligned = nudged(sft)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        aligned[name] = torch.cat([aligned[name], torch.randn(3, 10).bfloat16()])
    folders = two(tmp_path, sft, aligned)
    tokens = [f"t{i}" for i in range(12)]
    tokenizer(folders[0], tokens)
    tokenizer(folders[1], tokens, added={"<|end_of_turn|>": 12, "<|pad_0|>": 13})
    report = plan(*folders)
    assert report.ok, report.refusals
    assert (
        "3 embedding rows only in the aligned model: copied: 12 <|end_of_turn|>" in report.notes[0]
    )
    result = door.extrapolate(*folders, tmp_path / "out", alpha=1.5, verify=False)
    out = load(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shared = naive({name: sft[name]}, {name: aligned[name][:12]}, 1.5)[name]
        assert torch.equal(out[name][:12], shared)
        assert torch.equal(out[name][12:], aligned[name][12:])
    assert result.statistics.elements == sum(t.numel() for t in sft.values())


def test_swapped_ids_are_noticed_and_matched(tmp_path: Path) -> None:
    sft = weights()
    order = [3, 1, 2, 0, *range(4, 12)]  # the aligned model has tokens 0 and 3 the other way round
    aligned = nudged(sft)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        aligned[name] = aligned[name][order].contiguous()
    folders = two(tmp_path, sft, aligned)
    tokens = [f"t{i}" for i in range(12)]
    tokenizer(folders[0], tokens)
    tokenizer(folders[1], [tokens[i] for i in order])
    report = plan(*folders)
    assert "token ids differ: embedding rows are matched by token" in report.warnings
    door.extrapolate(*folders, tmp_path / "out", alpha=1.5, verify=False)
    reordered = dict(sft) | {
        name: sft[name][order].contiguous()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    assert_same(load(tmp_path / "out"), naive(reordered, aligned, 1.5))


def test_extra_rows_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    sft, aligned = weights(), nudged(weights())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        aligned[name] = torch.cat([aligned[name], torch.randn(2, 10).bfloat16()])
    report = plan(*two(tmp_path, sft, aligned))
    assert not report.ok
    assert "has 12 rows in SFT and 14 in aligned" in report.refusals[0]
    assert "add its tokenizer.json" in report.refusals[0]


def test_match_rows() -> None:
    base = {0: "a", 1: "b", 2: "c"}
    assert match_rows(base, base, 3, 3) == RowMatch()
    assert match_rows(base, base, 5, 5) == RowMatch()  # padding matches by index
    assert match_rows(None, None, 4, 4) == RowMatch()
    assert match_rows(None, base, 4, 5) is None
    grown = match_rows(base, base | {3: "d"}, 3, 5)
    assert grown == RowMatch((RowRun(0, 0, 3), RowRun(3, None, 2)), (3, 4), ())
    shrunk = match_rows(base, {0: "a", 1: "c"}, 3, 2)
    assert shrunk == RowMatch((RowRun(0, 0, 1), RowRun(1, 2, 1)), (), (1,))
    renamed = match_rows(base, {0: "a", 1: "x", 2: "c"}, 3, 3)
    assert renamed == RowMatch((RowRun(0, 0, 1), RowRun(1, None, 1), RowRun(2, 2, 1)), (1,), (1,))


class _Files:
    """Tokenizer files in memory."""

    label, commit = "memory", None

    def __init__(self, **contents: bytes) -> None:
        self._contents = {name.replace("__", "."): raw for name, raw in contents.items()}
        self.sizes = {name: len(raw) for name, raw in self._contents.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._contents[name][start:stop]


def test_vocabularies_of_every_kind() -> None:
    unigram = {
        "model": {"vocab": [["<unk>", 0.0], ["▁a", -1.0]]},
        "added_tokens": [{"id": 2, "content": "x"}],
    }
    assert read_vocabulary(_Files(tokenizer__json=json.dumps(unigram).encode())) == {
        0: "<unk>",
        1: "▁a",
        2: "x",
    }
    pieces = b"".join(
        b"\x0a" + bytes([len(p) + 7]) + b"\x0a" + bytes([len(p)]) + p + b"\x15\0\0\0\0"
        for p in (b"<unk>", b"<s>", "▁t".encode())
    )
    trainer = b"\x12\x02\x18\x01"
    assert read_vocabulary(_Files(tokenizer__model=pieces + trainer)) == {
        0: "<unk>",
        1: "<s>",
        2: "▁t",
    }
    added = _Files(vocab__json=b'{"a": 0}', added_tokens__json=b'{"<pad>": 1}')
    assert read_vocabulary(added) == {0: "a", 1: "<pad>"}
    assert read_vocabulary(_Files()) is None
    with pytest.raises(door.TokenizerError, match="is damaged"):
        read_vocabulary(_Files(tokenizer__json=b"{}"))
    with pytest.raises(door.TokenizerError, match="is damaged"):
        read_vocabulary(_Files(tokenizer__model=b"\x0a\xff"))


SIDECARS = {
    "generation_config.json": b'{"eos_token_id": 32000}',
    "tokenizer_config.json": b'{\n "legacy": true  }',
    "special_tokens_map.json": b"{}",
    "tokenizer.model": b"\x12\x00",  # no piece, and how none was trained
    "chat_template.jinja": b"{{ bos_token }}\r\n",
    "additional_chat_templates/tool.jinja": b"tool",
    "preprocessor_config.json": b"{}",
    "LICENSE": b"Apache-2.0",
    "NOTICE.txt": b"notice",
    "USE_POLICY.md": b"policy",
}
LEFT = [
    "pytorch_model.bin", "optimizer.pt", "rng_state.pth", "model.gguf", "original/consolidated.00.pth",
    "training_args.bin", "trainer_state.json", "notebook.ipynb", "modeling_evil.py", ".gitattributes",
    "README.md", "expo.json", "model.fp32.safetensors",
]  # fmt: skip


def test_sidecars_travel_byte_for_byte_and_the_rest_is_named(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    for name, content in SIDECARS.items():
        (pair.aligned / name).parent.mkdir(exist_ok=True)
        (pair.aligned / name).write_bytes(content)
    for name in LEFT:
        (pair.aligned / name).parent.mkdir(exist_ok=True)
        (pair.aligned / name).write_bytes(b"x" * 10)
    (pair.sft / "added_tokens.json").write_text("{}")  # the SFT model is no donor
    report = plan(pair.sft, pair.aligned)
    assert set(report.sidecars) == {*SIDECARS, "config.json"}
    assert report.left_behind == dict.fromkeys(LEFT, 10)
    out = tmp_path / "out"
    ran = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5, "--include", "*.ipynb")
    assert ran.code == 0, ran.err
    for name, content in SIDECARS.items():
        assert (out / name).read_bytes() == content, name
    shards = {path.name for path in pair.aligned.glob("model-*.safetensors")}
    index = {"model.safetensors.index.json"}
    expected = {
        *SIDECARS,
        *shards,
        *index,
        "config.json",
        "expo.json",
        "README.md",
        "notebook.ipynb",
    }
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == expected


def test_model_code_is_copied_and_flagged(pair: Pair) -> None:
    config = CONFIG | {
        "auto_map": {"AutoModel": "modeling_x.X", "AutoTokenizer": ["tok_x.T", None]}
    }
    (pair.aligned / "config.json").write_text(json.dumps(config))
    for name in ("modeling_x.py", "tok_x.py", "other.py"):
        (pair.aligned / name).write_text("")
    report = plan(pair.sft, pair.aligned)
    assert {"modeling_x.py", "tok_x.py"} <= set(report.sidecars)
    assert "other.py" in report.left_behind
    assert "modeling_x.py is model code (auto_map): copied, read it first" in report.warnings


def test_a_stale_single_file_beside_an_index_is_what_loaders_read(pair: Pair) -> None:
    write_checkpoint(pair.aligned, pair.aligned_tensors)
    report = plan(pair.sft, pair.aligned)
    assert any("holds both model.safetensors and" in note for note in report.notes)
    assert list(report.shards) == ["model.safetensors"]


def test_different_families_are_warned_about(pair: Pair) -> None:
    (pair.aligned / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    assert (
        "model_type differs: mistral in sft, llama in aligned"
        in plan(pair.sft, pair.aligned).warnings
    )


def test_negative_alpha_is_warned_about(pair: Pair, expo: Callable[..., Ran]) -> None:
    ran = expo("plan", pair.sft, pair.aligned, "--alpha", -1)
    assert ran.code == 0
    assert "alpha -1 is negative" in ran.out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("model.layers.3.self_attn.q_proj.bias", (3, "self_attn.q_proj.bias")),
        ("transformer.h.11.attn.c_attn.weight", (11, "attn.c_attn")),
        ("model.layers.0.mlp.experts.7.w1.weight", (0, "mlp.experts.*.w1")),
        ("model.embed_tokens.weight", (None, "embed_tokens")),
        ("lm_head.weight", (None, "lm_head")),
    ],
)
def test_module_of(name: str, expected: tuple[int | None, str]) -> None:
    assert module_of(name) == expected
