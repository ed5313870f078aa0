"""Initialisations that keep the weights or draw them anew."""

from collections.abc import Sequence

from torch import Tensor

from Compression.scores.sampling import INITIALISATION, Sampling
from Model.generator import Generator
from Util.streams import seeded


def pruned(pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling) -> None:
    """Leave the weights that surgery kept as they are (Liu et al., CVPR 2021)."""


def mapping_only(
    pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling
) -> None:
    """Keep the mapping network, draw the synthesis network anew (Xu et al., ECCV 2022)."""
    kept = {name: value.clone() for name, value in pruned.style.state_dict().items()}
    scratch(pruned, full, keep, sampling)
    pruned.style.load_state_dict(kept)


def scratch(pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling) -> None:
    """Draw every weight anew from the seed; the stored noise maps stay."""
    with seeded(sampling.stream(INITIALISATION).initial_seed()):
        drawn = pruned.like(pruned.channels)
    drawn.noises.load_state_dict(pruned.noises.state_dict())
    pruned.load_state_dict(drawn.state_dict())
