"""What the noise of quantized inputs means for a merge: said always, warned of from a ratio on, refused from another."""

from collections.abc import Iterator

from expo.results import CodingNoise

WARNED, REFUSED = 2.0, 5.0
"""Noise over change: pairs in bfloat16 that were published as ExPO models have up to about 3.2, FP8 pairs of the size
of a DPO run 13.5."""


def noise_note(noise: CodingNoise) -> str:
    what = "a tensor" if noise.tensors == 1 else f"{noise.tensors} tensors"
    how = f"noise of {_times(noise)} the change" if noise.ratio else "no noise in the change"
    return f"the codes of quantized inputs leave {how}, by a sample of {what}"


def noise_warning(noise: CodingNoise) -> Iterator[str]:
    if noise.ratio > WARNED:
        yield (
            f"what SFT and aligned differ by is mostly noise of their codes ({_times(noise)} the change): name the "
            "unquantized originals where there are any"
        )


def noise_refusal(
    noise: CodingNoise | None, alphas: tuple[float, ...], *, force: bool
) -> tuple[str, ...]:
    """The refusal, if there is one.

    Args:
        alphas: of all tensors that are blended from codes.
    """
    beyond = any(not 0.0 <= alpha <= 1.0 for alpha in alphas)
    if noise is None or force or not beyond or noise.ratio <= REFUSED:
        return ()
    return (
        f"the codes of the quantized inputs leave noise of {_times(noise)} the change, and extrapolating multiplies it "
        f"too: more than {REFUSED:g} times is refused; name the unquantized originals, or go on with --force (force: true)",
    )


def _times(noise: CodingNoise) -> str:
    more = "100 or more" if noise.ratio >= 100 else f"about {noise.ratio:.2g}"
    return f"{more} times"
