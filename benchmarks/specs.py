"""How many of a folder's merge specs run, against what mergekit itself makes of them.

    python -m benchmarks.specs FOLDER [--merges 50] [--no-mergekit]

Every model that a spec names becomes a tiny Mistral-shaped stand-in with as many layers as the spec
needs, and the demo's tokenizer; then mergekit runs the spec, `expo plan` plans it and `expo merge` makes
it (without verification, which is the same for all). Prints what differs, then the counts. The two
outputs have to hold the same tensors, and nearly the same numbers unless the method draws lots.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from expo.cli.main import main as expo
from expo.demo.toy import MODELS

HIDDEN, INNER, ROWS = 16, 24, 34
DEPTHS = (2, 4, 12, 16, 22, 24, 28, 32, 36, 40, 48, 60, 64, 80)
ROLES = ("model", "base_model", "source_model", "tokenizer_source", "source", "path", "donor")
WORDS = ("union", "base")
DRAW_LOTS = ("dare", "della", "experts", "arcee")
NEAR = 0.1
"""Relative. mergekit's bfloat16 sums and equal magnitudes at a density's edge make up to 0.07."""


@dataclass
class Outcome:
    """What became of one spec; messages are empty where it ran."""

    spec: str
    mergekit: str
    plan: str
    merge: str
    differs: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--merges", type=int, default=10**6, help="how many are merged")
    parser.add_argument("--no-mergekit", action="store_true", help="take every spec as valid")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if not arguments.no_mergekit:
        import mergekit.merge  # noqa: F401 - once, before the children
    outcomes = []
    for number, path in enumerate(sorted(arguments.folder.glob("*.y*ml"))):
        outcome = in_child(path, merges=number < arguments.merges, oracle=not arguments.no_mergekit)
        if outcome.mergekit == "" and (outcome.plan or outcome.merge):
            print(f"{outcome.spec}: REFUSED plan: {outcome.plan} | merge: {outcome.merge}")
        elif outcome.mergekit and not outcome.plan:
            print(
                f"{outcome.spec}: planned, mergekit says {outcome.mergekit} | merge: {outcome.merge}"
            )
        elif outcome.mergekit:
            print(f"{outcome.spec}: both refuse: {outcome.plan} | mergekit: {outcome.mergekit}")
        if outcome.differs:
            print(f"{outcome.spec}: DIFFERS {outcome.differs}")
        sys.stdout.flush()
        outcomes.append(outcome)
    summarize(outcomes)


def summarize(outcomes: list[Outcome]) -> None:
    valid = [o for o in outcomes if not o.mergekit]
    planned = [o for o in valid if not o.plan]
    merged = [o for o in valid if not o.merge]
    other = [o for o in valid if o.differs]
    loose = [o for o in outcomes if o.mergekit and not o.plan]
    print(f"{len(outcomes)} specs, mergekit runs {len(valid)}: of these", end=" ")
    share = 100 / max(len(valid), 1)
    print(f"{len(planned)} plan ({len(planned) * share:.1f} %)", end=", ")
    print(f"{len(merged)} merge ({len(merged) * share:.1f} %), {len(other)} differ;", end=" ")
    print(f"of {len(outcomes) - len(valid)} that it refuses {len(loose)} plan")


def in_child(path: Path, *, merges: bool, oracle: bool) -> Outcome:
    """The outcome, from a process of its own: neither library forgets what it has loaded."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            outcome = examine(path, merges=merges, oracle=oracle)
        except BaseException:
            outcome = Outcome(path.name, "", f"benchmark: {traceback.format_exc()}", "")
        with os.fdopen(writer, "w") as pipe:
            json.dump(asdict(outcome), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return Outcome(**json.loads(text)) if text else Outcome(path.name, "", "died", "died")


def examine(path: Path, *, merges: bool, oracle: bool) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = path.read_text(encoding="utf-8")
        try:
            documents = [d for d in yaml.safe_load_all(text) if isinstance(d, dict)]
            for name in sorted(named(documents), key=len, reverse=True):
                if name.startswith(("/", "~")):  # nothing is made outside of the folder
                    text = text.replace(name, f"outside{name.replace('~', '')}")
            documents = [d for d in yaml.safe_load_all(text) if isinstance(d, dict)]
            make_models(documents)
        except (yaml.YAMLError, TypeError, AttributeError):
            documents = []
        Path("spec.yml").write_text(text)
        said = by_mergekit(documents) if oracle else ""
        plan = by_expo("plan", "spec.yml")
        merge = by_expo("merge", "spec.yml", "out", "--no-verify") if merges else plan
        both = oracle and merges and not said and not merge
        differs = difference(text) if both else ""
        os.chdir("/")
    return Outcome(path.name, said, plan, merge, differs)


def difference(text: str) -> str:
    """How expo's output is unlike mergekit's."""
    theirs = tensors_in(Path("by-mergekit"))
    if not theirs:  # every document has a name: expo's OUT is the last one
        theirs = tensors_in(max(Path("parts").iterdir(), key=lambda part: part.stat().st_mtime))
    mine = tensors_in(Path("out"))
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
        return f"in tensors or shapes: {sorted(mine.keys() ^ theirs.keys())[:4]}"
    gap = sum((mine[n].double() - t.double()).square().sum().item() for n, t in theirs.items())
    size = sum(t.double().square().sum().item() for t in theirs.values())
    share = (gap / max(size, 1e-30)) ** 0.5
    return f"by {share:.3f}" if share > NEAR and not any(w in text for w in DRAW_LOTS) else ""


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def by_expo(*words: str) -> str:
    said, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(errors):
            expo(list(words))
    except SystemExit as exit_:
        if not exit_.code:
            return ""
    refused = [line for line in said.getvalue().splitlines() if line.startswith("refused")]
    lines = refused or [x for x in errors.getvalue().splitlines() if not x.startswith("warning")]
    return " / ".join(lines[:3]) or "failed without a word"


def by_mergekit(documents: list[dict]) -> str:
    """What mergekit says against a spec."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run_mergekit(documents)
    except (Exception, SystemExit) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return ""


def run_mergekit(documents: list[dict]) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from mergekit.scripts.multimerge import load_config, make_tasks

    options = MergeOptions(quiet=True, write_model_card=False, lora_merge_cache="loras")
    if len(documents) > 1:
        from mergekit.graph import Executor

        text = yaml.safe_dump_all(documents)
        configs, needs = load_config(text, "parts")
        tasks = make_tasks(configs, needs, options, "parts", "by-mergekit", False)
        Executor(tasks, torch.device("cpu"), torch.device("cpu")).execute()
        return
    if not documents:
        raise ValueError("not a mapping")
    (document,) = documents
    if "experts" in document and "merge_method" not in document:
        from mergekit.moe.config import MoEMergeConfig
        from mergekit.scripts.moe import build

        build(MoEMergeConfig.model_validate(document), "by-mergekit", options, device="cpu")
        return
    run_merge(MergeConfiguration.model_validate(document), "by-mergekit", options)
    if not any(Path("by-mergekit").glob("*.safetensors")):
        raise ValueError("wrote nothing")


def named(value: object) -> Iterator[str]:
    """Every model that is named anywhere."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        if key in ROLES and isinstance(item, str) and item not in WORDS:
            yield item
        yield from named(item)


def make_models(documents: list[dict]) -> None:
    stages = {document.get("name") for document in documents}
    ends = dict(layer_ends(documents))
    most = max(ends.values(), default=2)
    for name in sorted(set(named(documents)) - stages):
        model, _, adapter = name.partition("+")
        layers = next((depth for depth in DEPTHS if depth >= ends.get(name, most)), most)
        bare = model.partition("@")[0]
        if not Path(bare).exists():
            make_model(Path(bare), layers)
        if not Path(model).exists():  # a path to expo, a revision of that path to mergekit
            Path(model).symlink_to(Path(bare).resolve())
        if adapter and not Path(adapter).exists():
            make_adapter(Path(adapter), layers)


def layer_ends(value: object) -> Iterator[tuple[str, int]]:
    """Each model with the last layer that is asked of it, the highest last."""
    found: list[tuple[str, int]] = []
    if isinstance(value, dict):
        if isinstance(value.get("layer_range"), list) and isinstance(value.get("model"), str):
            found.append((value["model"], int(value["layer_range"][1])))
        found += [pair for item in value.values() for pair in layer_ends(item)]
    elif isinstance(value, list):
        found += [pair for item in value for pair in layer_ends(item)]
    yield from sorted(found, key=lambda pair: pair[1])


def make_model(folder: Path, layers: int) -> None:
    shutil.copytree(MODELS / "sft", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(sum(map(ord, str(folder))))
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes(layers).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (8, HIDDEN), "self_attn.v_proj": (8, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    ends = {
        "model.embed_tokens": (ROWS, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (ROWS, HIDDEN),
    }
    return {f"{key}.weight": shape for key, shape in ends.items()} | {
        f"model.layers.{number}.{key}.weight": shape
        for number in range(layers)
        for key, shape in layer.items()
    }


def make_adapter(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    tensors = {}
    for number in range(layers):
        stem = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.full((2, HIDDEN), 0.01)
        tensors[f"{stem}.lora_B.weight"] = torch.full((HIDDEN, 2), 0.01)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
