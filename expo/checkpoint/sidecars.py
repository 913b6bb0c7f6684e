"""Which files beside the weights belong to a model: an allow-list, everything else stays behind."""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

MANIFEST = "expo.json"
"""What expo writes beside a model: how it was made, and the SHA-256 of every file."""

ONE_FILE = ".safetensors"
"""How the name of a model ends that is a single file."""

JOURNAL = "journal.jsonl"
"""Beside the output while it is made: which shards are finished."""

PARTIAL = ".partial"
"""How the name of a shard ends until it is."""

CARD = "README.md"
NOTICE = "NOTICE"
SIGNATURE = "model.sig"
EVAL_RESULTS = ".eval_results"

_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".index.json")
_TRAINING = ("training_args.bin", "optimizer.*", "scheduler.pt", "rng_state*.pth", "scaler.pt")

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json",
    "*.tiktoken", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "source.spm", "tekken.json", "*.tiktoken",
)  # fmt: skip
"""Of the tokenizer's files those that hold its tokens."""

LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "license*")

PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", *PROCESSORS)

MODEL = ("config.json", "generation_config.json", *PROCESSORS, *LEGAL)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")

BESIDE = (
    CARD, MANIFEST, "adapter_config.json", ".gitattributes", ".gitignore", f"{EVAL_RESULTS}/*",
    SIGNATURE, "*.sigstore", "*.sigstore.json",
)  # fmt: skip
"""What is neither model nor tokenizer and still lies in a published one: card, results, signature."""


def is_one_file(out: Path) -> bool:
    """Whether a path stands for a model in a single file, which need not be there yet."""
    return out.suffix == ONE_FILE and not out.is_dir()


def manifest_path(out: Path) -> Path:
    """Where the manifest of a model lies: in its directory, or beside its one file."""
    return out.with_name(f"{out.name}.{MANIFEST}") if is_one_file(out) else out / MANIFEST


def is_part_of_model(name: str, card: str) -> bool:
    """Whether a file in a model's directory belongs to the model; images do that the `card` names."""
    known = (*WEIGHTS, *MODEL, *TOKENIZER, *BESIDE)
    if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in known):
        return True
    return _is_image(name) and name in card


def is_reserved(name: str, weights: Collection[str]) -> bool:
    """Whether a name is one that an output, its journal or its weights have, or that a loader would take for them.

    Args:
        weights: the files of weights that the output has, and those of the model that it is made of.
    """
    own = {MANIFEST, JOURNAL, CARD, *weights, *(f"{file}{PARTIAL}" for file in weights)}
    own = {taken.casefold() for taken in own}
    places = [name, *map(str, PurePosixPath(name).parents)]
    if any(place.casefold() in own for place in places):
        return True
    return name.startswith(".expo-") or fnmatch(name.casefold(), "model*.safetensors*")


def is_tokenizer_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TOKENIZER)


def is_vocabulary(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in VOCABULARIES)


def is_legal(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEGAL)


def is_model_sidecar(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in MODEL)


def is_apart(name: str) -> bool:
    """What tells of a model and is no part of it: its card, pictures, results, notices and signature. Changing
    it is no fault of the model."""
    return (
        name in (CARD, NOTICE, SIGNATURE) or name.startswith(f"{EVAL_RESULTS}/") or _is_image(name)
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


def is_training_state(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _TRAINING)


def is_weights(name: str) -> bool:
    """Weights of any format, or their index."""
    return name.endswith(_WEIGHTS) and not is_training_state(name)


def is_config(name: str) -> bool:
    """Whether loaders look for `auto_map` there: any part of a model can bring its own code."""
    return any(fnmatch(name, pattern) for pattern in CONFIGS)
