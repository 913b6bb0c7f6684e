"""Open the models of a merge, match them by their headers, lay out the output."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch

from expo.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from expo.checkpoint.child import search
from expo.checkpoint.code import code_files
from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.files import check_contents
from expo.checkpoint.headers import printable
from expo.checkpoint.links import is_cached, target_outside
from expo.checkpoint.reference import Reference
from expo.checkpoint.sidecars import is_legal, is_model_sidecar, is_reserved, is_tokenizer_file
from expo.errors import SpecError
from expo.operators.methods import METHODS, NOT_IN_MERGEKIT
from expo.planning.asked import check_asked, tables_differ
from expo.planning.edits import with_edits
from expo.planning.findings import Findings, listing, summarize
from expo.planning.jobs import TensorJob
from expo.planning.match import match
from expo.planning.models import Models
from expo.planning.noise import noise_note, noise_of, noise_warning
from expo.planning.patterns import check_patterns
from expo.planning.plan import Plan, ShardPlan, Sidecar, alpha_warnings
from expo.planning.sides import check_sides
from expo.planning.values import layer_count
from expo.results import CodingNoise
from expo.spec.request import Foreign, Request
from expo.spec.resolved import mergekit_spec

_FACTOR = re.compile(r"[._]lora[._](A|B|up|down)\b")


def build_plan(request: Request) -> Plan:
    """Open every model (headers only) and plan the merge.

    Raises:
        CheckpointError, HubError, TokenizerError: an input cannot be used at all. What is wrong
            between the models is in the plan's `refusals` instead, all of it at once.
        SpecError: `allow_missing` is not a regular expression.
    """
    streams = request.stream_inputs
    opened = {r: open_checkpoint(r, streams=streams) for r in request.references()}
    return plan_of(request, opened)


def plan_of(request: Request, opened: Mapping[Reference, Checkpoint]) -> Plan:
    """Plan the merge of models that are open. Raises as `build_plan`."""
    allowed = _allowed(request, opened)
    found = Findings(notes=[note for checkpoint in opened.values() for note in checkpoint.notes])
    donor = opened[donor_of(request)]
    request = _routed(request, opened, donor)
    check_asked(request, opened, donor, found)
    check_patterns(request, opened, donor, allowed, found)
    jobs = match(request, _models(request, opened), allowed, found) if not request.foreign else {}
    fit = check_sides(request, opened, jobs, found)
    noise = _noise(request, jobs, found)
    jobs = with_edits(request, donor, jobs, found)
    sidecars, left_behind = _sidecars(donor, request.include, found)
    sidecars = _with_licences(sidecars, opened.values())
    _check_links(sidecars, found)
    if request.foreign is not None:
        sidecars = tuple(s for s in sidecars if not _is_mergekits(s.name, request.foreign))
    models = " → ".join(checkpoint.label for checkpoint in opened.values())
    if fit:
        summarize(found, models, is_expo=request.method == "expo")
    _remark(request, opened, donor, found)
    if request.foreign is not None:
        found.refusals += _unread_by_mergekit(opened.values())
    shards = () if request.foreign else _shards(donor, jobs, request.max_shard_bytes)
    _refuse_reserved(sidecars, shards, donor, found)
    plan = Plan(
        request=request,
        sources=_roles(request, opened),
        donor=donor,
        shards=shards,
        index_name=_index_name(donor, shards),
        sidecars=sidecars,
        left_behind=left_behind,
        missing=tuple(found.missing),
        extra=tuple(found.extra),
        mismatched=tuple(found.mismatched),
        refusals=tuple(found.refusals),
        warnings=tuple(dict.fromkeys(found.warnings)),
        notes=tuple(dict.fromkeys(found.notes)),
        noise=noise,
    )
    return replace(plan, refusals=(*plan.refusals, *plan.gated))


def _noise(request: Request, jobs: Mapping[str, TensorJob], found: Findings) -> CodingNoise | None:
    """How much noise the codes of quantized inputs leave in what is extrapolated."""
    if request.method != "expo" or request.base is None or request.foreign or request.compares:
        return None
    noise = noise_of(jobs.values())
    if noise is not None:
        found.notes.append(noise_note(noise))
        found.warnings += noise_warning(noise)
    return noise


def _routed(request: Request, opened: Mapping[Reference, Checkpoint], donor: Checkpoint) -> Request:
    """The request, through mergekit where its slices end before the model does, or where other
    vocabularies have to be fitted to the base's."""
    layers, covered = layer_count(donor), request.slices[-1].layers
    is_short = covered is not None and covered[1] != layers
    fitting = request.fits_vocabulary and tables_differ(tuple(opened.values()))
    if request.foreign is not None or not (is_short or fitting):
        return request
    reason = "vocabularies of several sizes need mergekit's tokenizer surgery"
    if covered is not None and is_short:
        reason = f"slices end at layer {covered[1]}, {donor.label} has {layers}"
        if covered[1] > layers:
            raise SpecError(f"{reason}: take fewer of them")
    if request.method in NOT_IN_MERGEKIT or request.rounding != "nearest":
        raise SpecError(
            f"{reason}: that needs mergekit's engine, which knows no ExPO, RELEX or rounding"
        )
    floats = [weight.dtype for weight in donor.weights.values() if weight.dtype in FLOATS]
    out_dtype = request.dtype or (TORCH_NAMES[floats[0]] if floats else "float32")
    models = {str(reference): reference for reference in request.references()}
    spec = mergekit_spec(request, out_dtype)
    assert spec is not None
    spec |= {"tokenizer_source": "base"} if request.fits_vocabulary else {}
    foreign = Foreign(spec, models, (reason,), changes_tokenizer=request.fits_vocabulary)
    return replace(request, foreign=foreign)


def donor_of(request: Request) -> Reference:
    """Whose shapes, dtypes, configuration, tokenizer and template the output has.

    ExPO: the first aligned model, because it is what the output should speak like. Other methods:
    mergekit's rule where it has one (the base), else the first model.
    """
    first = request.operands[0].reference
    if request.donor is not None or request.method == "expo":
        return request.donor or first
    return request.base or first


def _is_mergekits(name: str, foreign: Foreign) -> bool:
    """What mergekit makes anew because it was asked to; everything else is the donor's own."""
    return name == "config.json" or (foreign.changes_tokenizer and is_tokenizer_file(name))


def _unread_by_mergekit(checkpoints: Iterable[Checkpoint]) -> Iterator[str]:
    """mergekit's engine reads from this disk alone, and no codes."""
    for checkpoint in checkpoints:
        if any(files.streams for files, _ in checkpoint.inputs()):
            cure = "leave out --stream-inputs, or bring the model to this disk first"
            yield f"{checkpoint.label} would be read where it lies, which mergekit's engine cannot: {cure}"
        if checkpoint.coding.codes:
            cure = "write it as bfloat16 first, with expo merge and a spec of merge_method: passthrough"
            yield f"{checkpoint.label} is quantized, which mergekit's engine does not read: {cure}"


def _models(request: Request, opened: Mapping[Reference, Checkpoint]) -> Models:
    base = request.base if METHODS[request.method].base != "operand" else None
    return Models(
        donor=opened[donor_of(request)],
        base=None if base is None else opened[base],
        onto=None if request.onto is None else opened[request.onto],
        operands=tuple(opened[operand.reference] for operand in request.operands),
        is_pair=request.is_pair
        and not request.compares
        and donor_of(request) == request.operands[0].reference,
        compares=request.compares,
    )


def _roles(request: Request, opened: Mapping[Reference, Checkpoint]) -> dict[str, Checkpoint]:
    """Every model by the part it plays, for the manifest, messages and the fingerprint."""
    is_expo = request.method == "expo"
    role = "aligned" if is_expo else "model"
    named = [] if request.base is None else [("sft" if is_expo else "base", request.base)]
    operands = [
        operand.reference for operand in request.operands if operand.reference != request.base
    ]
    numbered = len(operands) > 1 or not is_expo
    named += [(f"{role} {n}" if numbered else role, r) for n, r in enumerate(operands, 1)]
    named += [("onto", request.onto)] if request.onto is not None else []
    if request.donor is not None and request.donor not in [reference for _, reference in named]:
        named.append(("donor", request.donor))
    return {name: opened[reference] for name, reference in named}


def _allowed(request: Request, opened: Mapping[Reference, Checkpoint]) -> frozenset[str]:
    """The tensors that `--allow-missing` names."""
    if request.allow_missing is None:
        return frozenset()
    names = sorted({name for checkpoint in opened.values() for name in checkpoint.weights})
    try:
        return search([request.allow_missing], names)[0]
    except ValueError as error:
        raise SpecError(f"--allow-missing: {error}") from error


def _sidecars(
    aligned: Checkpoint, include: Iterable[str], found: Findings
) -> tuple[tuple[Sidecar, ...], dict[str, int]]:
    """Split the donor's files into those that travel and those that stay, named with their size."""
    weights = {shard.file for shard in aligned.shards}
    code = code_files(aligned.model_files)
    tokenizer = aligned.tokenizer_files
    chosen: dict[str, Sidecar] = {}
    left_behind: dict[str, int] = {}
    folders = [aligned.files] + ([aligned.adapter.files] if aligned.adapter else [])
    for files in folders:
        for name, size in files.sizes.items():
            wanted = (
                (files is tokenizer and is_tokenizer_file(name))
                or (files is aligned.files and is_model_sidecar(name))
                or name in code
                or any(fnmatch(name, pattern) for pattern in include)
            )
            if wanted and name not in chosen:
                if not is_legal(name):
                    check_contents(files, name)
                chosen[name] = Sidecar(name, files)
            elif name not in weights and not name.endswith(".index.json"):
                label = name if files is aligned.files else f"{files.label}/{name}"
                left_behind[label] = size
    for name in sorted(code.keys() & chosen.keys()):
        found.warnings.append(f"{printable(name)} is model code (auto_map): copied, read it first")
    return tuple(chosen[name] for name in sorted(chosen)), left_behind


def _refuse_reserved(
    sidecars: Iterable[Sidecar], shards: Iterable[ShardPlan], donor: Checkpoint, found: Findings
) -> None:
    weights = {shard.file for shard in (*donor.shards, *shards)}
    names = [sidecar.name for sidecar in sidecars if is_reserved(sidecar.name, weights)]
    if names:
        found.refusals.append(
            f"--include adds {listing(map(printable, names))}, whose names the output needs for its own files: "
            "narrow the pattern"
        )


def _with_licences(
    sidecars: tuple[Sidecar, ...], opened: Iterable[Checkpoint]
) -> tuple[Sidecar, ...]:
    """Licences and notices of the other models travel too, where the donor has no file of that name."""
    chosen = {sidecar.name: sidecar for sidecar in sidecars}
    for checkpoint in opened:
        for files in [checkpoint.files] + (
            [checkpoint.adapter.files] if checkpoint.adapter else []
        ):
            for name in filter(is_legal, files.sizes):
                chosen.setdefault(name, Sidecar(name, files))
    return tuple(chosen[name] for name in sorted(chosen))


def _check_links(sidecars: Iterable[Sidecar], found: Findings) -> None:
    """Refuse links out of the model's folder, but to what the Hub's client has downloaded: those are said."""
    followed: dict[str, list[str]] = {}
    for sidecar in sidecars:
        label, name = sidecar.files.label, sidecar.name
        target = target_outside(sidecar.files, name)
        if target is None:
            continue
        if is_cached(target):
            followed.setdefault(label, []).append(name)
        else:
            found.refusals.append(
                f"{printable(f'{label}/{name}')} is a link to {printable(str(target))}, outside the model's folder: "
                "copy that file there if it belongs to the model, else remove the link"
            )
    for label, names in followed.items():
        what = listing(map(printable, names))
        found.notes.append(f"links of {label} into the Hub's cache are followed: {what}")


def _remark(
    request: Request, opened: Mapping[Reference, Checkpoint], donor: Checkpoint, found: Findings
) -> None:
    found.warnings += request.remarks
    found.notes += request.notes
    if request.foreign is not None:
        found.notes += [
            f"runs through the mergekit library: {why}" for why in request.foreign.reasons
        ]
    found.warnings += alpha_warnings(request)
    for checkpoint in opened.values():
        types = (checkpoint.config.get("model_type"), donor.config.get("model_type"))
        if None not in types and types[0] != types[1]:
            models = f"{types[0]} in {checkpoint.label}, {types[1]} in {donor.label}"
            found.warnings.append(f"model_type differs: {printable(models)}")
    if not donor.is_of_transformers:
        found.notes.append(
            f"{donor.label} is no model of transformers as far as its files say: tensors are matched by name and "
            "shape, nothing else is checked"
        )
        factor = next(filter(_FACTOR.search, donor.weights), None)
        if factor is not None:
            found.warnings.append(
                f"{donor.label} holds factors of a LoRA adapter ({printable(factor)}): each is merged by itself, "
                "and their product is not what the formula gives; merge both adapters into their model first"
            )
    elif not any(map(is_tokenizer_file, donor.tokenizer_files.sizes)):
        found.warnings.append(f"{donor.label} has no tokenizer: the output will have none either")


def _shards(
    aligned: Checkpoint, jobs: dict[str, TensorJob], max_shard_bytes: int | None
) -> tuple[ShardPlan, ...]:
    """The aligned model's files in its order; other names where it is a `.bin`, or re-sharded."""
    held = [(s, [name for name, _ in aligned.held(s)]) for s in aligned.shards]
    groups = [
        (s.file, s.metadata, [jobs[name] for name in names if name in jobs])
        for s, names in held
        if names or not s.tensors  # one that holds nothing but scales is left out
    ]
    if max_shard_bytes is not None:
        metadata = aligned.shards[0].metadata
        packed = _pack([job for *_, group in groups for job in group], max_shard_bytes)
        groups = [("", metadata, group) for group in packed]
    elif all(file.endswith(".safetensors") for file, *_ in groups):
        return tuple(ShardPlan(file, metadata, tuple(group)) for file, metadata, group in groups)
    total = len(groups)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    if total == 1:
        names = ["model.safetensors"]
    return tuple(
        ShardPlan(name, metadata, tuple(group))
        for name, (_, metadata, group) in zip(names, groups, strict=True)
    )


def _index_name(donor: Checkpoint, shards: tuple[ShardPlan, ...]) -> str | None:
    """The donor's for the donor's files, else as transformers has it."""
    files = [shard.file for shard in shards]
    if files == [SINGLE]:
        return None
    return donor.index_name if files == [shard.file for shard in donor.shards] else INDEX


def _pack(jobs: list[TensorJob], limit_bytes: int) -> list[list[TensorJob]]:
    groups: list[list[TensorJob]] = [[]]
    room = limit_bytes
    for job in jobs:
        if groups[-1] and job.nbytes > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(job)
        room -= job.nbytes
    return groups
