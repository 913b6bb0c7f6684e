"""`expo info`: what the manifest of an output holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options
from expo.cli.outcome import edits_text, outcome
from expo.cli.output import Output, facts, percent

if TYPE_CHECKING:
    from expo.output.manifest import AdapterManifest, Manifest, SourceEntry

Lines = Iterator[tuple[str, str]]


@click.command(
    short_help="Show how the model or adapter in OUT was made.",
    epilog="""\b
Examples:
  expo info out
  expo info out --json
""",
)
@click.argument("out", type=click.Path(path_type=Path))
@options.talk
def info(out: Path, output: Output) -> None:
    """Show how the model or adapter OUT was made: what its expo.json holds.

    Reads no other file; expo verify says whether they are still the same.
    """
    from expo.verbs.info import info as run

    found = run(out)
    output.result(found, lambda: info_text(found))


def info_text(manifest: "Manifest | AdapterManifest") -> str:
    """One line a fact; sources first, remarks last."""
    from expo.output.manifest import Manifest

    lines = _model(manifest) if isinstance(manifest, Manifest) else _adapter(manifest)
    return facts(lines)


def _model(manifest: "Manifest") -> Lines:
    for role, source in manifest.sources.items():
        yield role.replace("sft", "SFT"), _source(source)
    yield "method", "ExPO" if manifest.method == "expo" else manifest.method
    dtypes = "/".join(manifest.dtypes)
    if manifest.engine == "mergekit":  # why, the notes say
        yield "engine", "the mergekit library's, which measures nothing"
        yield "written", dtypes
    else:
        first, *more = outcome(manifest).split("; ")
        yield "came out", first
        yield from (("", part) for part in more)
        if manifest.edits and manifest.method != "passthrough":
            yield "edits", edits_text(manifest.edits)
        yield "written", f"{dtypes}, {manifest.rounding} rounding, seed {manifest.seed}"
    if manifest.is_of_transformers:
        yield "tokenizer", f"from {manifest.donor or 'mergekit, as the spec asked'}"
    yield "verified", _verified(manifest)
    yield from _made(manifest)
    yield from (("note", note) for note in manifest.notes)
    yield from (("warning", warning) for warning in manifest.warnings)


def _adapter(manifest: "AdapterManifest") -> Lines:
    for role, source in manifest.sources.items():
        yield role.replace("sft", "SFT"), _source(source)
    yield from _extracted(manifest) if manifest.modules else _scaled(manifest)
    yield "verified", _verified(manifest)
    yield from _made(manifest)
    yield from (("warning", warning) for warning in manifest.warnings)


def _scaled(manifest: "AdapterManifest") -> Lines:
    name = manifest.sources["aligned"].adapter
    yield "adapter", f"the matrices of {name}, for SFT, times {manifest.scale:g}"


def _extracted(manifest: "AdapterManifest") -> Lines:
    ranks = sorted(module.rank for module in manifest.modules)
    span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    yield "adapter", f"{len(ranks)} modules of rank {span}, for SFT, times {manifest.scale:g}"
    yield "holds", f"{percent(manifest.energy)} of the energy of the change"
    saved = sum(other.saved for other in manifest.others)
    yield (
        "others",
        f"{saved} changed tensors saved whole, {len(manifest.others) - saved} left as in SFT",
    )


def _made(manifest: "Manifest | AdapterManifest") -> Lines:
    yield "made by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    if manifest.backend != "cpu":
        yield "made on", manifest.backend
    yield "files", f"{len(manifest.files)}, each with its SHA-256 (expo verify compares them)"


def _source(source: "SourceEntry") -> str:
    places = [(source.model, source.commit)]
    places += [] if source.adapter is None else [(source.adapter, source.adapter_commit)]
    return " + adapter ".join(
        name if commit is None else f"{name}, commit {commit}" for name, commit in places
    )


def _verified(manifest: "Manifest | AdapterManifest") -> str:
    """What the verification said when it was made."""
    if manifest.verified is None:
        return "nobody looked: expo verify does"
    checks = manifest.verification or ()
    wrong = [check.name for check in checks if check.status == "error"]
    warned = [check.name for check in checks if check.status == "warning"]
    text = "when it was made" if manifest.verified else f"NO: {', '.join(wrong)}"
    return text + (f"; warnings: {', '.join(warned)}" if warned else "")
