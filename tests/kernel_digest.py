"""Run every kernel on fixed inputs; print as JSON a digest of each one's outputs and sums, and how many
vector multiplications and fused multiply-adds there are in the machine code of all of them.

    NUMBA_CPU_NAME=x86-64 NUMBA_CPU_FEATURES= NUMBA_CACHE_DIR=… python -m tests.kernel_digest [few]
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable

import numpy as np

from expo.compute import decode, kernels, masks, measures, mixing
from expo.compute.masks import Mask

COUNT = 20_011
MODULES = (decode, kernels, masks, measures, mixing)
DRAWS = kernels.draws(1, "a.weight", 3)

values = (np.random.default_rng(0).standard_normal((6, COUNT)) * 0.02).astype(np.float32)
bits = values.view(np.uint32) >> 16
brain, half = bits.astype(np.uint16), values.astype(np.float16).view(np.int16)
single, out16 = np.empty(COUNT, np.float32), np.empty(COUNT, np.uint16)
delta = np.asarray(values[0] - values[1])


def extrapolate(stored: np.ndarray, drawn: kernels.Draws | None) -> list:
    out = np.empty_like(stored[0])
    return [kernels.extrapolate(stored[0], stored[1], 1.3, out=out, draws=drawn), out]


def finish() -> list:
    a, b, c, d = values[:4]
    return [kernels.finish(a, b, delta=c, still=d, out=out16, draws=None), out16]


def prepared() -> tuple[Mask, Mask]:
    ranked = masks.ranked_mask(delta, COUNT, drawn=DRAWS, density=0.4, epsilon=0.1)
    return masks.magnitude_mask(delta, 0.4), ranked


def prepare() -> list:
    limited, ranked = prepared()
    return [limited.lower, ranked.bits, masks.magnitude_sums(delta, limited, begin=3)]


def add_terms() -> list:
    limited, ranked = prepared()
    each = masks.masks([limited, ranked, masks.random_mask(DRAWS, 0.4), Mask()])
    mixing.add_terms(
        values[0], values[1], values[2:], [0.3, 0.4, 0.5, 0.6], each, begin=8, elect_sign=True,
        normalize=True, scale=0.9, exact_out=single, delta_out=None,
    )  # fmt: skip
    return [single]


def decoded() -> list:
    """Codes of both formats, from an element in the midst of a matrix on."""
    codes, scales = np.resize(np.arange(256, dtype=np.uint8), COUNT), np.abs(values[4]) + 1
    eight, four = np.empty((2, COUNT), np.float32)
    decode.fp8(codes, scales, 77, 100, 203, (16, 24), out=eight)
    decode.mxfp4(codes, scales, 77, 100, 320, out=four)
    return [np.nan_to_num(eight), four]


FEW: dict[str, Callable[[], list]] = {
    "bfloat16, nearest": lambda: extrapolate(brain, None),
}
ALL: dict[str, Callable[[], list]] = FEW | {
    "bfloat16, stochastic": lambda: extrapolate(brain, DRAWS),
    "float16, nearest": lambda: extrapolate(half, None),
    "float16, stochastic": lambda: extrapolate(half, DRAWS),
    "codes": decoded,
    "finish": finish,
    "compare": lambda: [kernels.compare(brain[0], brain[1])],
    "masks": prepare,
    "add_terms": add_terms,
    "arc_sums": lambda: [measures.arc_sums(brain[0], brain[1])],
    "squares": lambda: [measures.ulp_square_sum(delta, "BF16")],
}


def digest(results: list) -> str:
    parts = [r.tobytes() if isinstance(r, np.ndarray) else repr(r).encode() for r in results]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def instructions(pattern: str) -> int:
    found = {name: value for module in MODULES for name, value in vars(module).items()}
    compiled = [value for value in found.values() if hasattr(value, "inspect_asm")]
    code = [text for kernel in compiled for text in kernel.inspect_asm().values()]
    return sum(len(re.findall(pattern, text)) for text in code)


if __name__ == "__main__":
    chosen = FEW if sys.argv[1:] == ["few"] else ALL
    said = {
        "digests": {name: digest(run()) for name, run in chosen.items()},
        "multiplications": instructions(r"\bv?mulps\b"),
        "fused": instructions(r"\bvfn?m(?:add|sub)"),
        "modules": [name for name in ("torch", "scipy.linalg") if name in sys.modules],
    }
    print(json.dumps(said))
