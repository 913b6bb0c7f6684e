"""The model card, from the manifest alone."""

from collections.abc import Mapping, Sequence

from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import MANIFEST
from expo.output.manifest import Manifest, SourceEntry
from expo.results import EditReport
from expo.spec.request import both_conventions


def card(manifest: Manifest) -> str:
    """A minimal model card."""
    sources = manifest.sources
    hub = [source.model for source in reversed(sources.values()) if source.commit]
    is_expo = manifest.method == "expo"
    front = ["---", "library_name: transformers", "tags:", "- merge"]
    front += ["- expo"] if is_expo else ["- mergekit"]
    if hub:
        front += ["base_model:", *(f"- {name}" for name in hub), "base_model_relation: merge"]
    title, text = _expo_text(sources) if is_expo else _merge_text(manifest)
    asked = both_conventions(manifest.alpha) if is_expo else manifest.method
    donor = manifest.donor
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
            f"- {asked}; {_effective(manifest)}",
            f"- output dtype {', '.join(manifest.dtypes)}, rounding {manifest.rounding}, "
            f"seed {manifest.seed}",
            f"- {tokenizer}",
            *([f"- low-rank edits: {_edits(manifest.edits)}"] if manifest.edits else []),
            f"- made with expo {manifest.versions['expo']}; every input, figure and hash is in "
            f"`{MANIFEST}`",
            "",
        ]
    )


def _edits(edits: Sequence[EditReport]) -> str:
    kinds = dict.fromkeys((edit.keep, edit.on == "result") for edit in edits)
    rules = ", ".join(
        f"{keep} of the {'weights' if is_result else 'change'}" for keep, is_result in kinds
    )
    matrices = len({edit.matrix for edit in edits})
    return f"{matrices} matrices, keep {rules}; ranks and removed energy are in `{MANIFEST}`"


def _effective(manifest: Manifest) -> str:
    if manifest.engine == "mergekit":
        return "computed by mergekit, so what rounding left of it is not known"
    measured = manifest.statistics.effective_alpha
    effective = "not defined (the models are equal)" if measured is None else f"{measured:.4g}"
    return f"effective α after rounding: {effective}"


def _expo_text(sources: Mapping[str, SourceEntry]) -> tuple[str, str]:
    aligned = [s.model for role, s in sources.items() if role.startswith("aligned")]
    names = " and ".join(map(_markdown, aligned))
    formula = (
        "θ = θ_sft + α·(θ_aligned − θ_sft)"
        if len(aligned) == 1
        else "θ = θ_sft + Σ αᵢ·(θᵢ − θ_sft)"
    )
    if "onto" in sources:
        formula = formula.replace("θ = θ_sft", f"θ = {_markdown(sources['onto'].model)}")
    return f"ExPO of {names}", (
        f"Model extrapolation ([ExPO](https://arxiv.org/abs/2404.16792)) of "
        f"{_markdown(sources['sft'].model)} (SFT) through {names} (aligned): {formula}."
    )


def _merge_text(manifest: Manifest) -> tuple[str, str]:
    names = ", ".join(_markdown(source.model) for source in manifest.sources.values())
    if manifest.method == "passthrough" and manifest.edits:
        return f"Low-rank edit of {names}", f"{names} with only a part of some matrices kept."
    return f"{manifest.method} merge", f"A `{manifest.method}` merge of {names}."


def _markdown(name: str) -> str:
    """A name from outside, as code that cannot break out of its backticks."""
    return f"`{printable(name).replace('`', '')}`"
