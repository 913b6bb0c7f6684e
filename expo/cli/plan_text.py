"""A plan as a person reads it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from expo.checkpoint.hub import endpoint_note
from expo.cli.output import facts
from expo.planning.findings import gigabytes
from expo.planning.report import PlanReport, SourceReport
from expo.results import Bound
from expo.spec.request import both_conventions

_LISTED = 8


def plan_text(plan: PlanReport) -> str:
    tensors = plan.tensors
    unmatched = ", ".join(
        f"{len(names)} {what}"
        for what, names in (
            ("missing", tensors.missing),
            ("extra", tensors.extra),
            ("mismatched", tensors.mismatched),
        )
    )
    donor = (
        plan.tokenizer_donor
        or f"nobody: the {'aligned' if plan.method == 'expo' else 'first'} model has none"
    )
    asked = f"ExPO, {_alpha(plan)}" if plan.method == "expo" else plan.method
    lines = [
        *((role.replace("sft", "SFT"), _source(source)) for role, source in plan.sources.items()),
        ("request", f"{asked}, {plan.rounding} rounding, seed {plan.seed}"),
        ("tensors", f"{tensors.matched} {'extrapolated' if plan.method == 'expo' else 'merged'}, {tensors.copied} copied, {unmatched}"),
        *((("edits", f"{tensors.edited_matrices} matrices are cut"),) if tensors.edited_matrices else ()),
        ("engine", "expo's own, streaming" if plan.engine == "expo" else "the mergekit library's"),
        ("reads", _reads(plan)),
        ("writes", f"{gigabytes(plan.write_bytes)} in {len(plan.shards)} files, {'/'.join(plan.dtypes)}"),
        ("disk", f"{gigabytes(plan.free_disk_bytes)} free"),
        ("memory", f"about {gigabytes(plan.memory_bytes)} beside the libraries"),
        ("tokenizer", f"from {donor}"),
        ("copies", ", ".join(plan.sidecars) or "nothing"),
        ("leaves", _left_behind(plan.left_behind)),
    ]  # fmt: skip
    if plan.bound is not None:
        lines += _bound(plan.bound)
    if plan.engine == "mergekit":  # what it will read and write is its own affair
        lines = [line for line in lines if line[0] not in ("tensors", "reads", "writes", "memory")]
    if note := endpoint_note():
        lines.append(("note", note))
    for name, remarks in (
        ("note", plan.notes),
        ("warning", plan.warnings),
        ("refused", plan.refusals),
    ):
        lines += [(name, remark) for remark in remarks]
    return facts(lines)


def plans_text(plans: Sequence[PlanReport], outs: Sequence[Path]) -> str:
    """The plans of one merge at several α: what they have in common once, and a line for every output."""
    alphas = [plan.alpha_range for plan in plans if plan.alpha_range is not None]
    together = replace(
        plans[0],
        alpha_range=(min(low for low, _ in alphas), max(high for _, high in alphas)) if alphas else None,
        write_bytes=sum(plan.write_bytes for plan in plans),
        shards={f"{number}/{name}": size for number, plan in enumerate(plans) for name, size in plan.shards.items()},
        warnings=tuple(dict.fromkeys(warning for plan in plans for warning in plan.warnings)),
        refusals=tuple(dict.fromkeys(refusal for plan in plans for refusal in plan.refusals)),
    )  # fmt: skip
    lines = [
        f"{'output':<10} {out}: {gigabytes(plan.write_bytes)}, {_alpha(plan)}"
        for plan, out in zip(plans, outs, strict=True)
    ]
    return "\n".join([plan_text(together), *lines])


def _alpha(plan: PlanReport) -> str:
    if plan.alpha_range is None:
        return "alpha not given"
    low, high = map(both_conventions, plan.alpha_range)
    return low if low == high else f"{low} to {high}"


def _reads(plan: PlanReport) -> str:
    read, download = gigabytes(plan.read_bytes), gigabytes(plan.download_bytes)
    if not plan.stream_bytes:
        return f"{read}, {download} to download"
    streamed = f"{gigabytes(plan.stream_bytes)} of it streamed by range (each byte once)"
    return f"{read}, {streamed}, {download if plan.download_bytes else 'no weights'} to download"


def _bound(bound: Bound) -> list[tuple[str, str]]:
    names = {"bus": "bus (both ways at once)", "hash": "SHA-256"}
    rates = {
        "disk": "disk {}/s", "to_device": "to the device {}/s", "from_device": "from it {}/s",
        "elements": "{} elements/s", "elements_here": "on the CPU {} elements/s",
        "hash": "SHA-256 {}/s", "spectrum": "matrices {} of m²n/s", "small_rank": "matrices of small rank {} of m·n·rank/s",
    }  # fmt: skip
    took = ", ".join(f"{names.get(part, part)} {s:.2g} s" for part, s in bound.seconds.items())
    known = {name: text for name, text in rates.items() if name in bound.rates}
    measured = ", ".join(
        text.format(_amount(name, bound.rates[name])) for name, text in known.items()
    )
    return [
        ("device", bound.backend),
        ("bound", f"{bound.says}; each by itself: {took}"),
        ("measured", measured),
    ]


def _amount(name: str, rate: float) -> str:
    is_bytes = name in ("disk", "to_device", "from_device", "hash")
    return gigabytes(round(rate)) if is_bytes else f"{rate / 1e9:.3g} G"


def _source(source: SourceReport) -> str:
    text = f"{source.model} ({source.kind}{_at(source.commit)})"
    if source.adapter is not None:
        text += f" + adapter {source.adapter}{_at(source.adapter_commit)}"
    return text


def _at(commit: str | None) -> str:
    return f", commit {commit}" if commit else ""


def _left_behind(files: dict[str, int]) -> str:
    shown = [f"{name} ({gigabytes(size)})" for name, size in files.items()]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return (", ".join(shown[:_LISTED]) + more) or "nothing"
