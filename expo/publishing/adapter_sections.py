"""The sections of an adapter's card, each a list of lines."""

import shlex

from expo.checkpoint.sidecars import MANIFEST, is_tokenizer_file
from expo.output.manifest import AdapterManifest
from expo.publishing.markdown import code, percent, source, table
from expo.publishing.sections import (
    PAPER,
    checks,
    evaluations,
    heat_map,
    reference,
    rendered,
    reproduced_by,
    short,
    snippet,
)
from expo.results import Score
from expo.spec.request import both_conventions


def title(manifest: AdapterManifest) -> str:
    aligned = manifest.sources["aligned"]
    name = short(aligned) + ("-LoRA" if aligned.adapter is None else "")
    return name if manifest.scale == 1.0 else f"{name}-ExPO"


def body(
    manifest: AdapterManifest, results: tuple[Score, ...], image: str | None, repo_id: str | None
) -> list[str]:
    """All but the licence and what to cite."""
    sft, name = manifest.sources["sft"], title(manifest)
    # Without a tokenizer of its own it speaks by the model's, which nearly always has a template.
    chats = manifest.example is not None or not any(map(is_tokenizer_file, manifest.files))
    return [
        *_what(manifest),
        *evaluations(results, name),
        "## Use",
        "",
        *snippet(sft.model, chats, adapter=repo_id or name),
        *rendered(manifest.example),
        *_made(manifest),
        *heat_map(image),
        *checks(manifest.verification),
        *_reproduce(manifest),
    ]


def _what(manifest: AdapterManifest) -> list[str]:
    aligned, sft = manifest.sources["aligned"], manifest.sources["sft"]
    if aligned.adapter is not None:
        what = f"The LoRA adapter of {source(aligned)} with its scale times {manifest.scale:.12g}"
    else:
        what = (
            f"What {source(aligned)} learned from {source(sft)}, its SFT model, as a LoRA adapter of "
            f"{len(manifest.modules)} linear modules"
        )
        what += "" if manifest.scale == 1.0 else f", times {manifest.scale:.12g}"
    if manifest.scale == 1.0:
        return [f"{what}. Load it on {source(sft)}.", ""]
    return [
        f"{what}: loaded on {source(sft)}, it is the model that lies beyond the aligned one on the line from the SFT "
        f"model, as in model extrapolation ({PAPER}).",
        "",
        f"    θ_sft + α·(θ_aligned − θ_sft),   {both_conventions(manifest.scale)}",
        "",
    ]


def _made(manifest: AdapterManifest) -> list[str]:
    rows = [("α", both_conventions(manifest.scale))]
    if manifest.modules:
        worst = max(manifest.modules, key=lambda module: module.error)
        rows += [
            ("holds", f"{percent(manifest.energy)} of the energy of the change"),
            ("misses most", f"{percent(worst.error)} of the change of {code(worst.module)}"),
        ]
    else:
        rows += [("weights", "those of the adapter, byte for byte; only `lora_alpha` is another")]
    rows += [(role, source(entry)) for role, entry in manifest.sources.items()]
    note = f"Every input and the SHA-256 of every file are in `{MANIFEST}`."
    return ["## How it was made", "", *table(("", ""), rows), "", note, ""]


def _reproduce(manifest: AdapterManifest) -> list[str]:
    if not manifest.command:
        return []
    verb, *flags = manifest.command
    sft, aligned = (reference(manifest.sources[role]) for role in ("sft", "aligned"))
    words = [aligned, "out", "--minus", sft] if verb == "extract-lora" else [sft, aligned, "out"]
    command = shlex.join(["expo", verb, *words, *flags])
    return ["## Reproduce", "", *reproduced_by(command, manifest), ""]
