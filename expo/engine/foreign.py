"""The one place that uses the mergekit library: what only its engine can do, into our kind of output.

mergekit writes into the staging directory; then come the files that it loses, verification, manifest
and the placement in one rename. There is no resume: an interrupted run starts afresh.
"""

import os
import time
from dataclasses import asdict
from pathlib import Path

from expo.checkpoint.checkpoint import INDEX
from expo.checkpoint.reference import Reference
from expo.checkpoint.sidecars import CARD, MANIFEST, is_tokenizer_file
from expo.engine.journal import Fingerprint, identities
from expo.engine.outputs import card, copy_file, foreign_manifest, write_file, write_manifest
from expo.engine.staging import Staging
from expo.errors import CheckpointError, SpecError
from expo.planning.output import check_out
from expo.planning.plan import Plan
from expo.verification.check import VerifyResult
from expo.verification.golden import read_golden
from expo.verification.run import verify_folder

Content = dict


def run_foreign(plan: Plan, out: Path, *, overwrite: bool, verify: bool) -> Content:
    """Run the plan's spec through mergekit and place the result at `out`; returns the manifest.

    Raises:
        SpecError: mergekit is not installed, or does not accept the spec.
        CheckpointError: mergekit fails.
        OutputError: `out` is taken or cannot be written.
    """
    started = time.monotonic()
    check_out(out, plan.request, overwrite=overwrite)
    known = identities(plan)
    print_ = Fingerprint({"mergekit": repr(plan.request.foreign), "inputs": repr(known)})
    with Staging(out, overwrite=overwrite) as staging:
        staging.start_afresh(print_)
        try:
            _merge(plan, staging.path)
            _restore(plan, staging.path)
            hashes = _seal(staging)
            found = _verify(plan, staging) if verify else None
            content = foreign_manifest(plan, print_.digest, known, hashes)
            if found is not None:
                content |= {"verified": found.ok, "verification": [asdict(c) for c in found.checks]}
            content["files"][CARD] = write_file(staging.path / CARD, card(content).encode())
            write_manifest(staging.path, content)
            staging.place()
        except (CheckpointError, SpecError):
            staging.discard()
            raise
    return content | {"seconds": time.monotonic() - started}


def _merge(plan: Plan, folder: Path) -> None:
    try:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except ImportError as error:
        raise SpecError(
            "this spec needs the mergekit library: pip install 'expo-merge[mergekit]'"
        ) from error
    from transformers import set_seed

    foreign = plan.request.foreign
    assert foreign is not None
    try:
        config = MergeConfiguration.model_validate(_pinned(foreign.spec, plan))
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(f"mergekit does not accept the spec: {first}") from error
    options = MergeOptions(quiet=True, write_model_card=False, lazy_unpickle=True)
    set_seed(plan.request.seed)
    try:
        run_merge(config, str(folder), options)
    except Exception as error:  # a library that raises whatever its tasks raise
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"mergekit failed: {said}") from error


def _pinned(value: object, plan: Plan) -> object:
    """The spec with every Hub model at the commit that was planned."""
    if isinstance(value, dict):
        return {key: _pinned(item, plan) for key, item in value.items()}
    if isinstance(value, list):
        return [_pinned(item, plan) for item in value]
    for checkpoint in plan.sources.values():
        reference: Reference = checkpoint.reference
        if value == str(reference) and reference.adapter is None and checkpoint.files.commit:
            return f"{reference.model.repo_id}@{checkpoint.files.commit}"
    return value


def _restore(plan: Plan, folder: Path) -> None:
    """Copy the donor's files that mergekit loses or saves anew; a tokenizer it was asked to make stays."""
    foreign = plan.request.foreign
    assert foreign is not None
    for sidecar in plan.sidecars:
        target = folder / sidecar.name
        own_tokenizer = foreign.changes_tokenizer and is_tokenizer_file(sidecar.name)
        if sidecar.name != "config.json" and not own_tokenizer:
            copy_file(sidecar.files.local_path(sidecar.name), target)


def _seal(staging: Staging) -> dict[str, str]:
    """Usual modes, everything on the disk, SHA-256 by name."""
    mask = os.umask(0)
    os.umask(mask)
    hashes = {}
    for path in sorted(staging.path.rglob("*")):
        name = path.relative_to(staging.path).as_posix()
        if path.is_file() and name not in (*staging.own_files, MANIFEST):
            path.chmod(0o666 & ~mask)
            hashes[name] = _digest(path)
    return hashes


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(plan: Plan, staging: Staging) -> VerifyResult:
    """Without the donor: layers and vocabulary may differ from every model's on purpose."""
    golden = None if plan.request.vectors is None else read_golden(plan.request.vectors)
    return verify_folder(
        staging.path,
        golden=golden,
        quick=True,
        stop_at=plan.request.stop_at,
        ignored=staging.own_files | {"mergekit_config.yml", INDEX},
    )
