"""Initialisations: what the pruned generator's weights are before it is retrained.

An initialisation changes the pruned generator in place. `INITIALISATIONS` lists them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from Compression.scores.sampling import Sampling
from Model.generator import Generator
from Util.settings import Settings


@dataclass(frozen=True)
class Initialisation:
    """A way to initialise the pruned generator.

    Attributes:
        function: (pruned generator, full generator, keep masks, sampling) -> changes the first.
        description: one line for the command line's help.
        options: dataclass of its own settings, each a flag of prune.py; None where it has none.
    """

    function: Callable[[Generator, Generator, Sequence[Tensor], Sampling], None]
    description: str
    options: type[Settings] | None = None


def pruned(pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling) -> None:
    """Leave the weights that surgery kept as they are (Liu et al., 2021)."""


INITIALISATIONS = {
    "pruned": Initialisation(pruned, "the kept weights as they are"),
}
