"""How much of a matrix to keep: the rules by their names."""

from dataclasses import dataclass
from typing import Literal

from expo.errors import SpecError

Rule = Literal["mp", "gd", "laser_rmt", "rank", "rho", "energy", "shrink"]

RULES = "mp, gd, laser_rmt, rank=R, rho=X, energy=E, shrink=frobenius or shrink=operator"

_BY_NOISE = ("mp", "gd", "laser_rmt")
_NORMS = ("frobenius", "operator")


@dataclass(frozen=True)
class Keep:
    """A rule: `mp` above the Marchenko–Pastur edge, `gd` above Gavish and Donoho's threshold,
    `laser_rmt` above that of the published code, `rank` and LASER's `rho` a rank whatever the values,
    `energy` a share of ΣS², `shrink` above the edge, shrunk so that the error is smallest.

    `amount` is the rank or the share, `norm` the one in which the error is measured.
    """

    rule: Rule
    amount: float = 0.0
    norm: str = ""

    def __str__(self) -> str:
        given = self.norm or (f"{self.amount:.12g}" if self.amount else "")
        return f"{self.rule}={given}" if given else self.rule

    @property
    def is_automatic(self) -> bool:
        """Whether the matrix's own noise decides what goes."""
        return self.rule in (*_BY_NOISE, "shrink")


def parse_keep(text: str) -> Keep:
    """`gd`, `rank=64`, `shrink=frobenius`, …

    Raises:
        SpecError: the text is no rule.
    """
    rule, _, given = text.partition("=")
    if rule in _BY_NOISE and not given:
        return Keep(rule)  # type: ignore[arg-type]
    if rule == "shrink" and given in _NORMS:
        return Keep(rule, norm=given)
    if rule in ("rank", "rho", "energy"):
        try:
            amount = float(given)
        except ValueError:
            amount = -1.0
        if amount > 0 and (amount.is_integer() if rule == "rank" else amount <= 1):
            return Keep(rule, amount)  # type: ignore[arg-type]
        wanted = "a whole number above 0" if rule == "rank" else "a share above 0 and up to 1"
        raise SpecError(f"keep {text}: {rule} takes {wanted}")
    raise SpecError(f"keep {text}: not a rule: {RULES}")
