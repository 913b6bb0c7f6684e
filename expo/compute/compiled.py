"""The arithmetic of blocks by compiled kernels: one pass, no torch, the same bits as its operators."""

from collections.abc import Mapping, Sequence

import numpy as np

from expo.compute import decode, kernels, masks, measures, mixing
from expo.compute.arithmetic import Coded, Done, Draws, Stored
from expo.operators.methods import Array, Block, Mask, Sparsifier

_ALL = masks.Mask()


class Compiled:
    """`Arithmetic` of float32, bfloat16 and float16."""

    def widen(self, stored: Stored, out: Array) -> None:
        kernels.widen(_view(stored), out)

    def decode(self, coded: Coded, first: int, out: Array) -> None:
        codes = coded.codes
        if codes.format == "fp8":
            decode.fp8(
                coded.data, coded.scales, first, codes.rows, codes.columns, codes.block, out=out
            )
        else:
            decode.mxfp4(coded.data, coded.scales, first, codes.rows, codes.columns, out=out)

    def extrapolate(
        self, base: Stored, aligned: Stored, alpha: float, out: Stored, draws: Draws | None
    ) -> Done:
        sides = _view(base), _view(aligned)
        return kernels.extrapolate(*sides, alpha, out=_view(out), draws=_draws(draws))

    def finish(
        self,
        exact: Array,
        start: Array,
        delta: Array,
        still: Array,
        out: Stored,
        draws: Draws | None,
    ) -> Done:
        to = {"out": _view(out), "draws": _draws(draws)}
        return kernels.finish(exact, start, delta=delta, still=still, **to)

    def store(self, exact: Array, out: Stored, draws: Draws | None) -> bool:
        return kernels.store(exact, _view(out), draws=_draws(draws))

    def compare(self, base: Stored, aligned: Stored) -> Done:
        return kernels.compare(_view(base), _view(aligned))

    def dots(self, a: Array, b: Array) -> tuple[float, float, float]:
        return measures.arc_sums(a, b)

    def add_terms(self, block: Block, weights: Sequence[float]) -> Array:
        exact = np.empty_like(block.start)
        each = [_compiled_mask(mask) for mask in block.masks or [None] * len(weights)]
        mixing.add_terms(
            block.start,
            np.zeros_like(block.start) if block.base is None else block.base,
            np.stack(block.thetas),
            weights,
            masks.masks(each),
            begin=block.begin,
            elect_sign=block.elects_sign,
            normalize=bool(block.shared.get("normalize")),
            scale=block.shared.get("lambda", 1.0),
            exact_out=exact,
            delta_out=None,
        )
        return exact

    def ulp_square_sum(self, values: Array, dtype: str) -> float:
        return measures.ulp_square_sum(values, dtype)

    def mask(
        self,
        sparsifier: Sparsifier,
        delta: Array,
        shape: tuple[int, ...],
        values: Mapping[str, float],
        draws: Draws,
        *,
        rescale: bool,
    ) -> Mask:
        density, drawn = values["density"], kernels.draws(*draws)
        match sparsifier:
            case "magnitude":
                mask = masks.magnitude_mask(delta, density)
            case "outliers":
                mask = masks.outlier_mask(delta, density, values["gamma"])
            case "random":
                mask = masks.random_mask(drawn, density)
            case "ranked":
                width = shape[-1] if len(shape) > 1 else delta.size
                mask = masks.ranked_mask(
                    delta, width, drawn=drawn, density=density, epsilon=values["epsilon"]
                )
        if not rescale:
            return mask
        return mask._replace(ratio=masks.norm_ratio(*masks.magnitude_sums(delta, mask, begin=0)))


def _compiled_mask(mask: Mask | None) -> masks.Mask:
    assert mask is None or isinstance(
        mask, masks.Mask
    )  # another arithmetic's would be lost in silence
    return _ALL if mask is None else mask


def _view(stored: Stored) -> kernels.Stored:
    return kernels.stored(stored.data, stored.dtype)


def _draws(draws: Draws | None) -> kernels.Draws | None:
    return None if draws is None else kernels.draws(*draws)
