"""What a merge takes on many nodes: arithmetic from rates that were measured on one.

    python -m benchmarks.scaling

Prints the table of docs/scaling.md. What stands in capitals was measured (docs/performance.md) or is an assumption,
as its comment says.
"""

import math
from dataclasses import dataclass

CORE_SECONDS = {
    "bfloat16": 3.0,
    "FP8": 4.4,
}  # measured: of a core, for 1e9 elements, SHA-256 of the output included
START_SECONDS = 1.0  # measured: a process
SHARD_SECONDS = (
    0.04  # measured: what every shard costs beside its bytes, where it is computed by itself
)
NODE_CORES = 16  # assumed
NODE_BYTES = 2e9  # assumed: what one node reads and writes of a shared filesystem, a second
ALL_BYTES = 40e9  # assumed: what all nodes together do


@dataclass(frozen=True)
class Model:
    """A pair; what is read and written of an element, in bytes. Plan and end are measured, or those of a 7 B model."""

    name: str
    stored: str
    elements: float
    shards: int
    element_bytes: int
    plan_seconds: float
    end_seconds: float


MODELS = (
    Model("70 B", "bfloat16", 70.6e9, 30, 6, 0.3, 6),
    Model("671 B", "bfloat16", 671e9, 163, 6, 3.8, 14),
    Model("671 B", "FP8", 671e9, 163, 4, 5.6, 14),
)
NODES = (1, 8, 64)


def seconds(model: Model, nodes: int) -> dict[str, float]:
    """By what bounds it: every node computes one shard after the other, in as many rounds as it takes."""
    rounds, active = math.ceil(model.shards / nodes), min(nodes, model.shards)
    disk = model.elements * model.element_bytes / model.shards / min(NODE_BYTES, ALL_BYTES / active)
    cores = model.elements / 1e9 / model.shards * CORE_SECONDS[model.stored] / NODE_CORES
    each = START_SECONDS + model.plan_seconds + model.end_seconds
    return {
        "disk": rounds * disk,
        "cores": rounds * cores,
        "whole": each + rounds * (max(disk, cores) + SHARD_SECONDS),
    }


def table() -> str:
    """The table, as Markdown."""
    lines = [
        "| model, stored as | nodes | shards a node | disk, s | cores, s | whole |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for nodes in NODES:
            found = seconds(model, nodes)
            whole = found["whole"]
            shown = f"{whole / 60:.1f} min" if whole > 100 else f"{whole:.0f} s"
            lines.append(
                f"| {model.name}, {model.stored} | {nodes} | {math.ceil(model.shards / nodes)} "
                f"| {found['disk']:.0f} | {found['cores']:.0f} | {shown} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
