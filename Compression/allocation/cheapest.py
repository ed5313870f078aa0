"""Widths by least loss per multiply-accumulate saved.

Given what a loss L_g(c) grows to when group g is narrowed to c channels, all groups start at their
full width, and the step from c to the next lower width c' with the least

    (L_g(c') - L_g(c)) / (cost(now) - cost(after))

is taken until all limits are kept. The cost is that at the widths of the moment, in
multiply-accumulates, or in parameters once only their cap is exceeded. What is left of the budget
then goes to the steps back that gain most for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from Compression.allocation.problem import Budget, Widths

Losses = Sequence[Tensor]
"""Per channel group the loss (C + 1,) with 0 to C channels left; only differences matter."""


def by_resolution(full: Sequence[int]) -> list[tuple[int, ...]]:
    """Tie the two groups of a resolution that are equally wide in the full generator."""
    pairs = [(i, i + 1) for i in range(0, len(full), 2)]
    return [
        unit
        for first, second in pairs
        for unit in ([(first, second)] if full[first] == full[second] else [(first,), (second,)])
    ]


@dataclass
class _Unit:
    """Channel groups that keep one width; the rungs of their ladder, and the loss on each."""

    groups: tuple[int, ...]
    rungs: list[int]
    loss: list[float]
    at: int


def cheapest_first(
    budget: Budget, losses: Losses, units: Sequence[tuple[int, ...]] | None = None
) -> Widths:
    """Find widths, see the module.

    Args:
        budget: that the least widths keep.
        losses: see `Losses`.
        units: groups that keep one width together; None ties none.

    Raises:
        ValueError: the least widths exceed the limits.
    """
    full = budget.full
    made = []
    for groups in units or [(i,) for i in range(len(full))]:
        rungs = budget.ladder(full[groups[0]])
        loss = [sum(losses[g][width].item() for g in groups) for width in rungs]
        made.append(_Unit(groups, rungs, loss, len(rungs) - 1))
    widths = list(full)
    while not budget.fits(widths):
        if not _step(budget, made, widths, down=True):
            raise ValueError(f"the least widths {budget.floor} exceed the budget or a cap")
    while _step(budget, made, widths, down=False):
        pass
    return tuple(widths)


def _step(budget: Budget, units: Sequence[_Unit], widths: list[int], down: bool) -> bool:
    """Take the best step down, or up within the limits; False if there is none."""
    best: tuple[float, _Unit, list[int]] | None = None
    cost = budget.binding(widths)
    for unit in units:
        to = unit.at + (-1 if down else 1)
        if not 0 <= to < len(unit.rungs):
            continue
        after = list(widths)
        for group in unit.groups:
            after[group] = unit.rungs[to]
        if not down and not budget.fits(after):
            continue
        price = (unit.loss[to] - unit.loss[unit.at]) / abs(cost(widths) - cost(after))
        if best is None or price < best[0]:
            best = price, unit, after
    if best is None:
        return False
    best[1].at += -1 if down else 1
    widths[:] = best[2]
    return True
