"""A publication as a person reads it: before, and after."""

from collections.abc import Mapping

from expo.checkpoint.hub import endpoint_note
from expo.checkpoint.sidecars import SIGNATURE
from expo.cli.output import facts, gigabytes
from expo.results import PublishPlan, PublishResult

_LISTED = 8


def publish_plan_text(plan: PublishPlan) -> str:
    seen = "private" if plan.private else "public"
    where = f"pull request to {plan.revision}" if plan.pull_request else plan.revision
    lines = [
        ("to", f"{plan.url} ({'new, ' if plan.is_new else ''}{seen}), {where}"),
        ("as", plan.account),
        ("head", plan.head or "nothing there yet"),
        ("licence", plan.licence),
        ("sends", f"{gigabytes(plan.bytes_to_send)} of {gigabytes(plan.bytes_in_all)}: {_names(plan.send)}"),
        ("there", _names(plan.skip)),
        ("deletes", _names(plan.delete)),
        ("keeps", _names(plan.keep)),
        ("leaves", _names(plan.leave)),
    ]  # fmt: skip
    if plan.signs:
        lines.append(("signs", f"all that is published: {SIGNATURE}"))
    if note := endpoint_note():
        lines.append(("note", note))
    return facts([*lines, *(("warning", warning) for warning in plan.warnings)])


def publish_text(result: PublishResult) -> str:
    where = result.pull_request or result.url
    return (
        f"{where}: {len(result.files)} files, {gigabytes(result.bytes_sent)} sent, "
        f"{gigabytes(result.bytes_skipped)} were there, {len(result.deleted)} deleted"
    )


def _names(files: Mapping[str, int]) -> str:
    shown = [f"{name} ({gigabytes(size)})" for name, size in files.items()]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return (", ".join(shown[:_LISTED]) + more) or "nothing"
