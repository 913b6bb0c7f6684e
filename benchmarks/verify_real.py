"""How many real tokenizers, model arrangements and chat templates raise an alarm.

    python -m benchmarks.verify_real FOLDER

FOLDER holds `tokenizers/*.tar.xz` (each a folder of a tokenizer's files) and `templates.tar.xz`
(chat templates as `.jinja` files). Every tokenizer with a known family becomes a tiny model in that
family's arrangement, and every family without one gets a stand-in's; each is verified alone and
against itself. Every template is judged with a stand-in tokenizer that has its control tokens.
Nothing here is wrong, so every error and every warning is a false alarm.
"""

import argparse
import collections
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import expo
from expo.checkpoint.files import open_directory
from expo.verification import probe, template, tokenizer
from expo.verification.check import CheckResult
from expo.verification.conversations import ANSWER, ANSWERED, CONVERSATIONS, TEXTS
from expo.verification.process import Report
from expo.verification.run import judge
from expo.verification.subject import Reports, Subject
from tests.families import FAMILIES, write_family

TOKENIZERS = {
    "ort-phi-3-mini": "phi-3", "ort-phi-2": "phi-2", "ort-falcon-tokenizer": "falcon",
    "gpt2": "gpt-2", "dolma2": "olmo-2", "neox": "gpt-neox", "qwen3": "qwen-3",
    "deepseek_v3": "deepseek-v3", "gptoss": "gpt-oss", "yi-1.5": "yi-1.5",
}  # fmt: skip
"""Folder of a real tokenizer → its family. A Marian tokenizer alone belongs to no language model."""

_CONTROL = re.compile(r"<[^<>\s'\"{}]{1,40}>|\[/?[A-Z_]+\]")
_CHECKS = {check.name for check in template.CHECKS} | {
    check.name for check in tokenizer.CHECKS if check.name == "control-tokens"
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("models", "templates"))
    parser.add_argument("--verbose", action="store_true", help="show every alarm")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expo-real-") as name:
        root = Path(name)
        unpack(arguments.folder, root)
        if arguments.only != "models":
            report("templates", judge_templates(root), arguments.verbose)
        if arguments.only != "templates":
            report("models", judge_models(root), arguments.verbose)


def unpack(source: Path, root: Path) -> None:
    for archive in (*source.glob("tokenizers/*.tar.xz"), source / "templates.tar.xz"):
        with tarfile.open(archive) as held:
            place = root / "templates" if archive.parent == source else root
            held.extractall(place, filter="data")


Judged = Iterator[tuple[str, list[CheckResult]]]


def report(what: str, judged: Judged, verbose: bool) -> None:
    """How many raised an alarm, and which checks did."""
    total, alarmed = 0, 0
    by_check: collections.Counter[str] = collections.Counter()
    for name, results in judged:
        alarms = [r for r in results if r.status in ("error", "warning")]
        total, alarmed = total + 1, alarmed + bool(alarms)
        by_check.update(result.name for result in alarms)
        if verbose:
            for result in alarms:
                print(f"    {name}: {result.status} {result.name}: {result.message[:300]}")
    print(f"{what}: {total - alarmed} of {total} healthy ones without an alarm", flush=True)
    for check, count in by_check.most_common():
        print(f"  {count:4d} {check}", flush=True)


def judge_models(root: Path) -> Judged:
    real = {family: root / folder for folder, family in TOKENIZERS.items()}
    for name, family in FAMILIES.items():
        for files in filter(None, (real.get(name), None if name in real else Path())):
            model = root / f"model-{name}"
            write_family(model, family, tokenizer=files if files != Path() else None)
            for against in (None, model):
                result = expo.verify(model, against=against)
                how = "alone" if against is None else "against"
                yield f"{name} {how}", list(result.checks)
            shutil.rmtree(model)


def judge_templates(root: Path) -> Judged:
    from tests.openchat import tokenizer_json

    stand_in = json.loads(tokenizer_json())
    for file in sorted(root.glob("templates/*/*.jinja")):
        yield (
            f"{file.parent.name}/{file.stem}",
            judge_template(root / "t", file.read_text(), stand_in),
        )


def judge_template(folder: Path, source: str, stand_in: dict) -> list[CheckResult]:
    """The checks of templates on a folder with this one, alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(source)
    tokens = sorted(set(_CONTROL.findall(source)))
    specials = [t["content"] for t in stand_in["added_tokens"]]
    lines = _tokenized(stand_in, [*specials, *(t for t in tokens if t not in specials)], source)
    config = {"eos_token_id": lines[0]["loaded"]["eos"], "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    subject = Subject(open_directory(folder), reports=Reports(Report(tuple(lines), None)))
    return [result for result in judge(subject).checks if result.name in _CHECKS]


def _tokenized(stand_in: dict, specials: list[str], source: str) -> list[dict]:
    """What the child process would say of the stand-in with these special tokens."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(json.dumps(stand_in))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    loaded: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=source
    )
    if "bos_token" not in source:
        backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    answered = probe._rendered(loaded, ANSWERED.request()).get("rendered", "")
    rest = answered.rpartition(ANSWER)[2].lstrip()
    loaded.eos_token = max((t for t in specials if rest.startswith(t)), key=len, default="</s>")
    lines: list[dict] = []
    requests = [conversation.request() for conversation in CONVERSATIONS]
    request = {"folder": ".", "texts": TEXTS[:5], "conversations": requests}
    probe.say(loaded, request, lambda **line: lines.append(line))
    return lines


if __name__ == "__main__":
    main()
