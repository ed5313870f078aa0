"""Initialisations: what the pruned generator's weights are before it is retrained.

An initialisation changes the pruned generator in place. `INITIALISATIONS` lists them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from Compression.initialisation.reconstruction import ReconstructionSettings, reconstruction
from Compression.initialisation.simple import mapping_only, pruned, scratch
from Compression.initialisation.svs import rescaled, svs
from Compression.scores.sampling import Sampling
from Model.generator import Generator
from Util.settings import Settings

__all__ = ["INITIALISATIONS", "Initialisation"]


@dataclass(frozen=True)
class Initialisation:
    """A way to initialise the pruned generator.

    Attributes:
        function: (pruned generator, full generator, keep masks, sampling) -> changes the first;
            may return lines that report on it.
        description: one line for the command line's help.
        options: dataclass of its own settings, each a flag of prune.py; None where it has none.
        needs_parser: whether the content mask takes part, by those settings.
    """

    function: Callable[[Generator, Generator, Sequence[Tensor], Sampling], Sequence[str] | None]
    description: str
    options: type[Settings] | None = None
    needs_parser: Callable[[Any], bool] = lambda options: False


INITIALISATIONS = {
    "pruned": Initialisation(pruned, "the kept weights as they are"),
    "reconstruction": Initialisation(
        reconstruction,
        "the kept filters fitted to the full generator inside the content",
        ReconstructionSettings,
        needs_parser=lambda options: options.init_outside < 1,
    ),
    "svs": Initialisation(svs, "the kept weights with the roots of their singular values"),
    "rescaled": Initialisation(rescaled, "the kept weights with the norms of svs, its control"),
    "mapping_only": Initialisation(mapping_only, "the full mapping network, random synthesis"),
    "scratch": Initialisation(scratch, "random weights"),
}
