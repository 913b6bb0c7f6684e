"""The OpenChat tokenizer and template, rebuilt offline from Mistral-7B-v0.1's SentencePiece model."""

import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from .conftest import write_checkpoint

END_OF_TURN = 32000
ROWS = 32002

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)

SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", END_OF_TURN: "<|end_of_turn|>", 32001: "<|pad_0|>"}

TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in SPECIAL.items()
    },
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|end_of_turn|>",
    "legacy": True,
    "model_max_length": 8192,
    "pad_token": "<|end_of_turn|>",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": END_OF_TURN,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 8192,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": ROWS,
}

GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": END_OF_TURN, "pad_token_id": END_OF_TURN}


@cache
def tokenizer_json() -> str:
    """The fast tokenizer: SentencePiece's BPE with its merges in the order of the pieces' scores."""
    package = find_spec("mistral_common")
    assert package is not None
    assert package.origin is not None
    pieces = SentencePieceProcessor(
        model_file=str(Path(package.origin).parent / "data" / "tokenizer.model.v1")
    )
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = sorted(_merges(pieces, vocabulary), key=lambda merge: (-merge[0], -len(merge[1])))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL.values()]
    )
    return tokenizer.to_str(pretty=True)


def _merges(
    pieces: SentencePieceProcessor, vocabulary: dict[str, int]
) -> Iterator[tuple[float, str, str]]:
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                yield pieces.get_score(index), left, right


def write_tokenizer(
    folder: Path, *, template: str = TEMPLATE, bos: str = "<s>", eos: str = "<|end_of_turn|>"
) -> None:
    """The tokenizer's files. With another BOS or EOS it is some model's, with Mistral's pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TOKENIZER_CONFIG | {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(template)


def write_model(folder: Path, *, seed: int = 0, hidden: int = 16, shards: int = 2) -> Path:
    """A complete OpenChat model folder with random bfloat16 weights: small in all but its rows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in _shapes(hidden).items()
    }
    config = CONFIG | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    write_checkpoint(folder, tensors, shards=shards, config=config)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2))
    (folder / "LICENSE").write_text("Apache-2.0")
    write_tokenizer(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def _shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    square, wide, tall, flat = (
        (hidden, hidden),
        (2 * hidden, hidden),
        (hidden, 2 * hidden),
        (hidden,),
    )
    layer = {
        "self_attn.q_proj": square,
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": square,
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": tall,
        "input_layernorm": flat,
        "post_attention_layernorm": flat,
    }
    layers = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(2)
        for name, shape in layer.items()
    }
    ends = {"model.norm.weight": flat, "lm_head.weight": (ROWS, hidden)}
    return {"model.embed_tokens.weight": (ROWS, hidden)} | layers | ends
