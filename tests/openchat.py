"""The OpenChat tokenizer and template, rebuilt offline from Mistral-7B-v0.1's SentencePiece model."""

import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

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


@cache
def tokenizer_json() -> str:
    """The fast tokenizer: SentencePiece's BPE with its merges in the order of the pieces' scores."""
    package = find_spec("mistral_common")
    assert package is not None and package.origin is not None
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


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
