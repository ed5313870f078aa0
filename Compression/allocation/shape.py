"""Widths by the shape of the generator alone: no picture is made.

    c_g = least allowed width of at least  kappa * C_g * (4 / side_g)^exponent,  at most C_g

for a group of C_g channels at side_g px, with the largest kappa that keeps the limits. **uniform**
is exponent 0, the same share everywhere: for the remove ratio r = 1 - kappa, C - int(C r) of C.

**power** has a reason: let a resolution of width c lose a / c^p, and cost b c^2 with b ~ side^2, as
convolutions do. The least total loss at a fixed total cost then has c ~ side^(-2 / (2 + p)).
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from Compression.allocation.problem import Budget, Problem, Widths
from Util.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class PowerSettings(Settings):
    """Settings of `power`."""

    power_exponent: float = setting(
        0.5, "of the side in px by which the kept share of a layer falls, at least 0", low=0, high=8
    )


def uniform(problem: Problem) -> Widths:
    """Keep the same share everywhere."""
    return _proportional(problem.budget, 0.0)


def power(problem: Problem) -> Widths:
    """Keep a share that falls with resolution."""
    return _proportional(problem.budget, problem.sampling.options.power_exponent)


def _proportional(budget: Budget, exponent: float) -> Widths:
    full = budget.full
    falls = [2.0 ** (-exponent * (group // 2)) for group in range(len(full))]
    ladders = [budget.ladder(width) for width in full]

    def widths(kappa: float) -> Widths:
        # A hair less, so that a width that is reached exactly is not passed by rounding.
        bounds = (kappa * c * fall * (1 - 1e-9) for c, fall in zip(full, falls, strict=True))
        pairs = zip(ladders, bounds, strict=True)
        return tuple(rungs[min(bisect_left(rungs, b), len(rungs) - 1)] for rungs, b in pairs)

    groups = zip(ladders, full, falls, strict=True)
    kappas = sorted({rung / (c * fall) for rungs, c, fall in groups for rung in rungs})
    fitting = bisect_right(kappas, False, key=lambda k: not budget.fits(widths(k)))
    if not fitting:
        raise ValueError(f"the least widths {budget.floor} exceed the budget or a cap")
    return widths(kappas[fitting - 1])
