"""Everything in OUT beside the shards: sidecars, index, configuration, manifest, model card."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import torch

import expo
from expo.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import MANIFEST
from expo.compute.cuts import EditReport
from expo.compute.summary import Alternative, Statistics, statistics
from expo.operators.statistics import Sums
from expo.output.journal import Fingerprint, sync_directory
from expo.planning.plan import Plan
from expo.spec.request import both_conventions, paper_alpha
from expo.spec.resolved import mergekit_spec, resolved
from expo.spec.surgery import renamed

_COPY_BYTES = 1 << 20


def write_sidecars(plan: Plan, folder: Path) -> dict[str, str]:
    """Copy the donor's files byte for byte and write index and configuration; SHA-256 by name."""
    hashes = {}
    for sidecar in plan.sidecars:
        target = folder / sidecar.name
        if sidecar.name == "config.json" and sidecar.files is plan.donor.files:
            hashes[sidecar.name] = write_file(target, _configuration(plan))
        else:
            hashes[sidecar.name] = copy_file(sidecar.files.local_path(sidecar.name), target)
    if [shard.file for shard in plan.shards] != [SINGLE]:
        hashes[INDEX] = write_file(folder / INDEX, _index(plan))
    return hashes


def write_file(path: Path, content: bytes) -> str:
    """Write a small file durably and return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
    return hashlib.sha256(content).hexdigest()


def seal_file(path: Path) -> str:
    """Make a file durable that a library has written, with the mode that files have; its SHA-256."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Copy a file of any size, durably, and return its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_COPY_BYTES):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    sync_directory(target.parent)
    return digest.hexdigest()


def manifest(
    plan: Plan,
    print_: Fingerprint,
    identities: dict[str, dict[str, str | int]],
    hashes: dict[str, str],
    total: Statistics,
    other: Alternative | None,
    tensors: dict[str, Statistics],
    modules: dict[str, Statistics],
    edits: list[EditReport],
) -> dict:
    """`expo.json`: how this model was made, and the SHA-256 of every file beside it."""
    request = plan.request
    labels = dict(zip(request.references(), plan.labels, strict=True))
    return {
        "schema": "expo.manifest/1",
        "plan": print_.digest,
        "method": request.method,
        "spec": resolved(request, labels.__getitem__),
        "mergekit_spec": mergekit_spec(request, _float_dtype(plan), labels.__getitem__),
        "alpha": request.alpha,
        "paper_alpha": None if request.alpha is None else paper_alpha(request.alpha),
        "sources": {role: _source(checkpoint) for role, checkpoint in plan.sources.items()},
        "donor": plan.donor.label,
        "inputs": identities,
        "dtypes": sorted({job.dtype for job in plan.jobs}),
        "rounding": request.rounding,
        "seed": request.seed,
        "statistics": asdict(total),
        "alternative": asdict(other) if other else None,
        "modules": {name: asdict(value) for name, value in modules.items()},
        "tensors": {name: asdict(value) for name, value in tensors.items()},
        "edits": [asdict(edit) for edit in edits],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "versions": {
            "expo": expo.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,  # pyright: ignore[reportPrivateImportUsage]
        },
        "files": dict(sorted(hashes.items())),
        "verified": None,
        "verification": None,
    }


def _float_dtype(plan: Plan) -> str:
    """The torch name of what most of the output is written in."""
    sizes: dict[str, int] = {}
    for job in plan.jobs:
        if job.dtype in FLOATS:
            sizes[job.dtype] = sizes.get(job.dtype, 0) + job.nbytes
    return TORCH_NAMES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"


def foreign_manifest(
    plan: Plan,
    digest: str,
    identities: dict[str, dict[str, str | int]],
    hashes: dict[str, str],
    dtypes: list[str],
) -> dict:
    """The manifest of an output that mergekit computed: what it did to each tensor is not known."""
    from importlib.metadata import version

    foreign = plan.request.foreign
    assert foreign is not None
    labels = dict(zip(plan.request.references(), plan.labels, strict=True))
    spec = renamed(foreign.spec, {text: labels[model] for text, model in foreign.models.items()})
    return {
        "schema": "expo.manifest/1",
        "plan": digest,
        "method": plan.request.method,
        "engine": "mergekit",
        "reasons": list(foreign.reasons),
        "spec": spec,
        "mergekit_spec": spec,
        "alpha": None,
        "paper_alpha": None,
        "sources": {role: _source(checkpoint) for role, checkpoint in plan.sources.items()},
        "donor": None if foreign.changes_tokenizer else plan.donor.label,
        "inputs": identities,
        "dtypes": dtypes,
        "rounding": "nearest",
        "seed": plan.request.seed,
        "statistics": asdict(statistics(Sums())),
        "alternative": None,
        "modules": {},
        "tensors": {},
        "edits": [],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "versions": {"expo": expo.__version__, "mergekit": version("mergekit")},
        "files": dict(sorted(hashes.items())),
        "verified": None,
        "verification": None,
    }


def write_manifest(folder: Path, content: dict) -> None:
    raw = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(folder / MANIFEST, raw.encode())


def card(content: dict) -> str:
    """A minimal model card, from the manifest alone."""
    sources = content["sources"]
    hub = [source["model"] for source in reversed(sources.values()) if source["commit"]]
    front = ["---", "library_name: transformers", "tags:", "- merge"]
    front += ["- expo"] if content["method"] == "expo" else ["- mergekit"]
    if hub:
        front += ["base_model:", *(f"- {name}" for name in hub), "base_model_relation: merge"]
    is_expo = content["method"] == "expo"
    title, text = _expo_text(sources) if is_expo else _merge_text(content)
    asked = both_conventions(content["alpha"]) if is_expo else content["method"]
    donor = content["donor"]
    tokenizer = "tokenizer and chat template: made by mergekit, as the spec asks"
    if donor is not None:
        tokenizer = (
            "tokenizer, chat template and generation configuration: those of "
            f"{_markdown(donor)}, byte for byte"
        )
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {title}",
            "",
            text,
            "",
            f"- {asked}; {_effective(content)}",
            f"- output dtype {', '.join(content['dtypes'])}, rounding {content['rounding']}, "
            f"seed {content['seed']}",
            f"- {tokenizer}",
            *([f"- low-rank edits: {_edits(content['edits'])}"] if content["edits"] else []),
            f"- made with expo {content['versions']['expo']}; every input, figure and hash is in "
            f"`{MANIFEST}`",
            "",
        ]
    )


def _edits(edits: list[dict]) -> str:
    kinds = dict.fromkeys((edit["keep"], edit["on"] == "result") for edit in edits)
    rules = ", ".join(
        f"{keep} of the {'weights' if is_result else 'change'}" for keep, is_result in kinds
    )
    matrices = len({edit["matrix"] for edit in edits})
    return f"{matrices} matrices, keep {rules}; ranks and removed energy are in `{MANIFEST}`"


def _effective(content: dict) -> str:
    if content.get("engine") == "mergekit":
        return "computed by mergekit, so what rounding left of it is not known"
    measured = content["statistics"]["effective_alpha"]
    effective = "not defined (the models are equal)" if measured is None else f"{measured:.4g}"
    return f"effective α after rounding: {effective}"


def _expo_text(sources: dict[str, dict]) -> tuple[str, str]:
    aligned = [s["model"] for role, s in sources.items() if role.startswith("aligned")]
    names = " and ".join(map(_markdown, aligned))
    formula = (
        "θ = θ_sft + α·(θ_aligned − θ_sft)"
        if len(aligned) == 1
        else "θ = θ_sft + Σ αᵢ·(θᵢ − θ_sft)"
    )
    if "onto" in sources:
        formula = formula.replace("θ = θ_sft", f"θ = {_markdown(sources['onto']['model'])}")
    return f"ExPO of {names}", (
        f"Model extrapolation ([ExPO](https://arxiv.org/abs/2404.16792)) of "
        f"{_markdown(sources['sft']['model'])} (SFT) through {names} (aligned): {formula}."
    )


def _merge_text(content: dict) -> tuple[str, str]:
    names = ", ".join(_markdown(source["model"]) for source in content["sources"].values())
    if content["method"] == "passthrough" and content["edits"]:
        return f"Low-rank edit of {names}", f"{names} with only a part of some matrices kept."
    return f"{content['method']} merge", f"A `{content['method']}` merge of {names}."


def _markdown(name: str) -> str:
    """A name from outside, as code that cannot break out of its backticks."""
    return f"`{printable(name).replace('`', '')}`"


def _source(checkpoint: Checkpoint) -> dict[str, str | None]:
    adapter = checkpoint.adapter
    return {
        "model": checkpoint.files.label,
        "commit": checkpoint.files.commit,
        "adapter": adapter.files.label if adapter else None,
        "adapter_commit": adapter.files.commit if adapter else None,
    }


def _index(plan: Plan) -> bytes:
    """The index of the shards, keeping the donor's other metadata."""
    weight_map = {job.name: shard.file for shard in plan.shards for job in shard.jobs}
    total_size = sum(shard.data_bytes for shard in plan.shards)
    index = {
        "metadata": plan.donor.index_metadata | {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _configuration(plan: Plan) -> bytes:
    """The donor's config.json, changed only where the dtype or the vocabulary did."""
    content = plan.donor.files.read("config.json")
    config = plan.donor.config
    changes: dict[str, str | int] = {}
    dtypes = {job.dtype for job in plan.jobs if job.dtype in FLOATS}
    if plan.request.dtype is not None and dtypes:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        changes[key] = TORCH_NAMES[sorted(dtypes)[0]]
    rows = _embedding_rows(plan)
    if rows is not None and "vocab_size" in config:
        changes["vocab_size"] = rows
    if all(config.get(key) == value for key, value in changes.items()):
        return content
    return (json.dumps(config | changes, indent=2, ensure_ascii=False) + "\n").encode()


def _embedding_rows(plan: Plan) -> int | None:
    """The rows of an embedding that the aligned side's adapter has resized."""
    adapter = plan.donor.adapter
    if adapter is None:
        return None
    for name, whole in adapter.replaced.items():
        if name.endswith("embed_tokens.weight") and whole.shape != plan.donor.tensors[name].shape:
            return whole.shape[0]
    return None
