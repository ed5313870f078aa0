"""Allocations by what narrowing a layer loses: `greedy` and `spectrum`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from Compression.allocation.cheapest import by_resolution, cheapest_first
from Compression.allocation.losses import importance_losses, spectrum_losses
from Compression.allocation.problem import Budget, Problem, Widths
from Compression.scores.sampling import Sampling
from Compression.selection import select_widths
from Compression.surgery import prune_generator
from Model.generator import Generator
from Util.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class CurveSettings(Settings):
    """Settings of `greedy` and `spectrum`."""

    allocation_tie: bool = setting(True, "one width for both layers of a resolution")
    allocation_rounds: int = setting(
        1, "narrow in so many rounds and look again after each, at least 1", low=1, metavar="N"
    )


def greedy(problem: Problem) -> Widths:
    """Take away least importance per cost first."""
    return _in_rounds(problem, importance_losses)


def spectrum(problem: Problem) -> Widths:
    """Take away least spectrum per cost first."""
    return _in_rounds(problem, spectrum_losses)


def _in_rounds(problem: Problem, losses: Callable[[Generator, Sampling], list[Tensor]]) -> Widths:
    """Spend the budget by losses, which are computed anew on the way down to it."""
    options, end = problem.sampling.options, problem.budget
    start = end.macs(end.full)

    def widths(stage: Problem, budget: Budget) -> Widths:
        units = by_resolution(budget.full) if options.allocation_tie else None
        return cheapest_first(budget, losses(stage.generator, stage.sampling), units)

    for i in range(1, options.allocation_rounds):
        most = int(start * (end.most_macs / start) ** (i / options.allocation_rounds))
        limits = replace(end.limits, max_parameters=None)
        on_the_way = replace(problem.budget, most_macs=most, limits=limits)
        keep = select_widths(problem.scores, widths(problem, on_the_way))
        scores = [values[mask] for values, mask in zip(problem.scores, keep, strict=True)]
        problem = problem.of(prune_generator(problem.generator, keep), scores)
    return widths(problem, problem.budget)
