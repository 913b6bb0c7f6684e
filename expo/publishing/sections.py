"""The sections of a merged model's card, each a list of lines."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping

from expo.checkpoint.shown import visible
from expo.checkpoint.sidecars import MANIFEST, is_tokenizer_file
from expo.output.manifest import AdapterManifest, Example, Manifest, SourceEntry
from expo.publishing.evaluations import results_table
from expo.publishing.licences import Terms, parent_licences
from expo.publishing.markdown import block, code, number, percent, source, source_revision, table
from expo.results import CheckResult, EditReport, Score
from expo.spec.request import both_conventions
from expo.spec.resolved import to_yaml

PAPER = "[ExPO](https://arxiv.org/abs/2404.16792)"

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_DEFAULTS = {
    "interpolate": False,
    "exclude": [],
    "fix_first_layers": 0,
    "fix_last_layers": 0,
    "out_dtype": None,
    "rounding": "nearest",
    "seed": 0,
}


def title(manifest: Manifest) -> str:
    aligned = _aligned(manifest)
    names = [short(entry) for entry in (aligned or manifest.sources.values())]
    if manifest.method == "passthrough" and manifest.edits:
        return f"{' and '.join(names)}, low-rank edit"
    if manifest.method != "expo":
        return f"{manifest.method} merge of {', '.join(names)}"
    return f"{names[0]}-ExPO" if len(names) == 1 else f"ExPO of {' and '.join(names)}"


def body(
    manifest: Manifest, results: tuple[Score, ...], image: str | None, repo_id: str | None
) -> list[str]:
    """All but the licence and what to cite."""
    return [
        *_what(manifest),
        *evaluations(results, title(manifest)),
        *_use(manifest, repo_id or title(manifest)),
        *_made(manifest),
        *heat_map(image),
        *checks(manifest.verification),
        *_reproduce(manifest),
    ]


def _what(manifest: Manifest) -> list[str]:
    if manifest.method != "expo":
        return [_merged(manifest), ""]
    aligned, sources = _aligned(manifest), manifest.sources
    names = " and ".join(map(source, aligned))
    change = "α·(θ_aligned − θ_sft)" if len(aligned) == 1 else "Σ αᵢ·(θᵢ − θ_sft)"
    start = "θ" if "onto" in sources else "θ_sft"
    onto = f", added to {source(sources['onto'])} (θ)" if "onto" in sources else ""
    return [
        f"{names}, moved further along the way on which alignment took it from {source(sources['sft'])}, its SFT "
        f"model{onto}. This is model extrapolation ({PAPER}): no training, no data, one formula over the weights.",
        "",
        f"    {start} + {change}",
        "",
        *_amount(manifest),
    ]


def _amount(manifest: Manifest) -> list[str]:
    if manifest.alpha is None:
        return ["α differs between tensors or models; the spec below says how.", ""]
    alpha, paper = f"{manifest.alpha:.12g}", f"{manifest.paper_alpha:.12g}"
    lines = [
        f"**α = {alpha}**, counted from the SFT model: 0 is the SFT model, 1 the aligned one. The paper and most "
        f"cards count from the aligned model and call the same **{paper}**.",
        "",
    ]
    if manifest.alpha > 1:
        lines += [
            "In the paper ExPO raises reward and win rates together with the length of the answers; exact tasks such "
            "as GSM8K can lose. Compare it with the aligned model on what you need it for.",
            "",
        ]
    return lines


def _merged(manifest: Manifest) -> str:
    names = ", ".join(map(source, manifest.sources.values()))
    if manifest.method == "passthrough" and manifest.edits:
        return f"{names} with only a part of some matrices kept."
    return f"A {code(manifest.method)} merge of {names}."


def _use(manifest: Manifest, name: str) -> list[str]:
    if not manifest.is_of_transformers:
        return []
    said = [entry.said.pipeline_tag for entry in manifest.sources.values() if entry.said]
    if any(tag not in (None, "text-generation") for tag in said):
        return []  # another class loads it, and which is not known here
    lines = ["## Use", ""]
    if manifest.donor is None:
        lines += ["Tokenizer and chat template were made by mergekit, as the spec asks.", ""]
    elif any(map(is_tokenizer_file, manifest.files)):
        lines += [
            f"Tokenizer, chat template and generation configuration are those of {code(manifest.donor)}, byte for "
            "byte. Use the template that comes with the tokenizer: other prompts cost quality.",
            "",
        ]
    # Nobody looked whether there is a template: nearly every aligned model has one.
    chats = manifest.example is not None or manifest.verification is None
    return lines + snippet(name, chats) + rendered(manifest.example)


def snippet(name: str, chats: bool, adapter: str | None = None) -> list[str]:
    """Python that loads the model and lets it speak; the sources of `name` and `adapter` are Hub ids or paths."""
    lines = [
        *(["from peft import PeftModel"] if adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{name}"',
        *([f'adapter = "{adapter}"'] if adapter else []),
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")',
        *(["model = PeftModel.from_pretrained(model, adapter)"] if adapter else []),
        "",
    ]
    if not chats:
        lines += [
            'inputs = tokenizer("The capital of Norway is", return_tensors="pt").to(model.device)'
        ]
    else:
        lines += [
            'messages = [{"role": "user", "content": "Why does the sky look blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    lines += [
        "output = model.generate(**inputs, max_new_tokens=512)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return [*block("\n".join(lines), "python"), ""]


def rendered(example: Example | None) -> list[str]:
    if example is None:
        return []
    turns = [f"{role}: {content}" for role, content in example.messages]
    return [
        "What the template makes of a short conversation, up to where the answer begins:",
        "",
        *block("\n".join(turns)),
        "",
        "becomes",
        "",
        *block(example.rendered),
        "",
    ]


def _made(manifest: Manifest) -> list[str]:
    return [
        "## How it was made",
        "",
        *table(("", "model", "commit"), (_source_row(*one) for one in manifest.sources.items())),
        "",
        *table(("", ""), _figures(manifest)),
        "",
        f"Every input, every figure (also tensor by tensor) and the SHA-256 of every file are in `{MANIFEST}`.",
        "",
    ]


def _source_row(role: str, entry: SourceEntry) -> tuple[str, str, str]:
    return "SFT" if role == "sft" else role, source(entry), source_revision(entry)


def _figures(manifest: Manifest) -> Iterator[tuple[str, str]]:
    if manifest.method == "expo":
        yield "asked for", both_conventions(manifest.alpha)
    if manifest.engine == "mergekit":
        yield "computed by", "mergekit, which says nothing about what rounding left of it"
    elif manifest.statistics.elements:
        yield from _measured(manifest)
    if manifest.noise is not None:
        many = " or more" if manifest.noise.ratio >= 100 else ""
        ratio = f"{number(manifest.noise.ratio, '.2g')}{many} times the change"
        yield (
            "noise of quantized inputs",
            f"about {ratio}, estimated from {manifest.noise.tensors} tensors",
        )
    dtypes = ", ".join(_DTYPES.get(dtype, dtype) for dtype in manifest.dtypes)
    if manifest.engine == "expo":
        how = (
            "to nearest" if manifest.rounding == "nearest" else f"at random (seed {manifest.seed})"
        )
        yield "weights", f"{dtypes}; computed in float32 and rounded once, {how}"
    else:
        yield "weights", dtypes
    if manifest.edits:
        yield "low-rank edits", _edits(manifest.edits)


def _measured(manifest: Manifest) -> Iterator[tuple[str, str]]:
    total = manifest.statistics
    is_expo = manifest.method == "expo"
    what = "effective alpha after rounding" if is_expo else "left of the change after rounding"
    left = number(total.effective_alpha) if is_expo else percent(total.effective_alpha)
    yield what, f"{left}, with rounding noise of {percent(total.rounding_noise)} of the increment"
    yield (
        "‖Δ‖ / ‖θ‖",
        f"{number(total.relative_delta, '.3g')}, RMS {number(total.delta_rms, '.2g')} per weight; "
        f"{percent(total.zero_share)} of Δ is exactly 0",
    )
    yield "weights that did not move", percent(total.unmoved_share)


def _edits(edits: tuple[EditReport, ...]) -> str:
    kinds = dict.fromkeys((edit.keep, edit.on == "result") for edit in edits)
    rules = ", ".join(
        f"{keep} of the {'weights' if is_result else 'change'}" for keep, is_result in kinds
    )
    ranks = sorted(edit.rank for edit in edits)
    matrices = len({edit.matrix for edit in edits})
    return f"{matrices} matrices, keep {rules}: ranks {ranks[0]} to {ranks[-1]} of up to {max(e.full_rank for e in edits)}"


def heat_map(image: str | None) -> list[str]:
    if image is None:
        return []
    return [
        f"![Relative change ‖Δ‖/‖θ‖ of every module in every layer]({image})",
        "",
        "Where the aligned model differs from the one before: the change of every module, layer by layer, that was "
        "extrapolated.",
        "",
    ]


def checks(verification: tuple[CheckResult, ...] | None) -> list[str]:
    """What `expo verify` found: how much passed, all else with its words."""
    lines = ["## Verification", ""]
    if verification is None:
        return [*lines, "Nobody ran `expo verify` on it when it was made.", ""]
    count = Counter(check.status for check in verification)
    rows = [("passed", f"{count['pass']} checks")]
    for status in ("error", "warning", "info"):
        for check in verification:
            if check.status == status:
                rows.append((f"{status}: {check.name}", check.message.replace("<", "&lt;")))
    if count["skipped"]:
        rows.append(("not applicable, or not run while it was made", f"{count['skipped']} checks"))
    return [
        *lines,
        *table(("`expo verify`", ""), rows),
        "",
        f"Each of them is in `{MANIFEST}`.",
        "",
    ]


def _reproduce(manifest: Manifest) -> list[str]:
    spec = {key: value for key, value in manifest.spec.items() if key != "verify"}
    if manifest.engine == "expo":
        spec = {k: v for k, v in spec.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
    written = to_yaml(pinned(spec, manifest.sources)).rstrip()
    command = shlex.join(["expo", "merge", "spec.yml", "out", *manifest.flags])
    same = (
        "The same bytes come out"
        if manifest.engine == "expo" and not manifest.edits
        else "It comes out again"
    )
    return [
        "## Reproduce",
        "",
        "`spec.yml`:",
        "",
        *block(written, "yaml"),
        "",
        *reproduced_by(command, manifest),
        "",
        f"{same}, with expo {visible(manifest.versions.get('expo', 'of a version unknown'))}.",
        "",
    ]


def reproduced_by(command: str, manifest: Manifest | AdapterManifest) -> list[str]:
    """The command, and which of its inputs are not for everybody to have."""
    own = [entry.model for entry in manifest.sources.values() if not entry.commit]
    own += [str(s.adapter) for s in manifest.sources.values() if s.adapter and not s.adapter_commit]
    lines = block(command, "bash")
    if own:
        names = ", ".join(map(code, dict.fromkeys(own)))
        lines += ["", f"{names}: local folders, which are not on the Hub under that name."]
    return lines


def pinned(spec: dict, sources: Mapping[str, SourceEntry]) -> dict:
    """A spec with every model of the Hub at the commit that was used."""
    by_label = {entry.label: reference(entry) for entry in sources.values()}

    def walk(item: object) -> object:
        match item:
            case str():
                return by_label.get(item, item)
            case list():
                return [walk(one) for one in item]
            case dict():
                return {key: walk(one) for key, one in item.items()}
            case _:
                return item

    return {key: walk(value) for key, value in spec.items()}


def reference(entry: SourceEntry) -> str:
    """What a user writes for a model at its commit."""
    base = f"{entry.model}@{entry.commit}" if entry.commit else entry.model
    if entry.adapter is None:
        return base
    commit = f"@{entry.adapter_commit}" if entry.adapter_commit else ""
    return f"{base}+{entry.adapter}{commit}"


def evaluations(results: tuple[Score, ...], own: str) -> list[str]:
    if not results:
        return []
    return ["## Evaluation", "", *results_table(results, own), ""]


def licence(manifest: Manifest | AdapterManifest, terms: Terms | None) -> list[str]:
    if terms is None:
        return []
    said = [f"{code(name)}: {key or 'names none'}" for name, key in parent_licences(manifest)]
    return [
        "## License",
        "",
        f"[{terms.name}]({terms.link}). The cards of the models that went in say: {'; '.join(said)}.",
        "",
        *[line for text in (*terms.built_with, *terms.notices) for line in (text, "")],
    ]


def citation(manifest: Manifest | AdapterManifest) -> list[str]:
    if isinstance(manifest, Manifest) and manifest.method != "expo":
        return []
    entry = """@inproceedings{zheng2025expo,
  title = {Model Extrapolation Expedites Alignment},
  author = {Zheng, Chujie and Wang, Ziqi and Ji, Heng and Huang, Minlie and Peng, Nanyun},
  booktitle = {Annual Meeting of the Association for Computational Linguistics (ACL)},
  year = {2025},
  url = {https://arxiv.org/abs/2404.16792}
}"""
    return ["## Citation", "", *block(entry, "bibtex"), ""]


def _aligned(manifest: Manifest) -> list[SourceEntry]:
    return [entry for role, entry in manifest.sources.items() if role.startswith("aligned")]


def short(entry: SourceEntry) -> str:
    """The last part of a name, as a title shows it: no character of Markdown or HTML is left in it."""
    name = (entry.adapter or entry.model).rpartition("/")[2]
    return (
        "".join(
            char for char in name if (char.isalnum() and visible(char) == char) or char in "-_. "
        )
        or "model"
    )
