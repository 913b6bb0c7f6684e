"""What somebody who means harm, or a broken disk, puts where a model, a spec or golden vectors should be.

A case spoils a folder that holds a whole pair with an adapter, tokenizers, a spec and vectors (`workplace`),
and says which command then reads it. `SURE` are refused; of `CHANCE`, drawn by a seed, some are harmless.
"""

import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from expo.checkpoint.headers import layout

from .conftest import nudged, weights, write_checkpoint

Spoil = Callable[[Path], object]

PAIR = ("plan", "sft", "aligned", "--alpha", "1.5")
ADAPTED = ("plan", "sft", "sft+lora", "--alpha", "1.5")
ROWS = ("plan", "sft", "wide", "--alpha", "1.5")
PICKLED = ("plan", "pickled", "aligned", "--alpha", "1.5")
SPEC = ("merge", "spec.yml", "out", "-q")
VECTORS = ("verify", "aligned", "--quick", "--vectors", "vectors.yml")


@dataclass(frozen=True)
class Case:
    spoil: Spoil
    words: tuple[str, ...]


SPEC_TEXT = """\
merge_method: expo
base_model: ./sft
models:
  - model: ./aligned
    parameters: {alpha: 1.5}
"""
VECTORS_TEXT = """\
schema: expo.golden/1
name: mine
source: a test
cases:
  - {name: one, text: hello, ids: [1]}
"""
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
TOKENS = [f"t{number}" for number in range(12)]


def workplace(folder: Path) -> Path:
    """A pair, an adapter of the SFT model, a model with two rows more, one in torch's own format."""
    sft = weights()
    aligned = nudged(sft)
    write_checkpoint(folder / "sft", sft)
    write_checkpoint(folder / "aligned", aligned)
    wide = {n: torch.cat([t, t[:2]]) if t.shape[0] == 12 else t for n, t in aligned.items()}
    write_checkpoint(folder / "wide", wide)
    for name, more in (("sft", []), ("wide", ["<a>", "<b>"])):
        vocabulary = {token: index for index, token in enumerate([*TOKENS, *more])}
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
    write_checkpoint(folder / "pickled", sft)
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(sft, folder / "pickled" / "pytorch_model.bin")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(LORA))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": torch.ones(2, 10), "lora_B": torch.ones(10, 2)}
    save_file({f"{prefix}.{name}.weight": t for name, t in factors.items()}, folder / "lora" / "adapter_model.safetensors")  # fmt: skip
    (folder / "spec.yml").write_text(SPEC_TEXT)
    (folder / "vectors.yml").write_text(VECTORS_TEXT)
    return folder


def text(name: str, content: str | bytes) -> Spoil:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def edited(name: str, **values: object) -> Spoil:
    """JSON with other values."""

    def spoil(folder: Path) -> None:
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | values))

    return spoil


DEEP = "[" * 100_000
SURROGATE = '"\\ud800"'
NO_JSON = {
    "empty": b"", "not UTF-8": b'{"a": "\xff"}', "cut": b'{"peft_type": "LO', "deep": DEEP.encode(),
    "deep and whole": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "a list": b"[1]", "text": b'"x"', "null": b"null", "a number": b"1",
    "zeros": bytes(5000), "UTF-16": '{"a": 1}'.encode("utf-16"), "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"lora_alpha": 4, "peft_type": "LORA", "base_model_name_or_path": "\\ud800"}',
    "a key of 5 MB": b'{"' + b"k" * 5_000_000 + b'": 1',
}  # fmt: skip

REGEX = {
    "unclosed": "(", "nested": "([a-z._0-9]+)+!",
    "polynomial": ".*" * 12 + "!", "too many": "a{99999999999}",
    "deep": "(" * 5000 + ")" * 5000, "ranges": "(?i)" + "[\x01-\U0010ffff]" * 300,
    "behind": "(?<=.*)x", "half a character": "\ud800(",
}  # fmt: skip
LONG_NAME = "model.layers.0." + "a" * 60 + ".weight"


def adapter_cases() -> Iterator[tuple[str, Case]]:
    file = "lora/adapter_config.json"
    for name, raw in NO_JSON.items():
        yield f"adapter {name}", Case(text(file, raw), ADAPTED)
    for value in (
        None,
        [16],
        "16",
        {},
        True,
        float("nan"),
        float("inf"),
        10**400,
        -(10**400),
        [],
        "x" * 10**6,
    ):
        yield f"adapter lora_alpha {str(value)[:9]}", Case(edited(file, lora_alpha=value), ADAPTED)
    for value in ([1], "x", 3, {"x": [1]}, {"self_attn.q_proj": "4"}, {"self_attn.q_proj": None}, {"q_proj": 10**400},
                  {"q_proj": float("inf")}, {".*": True}, {"q_proj": {}}):  # fmt: skip
        yield (
            f"adapter alpha_pattern {str(value)[:30]}",
            Case(edited(file, alpha_pattern=value), ADAPTED),
        )
    for name, pattern in REGEX.items():
        yield f"adapter regex {name}", Case(edited(file, alpha_pattern={pattern: 8}), ADAPTED)
    for value in (["LORA"], 3, None, {}, "x" * 10**6, "IA3\n\x1b[31m"):
        yield f"adapter peft_type {str(value)[:9]!r}", Case(edited(file, peft_type=value), ADAPTED)
    yield (
        "adapter many patterns",
        Case(edited(file, alpha_pattern={f"(a|{n})+": 1 for n in range(200_000)}), ADAPTED),
    )
    yield (
        "adapter a name of 1 MB",
        Case(_named_tensor("base_model.model." + "n" * 10**6 + ".lora_A.weight"), ADAPTED),
    )
    yield "adapter rank 0", Case(_factors(0), ADAPTED)


def _named_tensor(name: str) -> Spoil:
    return lambda folder: save_file(
        {name: torch.ones(2, 10)}, folder / "lora" / "adapter_model.safetensors"
    )


def _factors(rank: int) -> Spoil:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    made = {
        f"{prefix}.lora_A.weight": torch.ones(rank, 10),
        f"{prefix}.lora_B.weight": torch.ones(10, rank),
    }
    return lambda folder: save_file(made, folder / "lora" / "adapter_model.safetensors")


def piece(token: str) -> bytes:
    inner = b"\x0a" + bytes([len(token)]) + token.encode()
    return b"\x0a" + bytes([len(inner)]) + inner


PIECES = b"".join(piece(token) for token in [*TOKENS, "<a>", "<b>"])
TRAINER = b"\x12\x02\x20\x0e"


def pieces(raw: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "wide" / "vocab.json").unlink()
        (folder / "wide" / "tokenizer.model").write_bytes(raw)

    return spoil


def tokenizer(**values: object) -> Spoil:
    known = {
        "model": {"vocab": {token: n for n, token in enumerate([*TOKENS, "<a>", "<b>"])}},
        "added_tokens": [],
    }
    return text("wide/tokenizer.json", json.dumps(known | values))


def vocabulary_cases() -> Iterator[tuple[str, Case]]:
    file = "wide/vocab.json"
    for name, raw in NO_JSON.items():
        if name not in ("half a character",):
            yield f"vocabulary {name}", Case(text(file, raw), ROWS)
    maps = {
        "ids as text": {t: str(n) for n, t in enumerate(TOKENS)}, "one id twice": {"a": 0, "b": 0, "c": 1},
        "a fraction": {"a": 0.0, "b": 1.5}, "true": {"a": True, "b": 0}, "below zero": {"a": -1, "b": 0},
        "beyond": {"a": 10**30}, "lists": {"a": [0]}, "null": {"a": None}, "nested": {"a": {"b": 1}},
    }  # fmt: skip
    for name, value in maps.items():
        yield f"vocabulary {name}", Case(text(file, json.dumps(value)), ROWS)
        yield f"added tokens {name}", Case(text("wide/added_tokens.json", json.dumps(value)), ROWS)
        yield f"tokenizer.json {name}", Case(tokenizer(model={"vocab": value}), ROWS)
    for name, value in {"numbers": [[1, 0.0], [2, 0.0]], "flat": ["a", "b"], "mixed": [["a", 0.0], {"b": 1}],
                        "null": [None], "pairs of texts": [["a", "b", "c"]], "a number": 7, "text": "abc"}.items():  # fmt: skip
        yield f"unigram {name}", Case(tokenizer(model={"vocab": value}), ROWS)
    for name, value in {"two of one id": [{"id": 12, "content": "x"}, {"id": 12, "content": "y"}],
                        "of a token's id": [{"id": 3, "content": "x"}], "ids as text": [{"id": "12", "content": "x"}],
                        "no content": [{"id": 12}], "numbers": [{"id": 12, "content": 5}], "a map": {"id": 12},
                        "text": "abc"}.items():  # fmt: skip
        yield f"tokenizer.json added {name}", Case(tokenizer(added_tokens=value), ROWS)
    for name, value in {"ids": {"x": {"content": "a"}}, "content": {"12": {"content": 5}}, "text": "abc",
                        "a list": [1], "one id twice": {"12": {"content": "a"}, "012": {"content": "b"}},
                        "texts": {"12": "a"}}.items():  # fmt: skip
        content = json.dumps({"added_tokens_decoder": value})
        yield f"tokenizer_config {name}", Case(text("wide/tokenizer_config.json", content), ROWS)
    for name, raw in {"cut in a piece": PIECES[:-2], "cut after a piece": PIECES, "cut in a length": PIECES + b"\x0a",
                      "endless length": b"\x0a" + b"\xff" * 5000, "a group": b"\x0b", "not UTF-8": b"\x0a\x03\x0a\x01\xff" + TRAINER,
                      "a piece without text": b"\x0a\x02\x18\x01" + TRAINER, "empty": b"", "beyond": b"\x0a\x7f\x0a",
                      "a number cut": PIECES + TRAINER + b"\x09\x00"}.items():  # fmt: skip
        yield f"sentencepiece {name}", Case(pieces(raw), ROWS)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
YAML = {
    "billion laughs": LAUGHS, "merged laughs": MERGES, "an alias in itself": "a: &a [*a]\n", "a map in itself": "a: &a {b: *a}\n",
    "a key in itself": "? &a [*a]\n: 1\n", "deep flow": "[" * 20_000, "deep and whole": "a: " + "[" * 900 + "]" * 900,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(1500)), "deep dashes": "- " * 5000 + "x",
    "a huge integer": "seed: " + "9" * 5000 + "\n", "a key of 5 MB": "k" * 5_000_000 + ": 1\n",
    "a value of 5 MB": "merge_method: " + "v" * 5_000_000 + "\n", "many keys": "".join(f"k{n}: {n}\n" for n in range(50_000)),
    "a list as a key": "? [a, b]\n: c\n", "tags": "a: !!python/object/apply:os.system [ls]\n", "int of nothing": 'a: !!int ""\n',
    "bool of nothing": "a: !!bool maybe\n", "float of nothing": 'a: !!float ""\n', "a time of nothing": "a: !!timestamp x\n",
    "binary": "a: !!binary '\u00e9'\n", "set": "a: !!set {b}\n", "no map": "just text\n", "a null byte": "a: \0\n", "controls": "a: \x1b[31m\n",
    "unclosed": 'a: "b\n', "tabs": "a:\n\t- b\n", "undefined alias": "a: *b\n", "same anchor": "a: &a 1\nb: &a 2\nc: *a\n",
    "many aliases of a long text": f"a: &a {'v' * 100_000}\nb: [{', '.join(['*a'] * 50_000)}]\n",
    "half a character": 'merge_method: "\\ud800"\n', "directives": "%YAML 9.9\n---\na: 1\n", "documents": "--- a\n" * 3000,
    "not UTF-8": b"a: \xff\n", "a web page": "<!DOCTYPE html><html>", "half UTF-16": b"\xff\xfea\x00", "merge of text": "<<: x\n",
    "many quotes": "a: " + "'" * 99_999, "question marks": "? " * 5000,
}  # fmt: skip


def yaml_cases() -> Iterator[tuple[str, Case]]:
    for name, raw in YAML.items():
        yield f"spec {name}", Case(text("spec.yml", raw), SPEC)
        if name not in ("same anchor",):
            yield f"vectors {name}", Case(text("vectors.yml", raw), VECTORS)


def vectors_cases() -> Iterator[tuple[str, Case]]:
    misspelt = VECTORS_TEXT.replace("ids:", "idz:")
    yield (
        "vectors expecting nothing but an unknown key",
        Case(text("vectors.yml", misspelt), VECTORS),
    )


def spec_cases() -> Iterator[tuple[str, Case]]:
    """A spec that is YAML, with values that no spec has."""
    long, huge = "x" * 10**5, "9" * 400
    lines = {
        "alpha huge": ("alpha: 1.5", f"alpha: {huge}"), "alpha text": ("alpha: 1.5", f"alpha: {long}"),
        "alpha gradient": ("alpha: 1.5", f"alpha: [1, {huge}]"), "alpha filter": ("alpha: 1.5", f"alpha: [{{filter: q, value: {huge}}}]"),
        "paper_alpha huge": ("alpha: 1.5", f"paper_alpha: {huge}"), "alpha overflow": ("alpha: 1.5", "alpha: 1e999"),
        "parameter of 100 KB": ("alpha: 1.5", f"{long}: 1"), "model of 100 KB": ("./aligned", f"./{long}"),
        "model with a null byte": ("./aligned", '"a\\0b"'), "model of half a character": ("./aligned", '"./\\ud800"'),
        "model with a newline": ("./aligned", '"./a\\nb"'), "nobody's home": ("./aligned", "~nobody-at-all/x"),
        "model a number": ("./aligned", huge), "an address": ("./aligned", "http://[::1"), "a store": ("./aligned", f"s3://{long}/x"),
        "a bad port": ("./aligned", "http://localhost:99999999/x"), "bad IDNA": ("./aligned", f"http://{'ü' * 300}.de/x"),
        "method of 100 KB": ("merge_method: expo", f"merge_method: {long}"),
    }  # fmt: skip
    for name, (old, new) in lines.items():
        yield f"spec {name}", Case(text("spec.yml", SPEC_TEXT.replace(old, new)), SPEC)
    more = {
        "seed huge": f"seed: {huge}", "seed below 0": "seed: -1", "seed of 64 bits": "seed: 18446744073709551616",
        "seed text": "seed: x", "layers huge": f"fix_first_layers: {huge}", "layers below 0": "fix_last_layers: -1",
        "many kinds": "exclude: [" + "x, " * 20_000 + "y]", "dtype of 100 KB": f"dtype: {long}",
        "vectors of 100 KB": f"verify: {{vectors: {long}}}", "vectors null byte": 'verify: {vectors: "\\0"}',
        "edits huge": f"edits: [{{laser: {{keep: rank={huge}}}}}]", "edits layers": f"edits: [{{laser: {{keep: gd, layers: [0, {huge}]}}}}]",
        "edit of 100 KB": f"edits: [{{{long}: {{}}}}]", "donor null byte": 'donor: "\\0"', "donor long": f"donor: {long}",
        "transform": f"transforms: [{{dare: {{density: {huge}}}}}]", "keep of 100 KB": f"edits: [{{laser: {{keep: {long}}}}}]",
        "tokenizer": "tokenizer: {source: [1]}", "slices": "slices: [{sources: []}]",
    }  # fmt: skip
    for name, line in more.items():
        yield f"spec {name}", Case(text("spec.yml", f"{SPEC_TEXT}{line}\n"), SPEC)
    for name, pattern in REGEX.items():
        target = json.dumps(pattern)
        edit = f"edits: [{{laser: {{keep: gd, target: {target}}}}}]\n"
        yield f"spec target {name}", Case(text("spec.yml", SPEC_TEXT + edit), SPEC)


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("was-run",)


def archive(
    data: bytes,
    *,
    storage: bytes = bytes(240),
    compression: int = zipfile.ZIP_STORED,
    byteorder: str = "little",
) -> Spoil:
    """A `.bin` whose pickle is `data`."""

    def spoil(folder: Path) -> None:
        with zipfile.ZipFile(folder / "pickled" / "pytorch_model.bin", "w", compression) as file:
            file.writestr("archive/data.pkl", data)
            file.writestr("archive/byteorder", byteorder)
            file.writestr("archive/data/0", storage)
            file.writestr("archive/version", "3\n")

    return spoil


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(raw)) + raw  # LONG4


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def tensor(
    key: str = "0",
    *,
    storage: str = "FloatStorage",
    size: tuple[int, ...] = (6, 10),
    stride: tuple[int, ...] = (10, 1),
    offset: int = 0,
    count: int = 60,
) -> bytes:
    """The opcodes of one tensor in a storage."""
    stored = (
        _tuple(
            _text("storage"), _global("torch", storage), _text(key), _text("cpu"), _number(count)
        )
        + b"Q"
    )
    shape = _tuple(*map(_number, size))
    step = _tuple(*map(_number, stride))
    hooks = _global("collections", "OrderedDict") + b")R"
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + _tuple(stored, _number(offset), shape, step, b"\x89", hooks)
        + b"R"
    )


def state(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(_text(name) + raw for name, raw in tensors.items()) + b"u."


PICKLES = {
    "deep tuples as a key": b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a memo of 16 GB": b"\x80\x02}r\xff\xff\xff\x7f.", "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 8 EB": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "nothing": b"", "no end": b"\x80\x02}", "protocol 99": b"\x80\x63}.",
    "an empty stack": b"\x80\x02.", "a mark": b"\x80\x02(.", "unknown opcode": b"\x80\x02\xff.", "a number": b"\x80\x02K\x01.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.", "a map in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "code": pickle.dumps({"w": Code()}, 2), "eval": _global("builtins", "eval") + b"(X\x01\x00\x00\x001tR.",
    "getattr": b"\x80\x02" + _global("builtins", "getattr") + b".", "dots": b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93.",
    "a class": b"\x80\x02}(X\x01\x00\x00\x00w" + _global("collections", "OrderedDict") + b"u.",
    "a text for a storage": b"\x80\x02}(X\x01\x00\x00\x00wX\x01\x00\x00\x000Qu.",
    "no storage": state(w=tensor("7")), "a key out of the archive": state(w=tensor("../../../etc/passwd")),
    "beyond the storage": state(w=tensor(offset=10)), "before the storage": state(w=tensor(offset=-10)),
    "a huge shape": state(w=tensor(size=(2**62, 2**62), stride=(2**62, 1))), "below zero": state(w=tensor(size=(-6, -10))),
    "huge numbers": state(w=tensor(size=(10**300,), stride=(1,))), "transposed": state(w=tensor(size=(10, 6), stride=(1, 10))),
    "steps of nothing": state(w=tensor(stride=(0, 0))), "steps missing": state(w=tensor(stride=(1,))),
    "complex": state(w=tensor(storage="ComplexFloatStorage", count=30)), "quantized": state(w=tensor(storage="QInt8Storage")),
    "no such storage": state(w=tensor(storage="NoStorage")), "not a storage": state(w=tensor(storage="Tensor")),
    "numbers as names": b"\x80\x02}(K\x01" + tensor() + b"u.", "a name of 5 MB": state(**{"n" * 5_000_000: b"K\x01"}),
    "a tuple as a name": b"\x80\x02}()" + tensor() + b"u.", "half a character": b"\x80\x02}(X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"u.",
    "a million numbers": b"\x80\x02](" + b"K\x01" * 10_000_000 + b"e.", "a product": b"\x80\x02}(X\x01\x00\x00\x00w" + _global("torch._utils", "_rebuild_tensor_v2") + b")Ru.",
    "extension": b"\x80\x02\x82\x01.", "state": state(w=tensor() + b"}b"), "instance": b"(i__main__\nX\n.", "setitem": tensor() + b"K\x01K\x01s.",
}  # fmt: skip


def pickle_cases() -> Iterator[tuple[str, Case]]:
    for name, data in PICKLES.items():
        yield f"bin {name}", Case(archive(data), PICKLED)
    good = state(w=tensor())
    yield "bin compressed", Case(archive(good, compression=zipfile.ZIP_DEFLATED), PICKLED)
    yield (
        "bin a bomb",
        Case(
            archive(b"\x80\x02" + b"N0" * 5_000_000 + b".", compression=zipfile.ZIP_BZIP2),
            PICKLED,
        ),
    )
    yield "bin big-endian", Case(archive(good, byteorder="big"), PICKLED)
    yield "bin a short storage", Case(archive(good, storage=bytes(200)), PICKLED)
    file = "pickled/pytorch_model.bin"
    yield "bin no zip", Case(text(file, bytes(1000)), PICKLED)
    yield "bin an old pickle", Case(text(file, pickle.dumps({"w": [1]}, 2)), PICKLED)
    yield "bin an empty archive", Case(text(file, b"PK\x05\x06" + bytes(18)), PICKLED)
    for share in (0.2, 0.5, 0.99):
        yield f"bin cut at {share}", Case(_cut(file, share), PICKLED)


def _cut(name: str, share: float) -> Spoil:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def header(entries: object, nbytes: int = 0) -> Spoil:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return text("sft/model.safetensors", len(raw).to_bytes(8, "little") + raw + bytes(nbytes))


def header_cases() -> Iterator[tuple[str, Case]]:
    def entry(**more: object) -> dict:
        return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | more

    found: dict[str, object] = {
        "a dtype of 1 MB": {"w": entry(dtype="F" * 10**6)}, "a shape of 100,000": {"w": entry(shape=[-1] * 100_000)},
        "a shape of huge numbers": {"w": entry(shape=[10**300] * 3000)}, "a huge offset": {"w": entry(data_offsets=[0, 10**400])},
        "true": {"w": entry(shape=[True])}, "a name of 1 MB": {"w" * 10**6: 1}, "deep": DEEP.encode(), "not UTF-8": b'{"\xff": 1}',
        "metadata": {"__metadata__": {"a": [1]}}, "half a character": b'{"\\ud800": 1}', "digits": b'{"w": ' + b"9" * 5000 + b"}",
        "many dimensions": {"w": entry(shape=[1] * 100_000)},
    }  # fmt: skip
    for name, entries in found.items():
        yield f"header {name}", Case(header(entries, 4), PAIR)


def config_cases() -> Iterator[tuple[str, Case]]:
    for name, raw in NO_JSON.items():
        yield f"config {name}", Case(text("aligned/config.json", raw), PAIR)
    index = {"not a map": {"weight_map": [1]}, "numbers": {"weight_map": {"a": 1}}, "a null byte": {"weight_map": {"a": "b\0"}},
             "a long name": {"weight_map": {"a": "b" * 5000}}, "a long tensor": {"weight_map": {"a" * 10**6: "b"}},
             "half a character": {"weight_map": {"a": "\ud800"}}, "outside": {"weight_map": {"a": "../sft/model.safetensors"}}}  # fmt: skip
    for name, value in index.items():
        yield f"index {name}", Case(_index(value), PAIR)
    yield (
        "quantized by a text of 1 MB",
        Case(edited("sft/config.json", quantization_config={"quant_method": "q" * 10**6}), PAIR),
    )


def coded_cases() -> Iterator[tuple[str, Case]]:
    """Headers of quantized models, over holes."""

    def code(*shape: int, dtype: str = "F8_E4M3") -> tuple[str, tuple[int, ...]]:
        return dtype, shape

    found: dict[str, tuple[dict, object]] = {
        "no scale": ({"w": code(4, 4)}, None), "a scale alone": ({"w.weight_scale": code(1, dtype="F32")}, None),
        "a scale of many": ({"w": code(4, 4), "w_scale": code(4, 4, 4, dtype="F32")}, None),
        "codes of codes": ({"w": code(4), "w_scale": code(1), "w_scale_scale": code(1, dtype="F32")}, None),
        "blocks of nothing": ({"w_blocks": code(2, 0, 2, 16, dtype="U8"), "w_scales": code(2, 2, dtype="U8")}, None),
        "a block of 2⁶²": ({"w": code(4, 4), "w_scale_inv": code(2, 2, dtype="F32")}, [1 << 62, 1]),
        "a block below 0": ({"w": code(4, 4), "w_scale_inv": code(2, 2, dtype="F32")}, [-1, -1]),
        "a block of digits": ({"w": code(4, 4), "w_scale_inv": code(2, 2, dtype="F32")}, [10**400, 1]),
        "blocks of text": ({"w": code(4, 4), "w_scale_inv": code(2, 2, dtype="F32")}, "128"),
        "a name of 10 KB": ({"w" * 10_000: code(4, 4)}, None),
    }  # fmt: skip
    for name, (held, block) in found.items():
        yield f"codes {name}", Case(_coded(held, block), PAIR)


def _coded(held: dict[str, tuple[str, tuple[int, ...]]], block: object) -> Spoil:
    def spoil(folder: Path) -> None:
        head, nbytes = layout(((name, *one) for name, one in held.items()), {})
        (folder / "sft" / "model.safetensors").write_bytes(head + bytes(nbytes))
        section = {"quant_method": "fp8", "weight_block_size": block}
        edited("sft/config.json", quantization_config=section)(folder)

    return spoil


def _index(value: object) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "sft" / "model.safetensors").unlink()
        (folder / "sft" / "model.safetensors.index.json").write_text(json.dumps(value))

    return spoil


def name_cases() -> Iterator[tuple[str, Case]]:
    nothing: Spoil = lambda folder: None  # noqa: E731
    for name, given in {"long": "a" * 5000, "long parts": "/".join(["a" * 200] * 30), "nobody's": "~nobody-at-all/x",
                        "null": "a\0b", "long hub": "o/" + "a" * 5000, "dots": "org/..", "long spec": "a" * 300 + ".yml",
                        "surrogate": "./caf\udce9", "http": "http://[::1", "plus": "+" * 3000, "newline": "./a\nb"}.items():  # fmt: skip
        yield f"name {name} of a model", Case(nothing, ("plan", given, "aligned", "--alpha", "1.5"))
        yield f"name {name} of a spec", Case(nothing, ("plan", given))
        yield (
            f"name {name} of vectors",
            Case(nothing, ("verify", "aligned", "--quick", "--vectors", given)),
        )
        yield f"name {name} of a folder", Case(nothing, ("verify", given, "--quick"))
        yield f"name {name} for info", Case(nothing, ("info", given))
    for name, given in {"long": "a" * 300, "long parts": "/".join(["a" * 200] * 30), "null": "a\0b", "surrogate": "caf\udce9",
                        "below nothing": "no/such/a\0"}.items():  # fmt: skip
        words = ("extrapolate", "sft", "aligned", given, "--alpha", "1.5", "-q")
        yield f"name {name} of OUT", Case(nothing, words)
    yield "name of a file not UTF-8", Case(_odd_file, (*PAIR, "--json"))
    yield (
        "name of a file not UTF-8, merged",
        Case(_odd_file, ("extrapolate", "sft", "aligned", "out", "--alpha", "1.5", "-q")),
    )
    for seed in ("-1", "4294967296", "18446744073709551616", "9" * 400):
        yield (
            f"seed {seed[:22]}",
            Case(
                nothing,
                ("extrapolate", "sft", "aligned", "out", "--alpha", "1.5", "-q", "--seed", seed),
            ),
        )
    for name, pattern in REGEX.items():
        if "\ud800" not in pattern and "\0" not in pattern and len(pattern) < 20_000:
            yield (
                f"allow-missing {name}",
                Case(
                    _odd_tensors,
                    (
                        "extrapolate",
                        "sft",
                        "aligned",
                        "out",
                        "--alpha",
                        "1.5",
                        "-q",
                        "--allow-missing",
                        pattern,
                    ),
                ),
            )
            yield f"target {name}", Case(nothing, ("spectrum", "sft", "--target", pattern))


def _odd_file(folder: Path) -> None:
    Path(os.fsdecode(bytes(folder / "aligned") + b"/LICENSE\xe9.txt")).write_text("x")


def _odd_tensors(folder: Path) -> None:
    tensors = weights()
    write_checkpoint(folder / "sft", tensors | {LONG_NAME: torch.ones(2)})


SURE = dict(
    case
    for cases in (vectors_cases, adapter_cases, vocabulary_cases, yaml_cases, spec_cases, pickle_cases, header_cases, coded_cases, config_cases, name_cases)
    for case in cases()
)  # fmt: skip


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def drawn(seed: int, count: int) -> Iterator[tuple[str, Case]]:
    """Bytes of good files changed, cut and repeated."""
    chance = random.Random(seed)
    files = {"lora/adapter_config.json": ADAPTED, "wide/vocab.json": ROWS, "spec.yml": SPEC, "vectors.yml": VECTORS,
             "pickled/pytorch_model.bin": PICKLED, "sft/model.safetensors": PAIR, "aligned/config.json": PAIR}  # fmt: skip
    for number in range(count):
        name = chance.choice(list(files))
        yield f"drawn {number} {name}", Case(_mutated(name, chance.randrange(1 << 30)), files[name])


def _mutated(name: str, seed: int) -> Spoil:
    def spoil(folder: Path) -> None:
        chance = random.Random(seed)
        raw = bytearray((folder / name).read_bytes())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            match chance.randrange(4):
                case 0:
                    raw[at] = chance.randrange(256)
                case 1:
                    raw[at:at] = chance.choice(
                        [b"[", b"{", b'"', b"&a *a ", b"9" * 400, b"\0", b"\xff", b"null"]
                    )
                case 2:
                    del raw[at : at + chance.randint(1, 20)]
                case _:
                    raw[at:at] = raw[max(0, at - 30) : at] * chance.randint(1, 50)
        (folder / name).write_bytes(raw)

    return spoil
