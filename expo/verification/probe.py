"""The child process: loads what lies in a folder the way its users will, and says what came out.

Run as a script, by path. It imports nothing of expo, so that what it reports is what a fresh
process sees. It reads one JSON request from stdin and writes one JSON object a line to stdout, in
the order of the work, so that what was done before a crash or a timeout is known.

Requests: {"task": "tokenizer", "folder", "texts", "conversations"} · {"task": "load", "folder",
"tensors"} · {"task": "generate", "folder", "aligned", "conversations", "new_tokens"}; each with
"memory_bytes" and "cpu_seconds". The argument is the process whose child this is.
"""

import hashlib
import importlib.util
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

_FILE_BYTES = 1 << 25  # of anything it writes
_TOLD_BYTES = 1 << 24
_RENDERED = 1 << 20  # characters that a short conversation may come to
_SAID = 1000  # characters of an error
_SPECIAL_PROBES = 32  # added tokens that get probes of their own


def main() -> None:
    _die_with(int(sys.argv[1]))
    request = json.load(sys.stdin)
    _limit(request["memory_bytes"], request["cpu_seconds"])
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is talk

    told = 0

    def tell(**line: Any) -> None:
        nonlocal told
        text = json.dumps(line) + "\n"
        told += len(text)
        if told > _TOLD_BYTES:
            raise SystemExit(f"gives more than {_TOLD_BYTES >> 20} MB to look at")
        report.write(text)
        report.flush()

    {"tokenizer": tokenizer, "load": load, "generate": generate}[request["task"]](request, tell)
    tell(done=True)


def tokenizer(request: dict, tell: Any) -> None:
    """Load the tokenizer as any user would."""
    os.nice(5)  # the process that builds the model takes longer: it goes first
    if (Path(request["folder"]) / "tokenizer.json").exists():
        _hide("torch")  # other tokenizers may be made by a library that wants it
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=False)
    say(tokenizer, request, tell)


def say(tokenizer: Any, request: dict, tell: Any) -> None:
    """What a loaded tokenizer is, and what it makes of every text and conversation."""
    tokenizer.chat_template = tokenizer.chat_template or _processors_template(request["folder"])
    added = _added(tokenizer)
    tell(loaded=_facts(tokenizer, added))
    specials = list(added)[:_SPECIAL_PROBES]
    around = [form.format(token) for token in specials for form in ("{}", "a{}b", " {} x", "{} ")]
    for text in [*request["texts"], *around]:
        tell(text=text, **_encoded(tokenizer, text))
    tell(texts_done=True)
    for number, conversation in enumerate(request["conversations"]):
        tell(conversation=number, **_rendered(tokenizer, conversation))


def _processors_template(folder: str) -> str | None:
    """What the processor of a model with images applies, where the tokenizer has no template."""
    file = Path(folder) / "chat_template.json"
    if file.exists() and any(Path(folder).glob("*processor_config.json")):
        return json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return None


def _hide(*packages: str) -> None:
    """Keep transformers from importing what is not needed here: it is slow to start with."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name in packages else find(name, *more)


def _added(tokenizer: Any) -> dict[str, int]:
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    if callable(decoder):  # mistral-common's has the method, and refuses
        return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {str(token.content): index for index, token in sorted(decoder.items())}


def _facts(tokenizer: Any, added: dict[str, int]) -> dict:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab()
    serialized = backend.to_str() if backend is not None else json.dumps(vocabulary, sort_keys=True)
    template = tokenizer.chat_template
    return {
        "class": type(tokenizer).__name__,
        "serialized": hashlib.sha256(serialized.encode()).hexdigest(),
        "tokens": len(tokenizer),
        "max_id": max([*vocabulary.values(), *added.values()], default=-1),
        "added": added,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": template if isinstance(template, str) or template is None else dict(template),
        "model_max_length": min(tokenizer.model_max_length, 1 << 62),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "truncation": getattr(backend, "truncation", None),
        "padding": getattr(backend, "padding", None),
        "input_names": list(tokenizer.model_input_names),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }


def _encoded(tokenizer: Any, text: str) -> dict:
    try:
        ids = tokenizer(text)["input_ids"]
        alone = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"ids": ids, "alone": alone, "decoded": tokenizer.decode(alone)}
    except Exception as error:  # whatever it is, it is the finding
        return {"error": _said(error)}


def _rendered(tokenizer: Any, conversation: dict) -> dict:
    def apply(tokenize: bool) -> Any:
        return tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            add_generation_prompt=conversation["add_generation_prompt"],
            tokenize=tokenize,
            **({"return_dict": False} if tokenize else {}),
        )

    try:
        rendered = apply(False)
        if len(rendered) > _RENDERED:
            return {
                "error": f"a text of {len(rendered)} characters, where {_RENDERED} is far too many"
            }
        return {"rendered": rendered, "ids": apply(True)}
    except Exception as error:  # templates raise on purpose; the parent compares what
        return {"error": _said(error)}


def load(request: dict, tell: Any) -> None:
    """Build the model on the meta device: which keys found no home, and which homes no key.

    Of safetensors files names, dtypes and shapes are given: that spares reading them.
    """
    _hide("scipy")
    from transformers import AutoConfig, GenerationConfig

    folder = request["folder"]
    if (Path(folder) / "generation_config.json").exists():
        try:
            GenerationConfig.from_pretrained(folder).validate(strict=True)
            tell(generation_config=None)
        except Exception as error:
            tell(generation_config=_said(error))
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    if tensors := _without_values(request["tensors"]):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        source = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    model, info = _model_class(folder).from_pretrained(
        **source, device_map="meta", output_loading_info=True, trust_remote_code=False
    )
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    tell(
        load={key: sorted(map(str, info.get(key) or ())) for key in keys},
        model=type(model).__name__,
    )


def _without_values(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """On the meta device, of safetensors' dtypes."""
    import torch
    from safetensors.torch import load

    def dtype(name: str) -> Any:
        header = json.dumps({"x": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
        return load(len(header).to_bytes(8, "little") + header)["x"].dtype

    dtypes = {name: dtype(name) for name in {name for name, _ in tensors.values()}}
    return {
        name: torch.empty(shape, dtype=dtypes[kind], device="meta")
        for name, (kind, shape) in tensors.items()
    }


def _model_class(folder: str) -> Any:
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or []
    named = getattr(transformers, names[0], None) if names else None
    return named or transformers.AutoModelForCausalLM


def generate(request: dict, tell: Any) -> None:
    """Greedy answers of both models; then how far their distributions are over the first one's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=False)
    prompts = [
        tokenizer.apply_chat_template(
            conversation["messages"], add_generation_prompt=True, return_dict=False
        )
        for conversation in request["conversations"]
    ]

    def answer(model: Any, of: str) -> list[tuple[list[int], list[int]]]:
        sequences = []
        for number, prompt in enumerate(prompts):
            output = _greedy(model, prompt, request["new_tokens"])
            ids = output[len(prompt) :]
            tell(generated=number, of=of, ids=ids, text=tokenizer.decode(ids))
            sequences.append((prompt, output))
        return sequences

    model = _whole_model(request["folder"])
    sequences = answer(model, "out")
    if request.get("aligned"):
        mine = [_log_probabilities(model, *sequence) for sequence in sequences]
        del model
        aligned = _whole_model(request["aligned"])
        answer(aligned, "aligned")
        tell(drift=_divergence(mine, [_log_probabilities(aligned, *pair) for pair in sequences]))


def _greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The prompt and the answer to it."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
        )
    return found[0].tolist()


def _divergence(mine: list[Any], theirs: list[Any]) -> float:
    """KL(mine ‖ theirs), in nats a token."""
    import torch

    pairs = zip(mine, theirs, strict=True)
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def _whole_model(folder: str) -> Any:
    return (
        _model_class(folder).from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    )


def _log_probabilities(model: Any, prompt: list[int], output: list[int]) -> Any:
    """Of every answer token's whole distribution: float32 [answer tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([output])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)


def _said(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "MemoryError: more memory than a verification has"
    lines = str(error)[:_SAID].strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Bound memory (not mapped files), time and files."""
    limits = {"RLIMIT_DATA": memory_bytes, "RLIMIT_CPU": cpu_seconds, "RLIMIT_FSIZE": _FILE_BYTES}
    for name, value in (limits | {"RLIMIT_CORE": 0}).items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # beyond the soft limit of time comes a signal with a name, beyond the hard one SIGKILL
        resource.setrlimit(kind, (soft, hard if name == "RLIMIT_CPU" else soft))


def _die_with(parent: int) -> None:
    """End when the parent does, where Linux can; it may have ended already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
