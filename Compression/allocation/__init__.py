"""Allocations: how wide every layer becomes, for one total of multiply-accumulates.

    budget -> widths, one per channel group -> `Compression.selection` keeps the highest scores

All published recipes remove the same share of every layer. But a channel at 4 px costs next to
nothing and one at 256 px a great deal. An allocation is told the generator, its scores, and what
every choice of widths costs (`Problem`), and returns widths; `ALLOCATIONS` lists them all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from Compression.allocation.curves import CurveSettings, greedy, spectrum
from Compression.allocation.problem import AllocationSettings, Budget, Problem, Widths
from Compression.allocation.shape import PowerSettings, power, uniform
from Util.settings import Settings

__all__ = [
    "ALLOCATIONS",
    "BEST",
    "Allocation",
    "AllocationSettings",
    "Budget",
    "Problem",
    "Widths",
]


@dataclass(frozen=True)
class Allocation:
    """A way to choose widths.

    Attributes:
        function: `Problem` -> widths within its limits, one per channel group.
        description: one line for the command line's help.
        options: dataclass of its own settings, each a flag of prune.py; None where it has none.
        needs_parser: the content mask takes part.
        images: images that it looks at, by those settings and the number that scores take.
    """

    function: Callable[[Problem], Widths]
    description: str
    options: type[Settings] | None = None
    needs_parser: bool = False
    images: Callable[[Any, int], int] = lambda options, n_sample: 0


def _images(options: CurveSettings, n_sample: int) -> int:
    return n_sample * options.allocation_rounds


ALLOCATIONS = {
    "uniform": Allocation(uniform, "the same share of every layer, as published"),
    "power": Allocation(power, "a share that falls as a power of the side in px", PowerSettings),
    "greedy": Allocation(
        greedy, "least importance per multiply-accumulate goes first", CurveSettings, True, _images
    ),
    "spectrum": Allocation(
        spectrum,
        "least loss of what can be reconstructed per multiply-accumulate goes first",
        CurveSettings,
        True,
        _images,
    ),
}
BEST = "greedy"
"""What a budget takes without further word; doc/recipes.md has the figures."""
