"""What lies beside a model for its visitors: README, heat map, results, notices. Written when it is asked
for, and again at any time: no loader reads any of it."""

import hashlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from expo.checkpoint.sidecars import CARD, NOTICE
from expo.errors import CheckpointError
from expo.output.durable import place_file
from expo.output.manifest import AdapterManifest, Manifest
from expo.planning.modules import module_of
from expo.plots.heatmap import Cells, change_map, png
from expo.publishing.card import card, renewed
from expo.publishing.evaluations import eval_results
from expo.publishing.licences import Terms
from expo.publishing.sections import title
from expo.results import Score

HEAT_MAP = "expo-heatmap.png"


def presented(
    folder: Path,
    manifest: Manifest | AdapterManifest,
    *,
    terms: Terms | None = None,
    results: Sequence[Score] = (),
    repo_id: str | None = None,
) -> dict[str, bytes]:
    """README.md, the heat map (where matplotlib is installed), `.eval_results/` and the notices that `terms` ask
    for, by name. A README in `folder` that is not as expo wrote it is renewed. Writes nothing.

    Raises:
        CheckpointError: the README there is no text, or its front matter is none.
    """
    changes = cells(manifest)
    image = HEAT_MAP if changes and find_spec("matplotlib") else None
    text = card(manifest, terms=terms, results=results, image=image, repo_id=repo_id)
    files = {CARD: on_top_of(folder, manifest, text)} | eval_results(tuple(results))
    contents = {name: text.encode() for name, text in files.items()}
    if terms is not None and (notices := _missing_notices(folder, terms)):
        contents[NOTICE] = notices
    if image is not None:
        contents[image] = png(change_map(changes, pair(manifest)))
    return dict(sorted(contents.items()))


def present(folder: Path, contents: dict[str, bytes]) -> tuple[str, ...]:
    """Write what `presented` made into `folder`; their names.

    Raises:
        OutputError: a file cannot be written.
    """
    for name, content in contents.items():
        place_file(folder / name, content)
    return tuple(contents)


def on_top_of(folder: Path, manifest: Manifest | AdapterManifest, text: str) -> str:
    """The card as the folder's README gets it: what a person wrote into that stays."""
    try:
        existing = (folder / CARD).read_bytes()
    except FileNotFoundError:
        return text
    if hashlib.sha256(existing).hexdigest() == manifest.listed.get(CARD):
        return text
    try:
        return renewed(existing.decode(), text)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder / CARD} is not text in UTF-8: mend or remove it") from error


def cells(manifest: Manifest | AdapterManifest) -> Cells:
    """‖Δ‖/‖θ‖ by (layer, module), of the tensors that changed; empty where nothing is known of any."""
    if isinstance(manifest, AdapterManifest):
        return {module_of(m.module): m.relative_delta for m in manifest.modules}
    squares: dict[tuple[int | None, str], tuple[float, float]] = {}
    for name, tensor in manifest.tensors.items():
        if tensor.relative_delta:
            delta, base = squares.get(module_of(name), (0.0, 0.0))
            more = tensor.delta_norm**2
            squares[module_of(name)] = (delta + more, base + more / tensor.relative_delta**2)
    return {key: math.sqrt(delta / base) for key, (delta, base) in squares.items()}


def pair(manifest: Manifest | AdapterManifest) -> str:
    """The models that the change lies between, for the title of the heat map."""
    sources = manifest.sources
    if "sft" not in sources:
        return title(manifest) if isinstance(manifest, Manifest) else ""
    aligned = [entry.label for role, entry in sources.items() if role.startswith("aligned")]
    return f"{sources['sft'].label} → {', '.join(aligned)}"


def _missing_notices(folder: Path, terms: Terms) -> bytes:
    """The NOTICE file with the lines that it lacks; empty where it lacks none."""
    texts = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.lower().startswith("notice")
    }
    said = b"\n".join(texts.values())
    missing = [line for line in terms.notices if line.encode() not in said]
    existing = texts.get(NOTICE, b"")
    end = b"" if existing.endswith(b"\n") or not existing else b"\n"
    return existing + end + "".join(f"{line}\n" for line in missing).encode() if missing else b""
