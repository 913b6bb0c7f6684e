"""Faults to inject into a clean model folder: one at a time, each with the check that must name it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .openchat import TEMPLATE, TOKENIZER_CONFIG
from .templates import TEMPLATES as PUBLISHED

CHATML = PUBLISHED["chatml"][0]
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GATE = "model.layers.0.mlp.gate_proj.weight"


@dataclass(frozen=True)
class Fault:
    """`check` must come to `status`, and its message hold `says`. `reads` says which facts the fault
    changes."""

    check: str
    inject: Callable[[Path], None]
    reads: str = ""
    status: str = "error"
    says: str = ""


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change a JSON file in place."""

    def inject(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content, ensure_ascii=False))

    return inject


def put(name: str, key: str, value: object) -> Callable[[Path], None]:
    return edit(name, lambda content: content.__setitem__(key, value))


def drop(name: str, key: str) -> Callable[[Path], None]:
    return edit(name, lambda content: content.pop(key))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        (folder / name).write_text(text)

    return inject


def template(old: str, new: str) -> Callable[[Path], None]:
    assert old in TEMPLATE
    return write("chat_template.jinja", TEMPLATE.replace(old, new, 1))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite the shard that holds the layers' gate, and the index with it."""

    def inject(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = index["weight_map"][GATE]
        held = load_file(folder / file)
        before = set(held)
        change(held)
        save_file(
            {name: t.contiguous() for name, t in held.items()}, folder / file, {"format": "pt"}
        )
        (folder / file).chmod(0o644)
        weight_map = {k: v for k, v in index["weight_map"].items() if k not in before - set(held)}
        index["weight_map"] = weight_map | dict.fromkeys(set(held) - before, file)
        (folder / INDEX).write_text(json.dumps(index))

    return inject


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the values of all tensors, shard by shard as they lie."""

    def inject(folder: Path) -> None:
        shards = {file: load_file(folder / file) for file in (FIRST, SECOND)}
        held = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
        change(held)
        for file, shard in shards.items():
            save_file({n: held[n].contiguous() for n in shard}, folder / file, {"format": "pt"})
            (folder / file).chmod(0o644)

    return inject


def copy_layer(source: int, target: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if f".layers.{target}." in name]:
            held[name] = held[name.replace(f".{target}.", f".{source}.")].clone()

    return change


def _swap_layers(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if ".layers.0." in name]:
        other = name.replace(".0.", ".1.")
        held[name], held[other] = held[other], held[name]


def _other_model(folder: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    held = load_file(folder / FIRST)
    held = {
        n: (torch.randn(t.shape, generator=generator) * 0.02).to(t.dtype) for n, t in held.items()
    }
    save_file(held, folder / FIRST, {"format": "pt"})
    (folder / FIRST).chmod(0o644)


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))  # type: ignore[func-returns-value]


def resave(folder: Path) -> None:
    """What the official script does: load the tokenizer and save it again."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _all(*injections: Callable[[Path], None]) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        for one in injections:
            one(folder)

    return inject


def _swap_rare_words(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    a, b = [token for token, index in vocabulary.items() if index in (20000, 20001)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def _special(content: dict, **changes: object) -> None:
    for token in content["added_tokens"]:
        if token["content"] == "<|end_of_turn|>":
            token.update(changes)


def _rename_special(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        if name != "chat_template.jinja":
            text = text.replace("<|end_of_turn|>", "<|end_of_turns|>")
        (folder / name).write_text(text)


STRUCTURE = {
    "no weights": Fault("weights", _all(remove(INDEX), remove(FIRST), remove(SECOND))),
    "truncated shard": Fault("shards", bytes_of(FIRST, lambda raw: raw[:-10])),
    "trailing bytes": Fault("shards", bytes_of(SECOND, lambda raw: raw + b"\0")),
    "overwritten header": Fault("shards", bytes_of(FIRST, lambda raw: b"\xff" * 8 + raw[8:])),
    "empty shard": Fault("shards", write(FIRST, "")),
    "missing shard": Fault("index", remove(SECOND)),
    "index names an absent tensor": Fault("index", edit(INDEX, lambda i: i["weight_map"].__setitem__("model.new.weight", FIRST))),
    "index forgets a tensor": Fault("index", edit(INDEX, lambda i: i["weight_map"].pop(GATE))),
    "index points to the other shard": Fault("index", edit(INDEX, lambda i: i["weight_map"].update({GATE: {FIRST: SECOND, SECOND: FIRST}[i["weight_map"][GATE]]}))),
    "index points outside": Fault("index", edit(INDEX, lambda i: i["weight_map"].__setitem__(GATE, "../x.safetensors"))),
    "index without weight_map": Fault("index", drop(INDEX, "weight_map")),
    "a page for the generation config": Fault("contents", write("generation_config.json", "<!doctype html><html>"), says="generation_config.json"),
    "index is no JSON": Fault("json", write(INDEX, "{")),
    "stale model.safetensors": Fault("stale-weights", lambda f: os.link(f / FIRST, f / "model.safetensors")),
    "orphan shard": Fault("orphans", lambda f: os.link(f / FIRST, f / "model-00003-of-00003.safetensors"), status="warning"),
    "pickled weights beside": Fault("orphans", write("pytorch_model.bin", "x"), status="warning"),
    "leftover of a download": Fault("orphans", write("x.incomplete", "x"), status="warning"),
    "wrong total_size": Fault("total-size", edit(INDEX, lambda i: i["metadata"].update(total_size=1)), status="warning"),
    "mode 0600": Fault("modes", lambda f: (f / FIRST).chmod(0o600), status="warning"),
    "a flipped bit": Fault("manifest", bytes_of(FIRST, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "tensors"),
    "edited license": Fault("manifest", write("LICENSE", "MIT")),
    "unknown manifest": Fault("manifest", put("expo.json", "schema", "expo.manifest/9")),
    "not verified by its merge": Fault("at-merge", put("expo.json", "verified", False), status="warning"),
    "code that is not there": Fault("code", _all(put("config.json", "auto_map", {"AutoModel": "modeling_x.Model"}), put("config.json", "model_type", "x"), drop("config.json", "architectures")), "load", says="config.json names modeling_x.py"),
    "an extra tokenizer file": Fault("manifest", write("added_tokens.json", "{}")),
    "missing tensor": Fault("keys", tensors(lambda t: t.pop(GATE)), "load"),
    "extra tensor": Fault("keys", tensors(lambda t: t.update({"model.extra.weight": torch.ones(2)})), "load"),
    "transposed tensor": Fault("shapes", tensors(lambda t: t.update({GATE: t[GATE].T.contiguous()})), "load"),
    "FP8 tensor": Fault("codes", tensors(lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})), "", "warning", ": codes or scales of a quantized model"),
    "float32 tensor": Fault("dtypes", tensors(lambda t: t.update({GATE: t[GATE].float()}))),
    "NaN": Fault("finite", tensors(lambda t: t[GATE].view(-1)[3].fill_(float("nan"))), "tensors"),
    "infinity": Fault("finite", tensors(lambda t: t[GATE].view(-1)[-1].fill_(float("-inf"))), "tensors"),
    "zeroed weight": Fault("all-zero", tensors(lambda t: t[GATE].zero_()), "tensors"),
    "missing tensor found by loading": Fault("load", tensors(lambda t: t.pop(GATE)), "load"),
}  # fmt: skip

CONFIGURATION = {
    "no config": Fault("config", remove("config.json")),
    "config is no JSON": Fault("json", write("config.json", "{'a': 1}")),
    "config is a list": Fault("json", write("config.json", "[]")),
    "no architectures": Fault("config", drop("config.json", "architectures")),
    "other activation": Fault("architecture", put("config.json", "hidden_act", "gelu")),
    "other epsilon": Fault("architecture", put("config.json", "rms_norm_eps", 1e-6)),
    "other rope_theta": Fault("rope", put("config.json", "rope_theta", 1000000.0)),
    "lost rope_theta": Fault("rope", drop("config.json", "rope_theta")),
    "other sliding window": Fault("rope", put("config.json", "sliding_window", None)),
    "vocab_size of the base": Fault("vocabulary-rows", put("config.json", "vocab_size", 32000)),
    "one layer too many": Fault("layers", put("config.json", "num_hidden_layers", 3)),
    "other heads": Fault("load", put("config.json", "num_key_value_heads", 4), "load"),
    "tied by mistake": Fault("tied-weights", put("config.json", "tie_word_embeddings", True), "tensors"),
    "EOS 2 in config": Fault("architecture", put("config.json", "eos_token_id", 2)),
    "EOS 2 in config is not read": Fault("eos", put("config.json", "eos_token_id", 2), status="info"),
    "EOS 2 in generation config": Fault("generation-config", put("generation_config.json", "eos_token_id", 2)),
    "EOS 2 does not end turns": Fault("turn-end", put("generation_config.json", "eos_token_id", 2)),
    "no EOS in generation config": Fault("eos", drop("generation_config.json", "eos_token_id")),
    "no EOS anywhere": Fault("eos", _all(remove("generation_config.json"), drop("config.json", "eos_token_id"))),
    "EOS beyond the rows": Fault("eos", put("generation_config.json", "eos_token_id", 99999)),
    "BOS 2 in config": Fault("architecture", put("config.json", "bos_token_id", 2)),
    "PAD differs": Fault("generation-config", put("generation_config.json", "pad_token_id", 0)),
    "no cache": Fault("cache", put("config.json", "use_cache", False), status="warning"),
    "max_length of a trainer": Fault("max-length", put("generation_config.json", "max_length", 512), status="warning"),
    "dtype of another model": Fault("config-dtype", put("config.json", "torch_dtype", "float16"), status="warning"),
    "code of a stranger": Fault("remote-code", put("config.json", "auto_map", {"AutoModel": "stranger/model--modeling.Model"}), status="warning"),
    "no licence": Fault("licence", remove("LICENSE"), status="warning"),
    "another licence": Fault("licence", write("LICENSE", "MIT"), status="warning"),
    "no generation config": Fault("generation-config", remove("generation_config.json")),
    "temperature without sampling": Fault("generation-config-saves", _all(put("generation_config.json", "temperature", 0.7), put("generation_config.json", "do_sample", False)), "load", "warning"),
    "malformed EOS": Fault("architecture", put("config.json", "eos_token_id", {"a": [1]})),
}  # fmt: skip

TOKENIZER = {
    "model_type changes the class": Fault("fingerprint", put("config.json", "model_type", "llama"), "tokenizer"),
    "re-saved tokenizer": Fault("tokenizer-files", resave, "tokenizer"),
    "no tokenizer.json": Fault("tokenizer-files", remove("tokenizer.json"), "tokenizer"),
    "no vocabulary": Fault("tokenizer-loads", remove("tokenizer.json"), "tokenizer"),
    "texts are cut": Fault("saved-limits", put("tokenizer.json", "truncation", {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}), "tokenizer", "warning"),
    "truncated tokenizer.json": Fault("tokenizer-loads", bytes_of("tokenizer.json", lambda raw: raw[:-100]), "tokenizer"),
    "<sep> beyond the last row": Fault("ids-below-rows", edit("tokenizer.json", lambda t: t["added_tokens"].append(t["added_tokens"][-1] | {"id": 32002, "content": "<sep>"})), "tokenizer"),
    "no prepended space": Fault("probes", edit("tokenizer.json", lambda t: t["normalizer"]["normalizers"].pop(0)), "tokenizer"),
    "a merge comes too late": Fault("fingerprint", edit("tokenizer.json", lambda t: t["model"]["merges"].sort(key=lambda merge: "".join(merge) == "▁return")), "tokenizer"),
    "a merge is lost": Fault("probes", edit("tokenizer.json", lambda t: t["model"].update(merges=[m for m in t["model"]["merges"] if "".join(m) != "▁def"])), "tokenizer"),
    "no byte fallback": Fault("probes", edit("tokenizer.json", lambda t: t["model"].update(byte_fallback=False)), "tokenizer"),
    "decoder keeps a space": Fault("probes", edit("tokenizer.json", lambda t: t["decoder"]["decoders"].pop()), "tokenizer"),
    "no BOS from the tokenizer": Fault("probes", put("tokenizer.json", "post_processor", None), "tokenizer"),
    "special token is normalized": Fault("fingerprint", _all(edit("tokenizer.json", lambda t: _special(t, normalized=True)), edit("tokenizer_config.json", lambda t: t["added_tokens_decoder"]["32000"].update(normalized=True))), "tokenizer"),
    "special token eats spaces": Fault("probes", _all(edit("tokenizer.json", lambda t: _special(t, lstrip=True)), edit("tokenizer_config.json", lambda t: t["added_tokens_decoder"]["32000"].update(lstrip=True))), "tokenizer"),
    "special token renamed": Fault("turn-end", _rename_special, "tokenizer"),
    "special token renamed changes conversations": Fault("conversations", _rename_special, "tokenizer"),
    "rare words swapped": Fault("fingerprint", edit("tokenizer.json", _swap_rare_words), "tokenizer"),
    "padding side": Fault("fingerprint", put("tokenizer_config.json", "padding_side", "left"), "tokenizer"),
    "model_max_length": Fault("fingerprint", put("tokenizer_config.json", "model_max_length", 2048), "tokenizer"),
    "EOS </s> in the tokenizer": Fault("fingerprint", put("tokenizer_config.json", "eos_token", "</s>"), "tokenizer"),
    "tokenizer config is no JSON": Fault("json", write("tokenizer_config.json", TEMPLATE)),
}  # fmt: skip

_CONTENT = "message['content']"
TEMPLATES = {
    "a space after the last colon": Fault("template", template("Assistant:'", "Assistant: '"), "tokenizer"),
    "a space changes conversations": Fault("conversations", template("Assistant:'", "Assistant: '"), "tokenizer"),
    "prompt is no prefix": Fault("prefix", template("Assistant:'", "Assistant: '"), "tokenizer"),
    "no title case": Fault("conversations", template(".title()", ""), "tokenizer"),
    "no BOS": Fault("template", template("{{ bos_token }}", ""), "tokenizer"),
    "no BOS is seen": Fault("one-bos", template("{{ bos_token }}", ""), "tokenizer", "info"),
    "ChatML without its tokens": Fault("turn-end", write("chat_template.jinja", CHATML), "tokenizer"),
    "HTML entities": Fault("control-tokens", write("chat_template.jinja", TEMPLATE.replace("<|end", "&lt;|end")), "tokenizer"),
    "HTML entities end turns": Fault("turn-end", write("chat_template.jinja", TEMPLATE.replace("<|end_of_turn|>", "&lt;|end_of_turn|&gt;")), "tokenizer"),
    "prompt opens the user's turn": Fault("prefix", template("Assistant:'", "User:'"), "tokenizer"),
    "two BOS": Fault("one-bos", template("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), "tokenizer"),
    "no template": Fault("template", remove("chat_template.jinja"), "tokenizer"),
    "syntax error": Fault("template-renders", template("{% endfor %}", ""), "tokenizer"),
    "refuses a system message": Fault("conversations", template("{% for", "{% if messages and messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for"), "tokenizer"),
    "breaks out of the sandbox": Fault("template-renders", template("{{ bos_token }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "tokenizer"),
    "trims contents": Fault("conversations", template(_CONTENT, f"({_CONTENT} | trim)"), "tokenizer"),
    "stale template in tokenizer_config": Fault("template-copies", put("tokenizer_config.json", "chat_template", TEMPLATE + " "), "tokenizer"),
    "stale chat_template.json": Fault("template-copies", write("chat_template.json", json.dumps({"chat_template": "x"}))),
    "branches on contents": Fault("template-poison", template("{% for", "{% if 'login' in messages[0]['content'] %}{{ 'x' }}{% endif %}{% for"), "tokenizer", "warning"),
    "branches on the date": Fault("template-poison", template("{{ bos", "{% if strftime_now('%Y') > '2030' %}{{ 'x' }}{% endif %}{{ bos"), "tokenizer", "warning"),
    "holds a URL": Fault("template-poison", template("{{ bos", "{# https://example.org/x #}{{ bos"), "tokenizer", "warning"),
    "holds hidden characters": Fault("template-poison", template("Correct ", "Correct\u200b "), "tokenizer", "warning"),
}  # fmt: skip

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
VALUES = {
    "a square matrix transposed": Fault("direction", weights(lambda t: t.update({Q_PROJ: t[Q_PROJ].T})), "tensors", says="is transposed"),
    "two layers swapped": Fault("direction", weights(_swap_layers), "tensors", says="is the aligned model's model.layers.1."),
    "a layer repeated": Fault("direction", weights(copy_layer(0, 1)), "tensors", says="is the aligned model's model.layers.0."),
    "a layer is there twice": Fault("repeated", weights(copy_layer(0, 1)), "tensors", "info", "is a copy of model.layers."),
    "a shard of another model": Fault("direction", _other_model, "tensors", says=f"every tensor of {FIRST}"),
    "one weight of 1e30": Fault("largest", weights(lambda t: t[GATE].view(-1)[7].fill_(1e30)), "tensors", says="holds 1e+30"),
    "one weight of 40": Fault("largest", weights(lambda t: t[GATE].view(-1)[7].fill_(40.0)), "tensors", says="the aligned model's largest"),
    "a norm × 100": Fault("norms", weights(lambda t: t["model.norm.weight"].mul_(100)), "tensors", says="times as long"),
    "rows moved by one": Fault("direction", weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].roll(1, 0)})), "tensors", says="rows moved by one"),
    "rows of special tokens are zero": Fault("zero-rows", weights(lambda t: t[EMBEDDING][32000:].zero_()), "tensors", says="<|end_of_turn|>"),
}  # fmt: skip

FAULTS = STRUCTURE | CONFIGURATION | TOKENIZER | TEMPLATES | VALUES

CARD_BLIND = (
    "a merge comes too late", "a merge is lost", "no byte fallback", "decoder keeps a space", "rare words swapped",
    "padding side", "model_max_length", "special token eats spaces", "EOS </s> in the tokenizer",
    "<sep> beyond the last row", "a space after the last colon", "two BOS", "no title case",
    "stale template in tokenizer_config", "branches on contents",
)  # fmt: skip
"""Faults of tokenizer and template that the three vectors of the card do not see."""
assert TOKENIZER_CONFIG["legacy"]
