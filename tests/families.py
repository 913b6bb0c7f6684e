"""Healthy models of the large families, in small: architecture, special tokens, who says which EOS,
and a template of the family's kind. Written here; only names and ids of tokens are the families' own.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expo.verification import probe
from expo.verification.conversations import CONVERSATIONS, TEXTS
from expo.verification.process import Report

from .openchat import tokenizer_json
from .templates import TEMPLATES

_TURNS = "{% for m in messages %}"
_PARTS = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
_PLAIN_ROLES = (
    "{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_CHATML = TEMPLATES["chatml"][0]
_THINKING = (
    "{{ bos_token }}" + _TURNS + "{% if m['role'] == 'assistant' %}"
    "{% set said = m['content'] %}{% if '</think>' in said %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|Assistant|>' + said + '<|end|>' }}{% else %}{{ '<|User|>' + m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
_EVERY_TURN_BOS = (
    _TURNS + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_UNENDED = (
    "[gMASK]<sop>" + _TURNS + "{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_CHANNELS = (
    _TURNS + "{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_DATED = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' }}"
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}{{ '<|eot_id|>' }}"
    + TEMPLATES["llama-3-instruct"][0].removeprefix("{{ bos_token }}")
)
_PHI = (
    _TURNS + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}" + _TURNS + "{% if m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

_TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip


_FALCON = {
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Family:
    """`eos` is the tokenizer's; `config_eos` and `generation_eos` are tokens of the two configs.

    `tokens` are the special tokens that the stand-in tokenizer has beside Mistral's. `spare_rows`
    is how many rows the embedding has beyond them.
    """

    template: str | dict[str, str] | None
    model_type: str = "llama"
    tokens: tuple[str, ...] = ()
    bos: str | None = "<s>"
    eos: str = "</s>"
    pad: str | None = None
    config_eos: tuple[str, ...] = ()
    generation_eos: tuple[str, ...] = ()
    spare_rows: int = 64
    tiny: dict[str, Any] = field(default_factory=lambda: _TINY)
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] | None = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)


_END = "<|endoftext|>"
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",
            "<|start_header_id|>", "<|end_header_id|>")  # fmt: skip
_GEMMA = {"tokens": ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"), "bos": "<bos>",
          "eos": "<eos>", "pad": "<pad>", "template": TEMPLATES["gemma"][0]}  # fmt: skip
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4,
        "qk_nope_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8}  # fmt: skip

FAMILIES = {
    "phi-3": Family(
        _PHI, "phi3", (_END, "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"), eos=_END, pad=_END,
        generation_eos=(_END, "<|assistant|>", "<|end|>"), spare_rows=53, config={"sliding_window": 2047},
    ),
    "phi-2": Family(None, "phi", (_END,), bos=_END, eos=_END, spare_rows=905, tiny=_TINY | {"num_key_value_heads": 4}),
    "falcon": Family(None, "falcon", (_END,), bos=_END, eos=_END, spare_rows=0, tiny=_FALCON),
    "gpt-2": Family(None, "gpt2", (_END,), bos=_END, eos=_END, spare_rows=0, tiny={"n_embd": 16, "n_layer": 2, "n_head": 4}),
    "gpt-neox": Family(None, "gpt_neox", (_END, "<|padding|>"), bos=_END, eos=_END, spare_rows=152),
    "olmo-2": Family("{{ bos_token }}" + _TURNS + _PLAIN_ROLES, "olmo2", (_END, "<|pad|>"), bos=_END, eos=_END, pad="<|pad|>"),
    "qwen-3": Family(
        _CHATML, "qwen3", (_END, "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", _END,
        generation_eos=("<|im_end|>", _END), spare_rows=267, config={"bos_token_id": 5},
        generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "bos_token_id": 5},
    ),
    "deepseek-v3": Family(
        _DEEPSEEK, "deepseek_v3", ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", tiny=_TINY | _MLA, spare_rows=465,
    ),
    "gpt-oss": Family(
        _CHANNELS, "gpt_oss", ("<|startoftext|>", _END, "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        "<|startoftext|>", "<|return|>", _END, generation_eos=("<|return|>", _END, "<|call|>"),
        tiny=_TINY | {"num_local_experts": 4, "num_experts_per_tok": 2}, spare_rows=1069,
    ),
    "yi-1.5": Family(
        _CHATML, "llama", ("<|startoftext|>", _END, "<|im_start|>", "<|im_end|>"), "<|startoftext|>", "<|im_end|>", "<unk>",
        config_eos=(_END,), generation_eos=("<|im_end|>",), spare_rows=0,
    ),
    "llama-3": Family(
        TEMPLATES["llama-3-instruct"][0], tokens=_HEADERS, bos=_HEADERS[0], eos=_HEADERS[1],
        generation_eos=_HEADERS[1:3], spare_rows=0, generation={"do_sample": True, "temperature": 0.6, "max_length": 4096, "top_p": 0.9},
    ),
    "llama-3.1": Family(_DATED, tokens=_HEADERS, bos=_HEADERS[0], eos=_HEADERS[2], config_eos=_HEADERS[1:4], generation_eos=_HEADERS[1:4]),
    "gemma": Family(**_GEMMA, model_type="gemma"),
    "gemma-2": Family(**_GEMMA, model_type="gemma2", generation_eos=("<eos>", "<end_of_turn>"), spare_rows=1),
    "gemma-3": Family(
        **(_GEMMA | {"tokens": (*_GEMMA["tokens"], "<image_soft_token>")}), model_type="gemma3_text", spare_rows=-1,
        config_eos=("<eos>", "<end_of_turn>"), generation_eos=("<eos>", "<end_of_turn>"),
    ),
    "mistral": Family(TEMPLATES["mistral-instruct"][0], "mistral", spare_rows=0),
    "no-generation-config": Family(TEMPLATES["mistral-instruct"][0], "mistral", generation=None),
    "zephyr": Family(TEMPLATES["zephyr"][0], "mistral", pad="</s>", spare_rows=0),
    "llama-2": Family(_EVERY_TURN_BOS, generation={"pad_token_id": 0, "max_length": 4096}, config={"max_position_embeddings": 4096}),
    "tulu": Family(_TURNS + _PLAIN_ROLES, pad="<pad>", tokens=("<pad>",)),
    "r1-distill": Family(_THINKING, "qwen2", ("<|User|>", "<|Assistant|>", "<|end|>", "<think>", "</think>"), "<s>", "<|end|>", "<|end|>"),
    "glm-4": Family(
        _UNENDED, "glm4", (_END, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"), None, _END, _END,
        config_eos=(_END, "<|user|>", "<|observation|>"), generation_eos=(_END, "<|user|>", "<|observation|>"),
    ),
    "openhermes": Family(_CHATML, "mistral", ("<|im_end|>", "<|im_start|>"), eos="<|im_end|>", spare_rows=0),
    "command-r": Family(
        {"default": _CHATML, "tool_use": "{{ tools | tojson }}" + _CHATML, "rag": "{{ documents }}" + _CHATML}, "cohere",
        ("<BOS_TOKEN>", "<|im_start|>", "<|im_end|>", "<PAD>"), "<BOS_TOKEN>", "<|im_end|>", "<PAD>",
    ),
    "llava": Family(
        None, tokens=("<image>", "<pad>"), pad="<pad>",
        files={"chat_template.json": {"chat_template": _TURNS + "{{ m['role'].upper() + ': ' }}" + _PARTS
               + "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"},
               "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
               "processor_config.json": {"processor_class": "LlavaProcessor"}},
    ),
}  # fmt: skip


def write_family(folder: Path, family: Family, *, tokenizer: Path | None = None) -> Path:
    """A whole model folder; `tokenizer` is a folder of real tokenizer files instead of a stand-in."""
    folder.mkdir(parents=True)
    if tokenizer is None:
        _write_stand_in(folder, family)
    else:
        _copy_tokenizer(folder, family, tokenizer)
    ids = _ids(folder)
    rows = max(ids.values()) + 1 + family.spare_rows
    _write_weights(folder, family, rows)
    config = json.loads((folder / "config.json").read_text())
    config |= _special(family, ids, family.config_eos) | family.config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family.generation is not None:
        content = _special(family, ids, family.generation_eos) | family.generation
        (folder / "generation_config.json").write_text(json.dumps(content, indent=2))
    for name, content in family.files.items():
        (folder / name).write_text(json.dumps(content))
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def _special(family: Family, ids: dict[str, int], eos: tuple[str, ...]) -> dict[str, object]:
    found = [ids[token] for token in eos or (family.eos,)]
    content = {"bos_token_id": family.bos and ids[family.bos], "eos_token_id": found}
    return content | {"eos_token_id": found[0] if len(found) == 1 else found}


def _write_stand_in(folder: Path, family: Family) -> None:
    raw = json.loads(tokenizer_json())
    raw["added_tokens"] = raw["added_tokens"][:3]
    known = len(raw["model"]["vocab"])
    for number, token in enumerate(family.tokens):
        entry = raw["added_tokens"][0] | {"id": known + number, "content": token}
        raw["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    _write_config(folder, family, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _copy_tokenizer(folder: Path, family: Family, source: Path) -> None:
    for file in source.iterdir():
        if file.name not in ("LICENSE", "package.json"):
            shutil.copy(file, folder / file.name)
    if not (folder / "tokenizer_config.json").exists():
        names = {"gpt2": "GPT2Tokenizer"}
        _write_config(
            folder, family, {"tokenizer_class": names.get(source.name, "PreTrainedTokenizerFast")}
        )


def _write_config(folder: Path, family: Family, config: dict) -> None:
    special = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    config |= {key: token for key, token in special.items() if token is not None}
    match family.template:
        case str(text):
            (folder / "chat_template.jinja").write_text(text)
        case dict(named):
            config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
        case None:
            pass
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _ids(folder: Path) -> dict[str, int]:
    if not (folder / "tokenizer.json").exists():
        return json.loads((folder / "vocab.json").read_text())
    raw = json.loads((folder / "tokenizer.json").read_text())
    return raw["model"]["vocab"] | {t["content"]: t["id"] for t in raw["added_tokens"]}


def _write_weights(folder: Path, family: Family, rows: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.model_type, **family.tiny, vocab_size=rows, pad_token_id=None
    )
    config.bos_token_id = config.eos_token_id = None
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def report_tokenizer(folder: Path) -> Report:
    """What the child process would say of the folder's tokenizer, said in this one."""
    from transformers import AutoTokenizer

    lines: list[dict] = []
    request = {
        "folder": str(folder),
        "texts": TEXTS,
        "conversations": [conversation.request() for conversation in CONVERSATIONS],
    }
    probe.say(AutoTokenizer.from_pretrained(folder), request, lambda **line: lines.append(line))
    return Report(tuple(lines), None)
