"""What `extract-lora` and `extrapolate --as-adapter` share: the folder of an adapter, placed when it is whole."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from expo.checkpoint.adapter import CONFIG
from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.sidecars import CARD, MANIFEST, is_legal, is_tokenizer_file
from expo.errors import CheckpointError
from expo.output.claim import check_out
from expo.output.durable import copy_file, unwritable, write_file
from expo.output.journal import fingerprint
from expo.output.manifest import AdapterManifest, Identities
from expo.output.staging import Staging, claimed
from expo.planning.plan import Plan, Sidecar
from expo.publishing.card import card
from expo.results import ExtractResult
from expo.verification.run import children_of, verify_folder


@contextmanager
def adapter_staging(
    plan: Plan, out: Path, known: Identities, *, overwrite: bool
) -> Iterator[Staging]:
    """A folder that becomes `out` when the block ends well; after a failure nothing is left of it.

    Raises:
        OutputError: `out` is taken, or cannot be written.
    """
    check_out(out, plan.request, overwrite=overwrite)
    with claimed(out, plan.request, overwrite=overwrite) as staging:
        staging.start_afresh(fingerprint(plan, known))
        try:
            yield staging
            staging.place()
        except CheckpointError:
            staging.discard()
            raise
        except OSError as error:
            staging.discard()  # there is nothing to resume
            raise unwritable(error, staging.out) from error


def write_beside(folder: Path, config: dict, sidecars: Iterable[Sidecar]) -> dict[str, str]:
    """The configuration, and of the files beside a model the tokenizer's and the legal ones; SHA-256 by name."""
    hashes = {CONFIG: write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())}
    for sidecar in sidecars:
        if is_tokenizer_file(sidecar.name) or is_legal(sidecar.name):
            source = sidecar.files.local_path(sidecar.name)
            hashes[sidecar.name] = copy_file(source, folder / sidecar.name)
    return hashes


def finish(folder: Path, manifest: AdapterManifest, base: Checkpoint) -> AdapterManifest:
    """Verify what lies in `folder` against the model that it is for, and write card and manifest."""
    with children_of(folder) as children:
        found = verify_folder(folder, aligned=base, children=children)
        example = children.example()
    manifest = replace(manifest, verified=found.ok, verification=found.checks, example=example)
    written = write_file(folder / CARD, card(manifest).encode())
    manifest = replace(manifest, beside={CARD: written})
    write_file(folder / MANIFEST, manifest.to_json().encode())
    return manifest


def extract_result(out: Path, manifest: AdapterManifest, seconds: float) -> ExtractResult:
    """What a placed adapter comes to."""
    return ExtractResult(
        out,
        manifest.modules,
        manifest.others,
        manifest.energy,
        manifest.scale,
        sum((out / name).stat().st_size for name in manifest.listed),
        seconds,
        manifest.verified,
        manifest.verification or (),
        manifest.warnings,
    )


def between(alpha: float) -> tuple[str, ...]:
    """The flag without which the command line refuses this α."""
    return ("--interpolate",) if 0 < alpha < 1 else ()


def plain(value: float) -> float | int:
    """A number as a configuration has it: 16, not 16.0."""
    return int(value) if float(value).is_integer() else value
