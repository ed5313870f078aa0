"""Channel scores: how much each channel of a generator matters.

A score turns a generator into one 1-D tensor per channel group (`Generator.channels`); higher
means more important. `SCORES` lists them all. Choosing channels by the scores is the work of
`Compression.selection`, building the smaller generator that of `Compression.surgery`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from Compression.scores.activations import asv, l1_map, l1_norm_asv, l2_norm_asv
from Compression.scores.content_aware import (
    EmptyContentError,
    content_aware,
    salt_and_pepper,
    weight_gradient_score,
)
from Compression.scores.covariance import subset
from Compression.scores.diversity_aware import DiversitySettings, diversity_aware
from Compression.scores.sampling import CHANCE, Sampling, Scores, draw_sampling
from Compression.scores.weights import l1_in, l1_out, l1_style
from Model.generator import Generator
from Util.settings import Settings

__all__ = [
    "SCORES",
    "EmptyContentError",
    "Score",
    "Scores",
    "channel_scores",
    "salt_and_pepper",
    "weight_gradient_score",
]


def chance(generator: Generator, sampling: Sampling) -> Scores:
    """Random numbers: the baseline that any other metric should beat."""
    stream = sampling.stream(CHANCE)
    sampling.progress(len(sampling.latents))
    return [torch.rand(width, generator=stream) for width in generator.channels]


@dataclass(frozen=True)
class Score:
    """A way to score channels.

    Attributes:
        function: computes the scores.
        description: one line for the command line's help.
        needs_parser: the content mask takes part.
        options: dataclass of the score's own settings (`Util.settings.setting`), each a flag of
            prune.py; None where it has none.
    """

    function: Callable[[Generator, Sampling], Scores]
    description: str
    needs_parser: bool = False
    options: type[Settings] | None = None

    def compute(self, generator: Generator, sampling: Sampling) -> Scores:
        """The scores on the CPU; options that the sampling lacks take their defaults."""
        if sampling.options is None and self.options is not None:
            sampling = replace(sampling, options=self.options())
        return [values.detach().cpu() for values in self.function(generator, sampling)]


SCORES = {
    "content_aware": Score(
        content_aware, "weight gradient of a distance inside the content mask", needs_parser=True
    ),
    "diversity_aware": Score(
        diversity_aware,
        "variance over latent directions of the weight gradient (DCP)",
        options=DiversitySettings,
    ),
    "subset": Score(
        subset, "how early the channel is chosen to reconstruct the others from", needs_parser=True
    ),
    "l1_out": Score(l1_out, "L1 norm of the mean modulated weights that read the channel"),
    "l1_in": Score(l1_in, "L1 norm of the mean modulated weights that make the channel"),
    "l1_style": Score(l1_style, "absolute value of the channel's mean style"),
    "asv": Score(
        asv,
        "standard deviation of the activation over images, mean over pixels; 0 for the constant",
    ),
    "l1_norm_asv": Score(l1_norm_asv, "asv divided by the mean absolute activation"),
    "l2_norm_asv": Score(l2_norm_asv, "asv divided by the L2 norm of the activation"),
    "l1_map": Score(l1_map, "mean absolute activation"),
    "random": Score(chance, "random numbers, the baseline"),
}


def channel_scores(generator: Generator, metric: str = "content_aware", **how: Any) -> Scores:
    """Score every channel of a generator.

    Exactly ``n_sample`` images (or latents) take part; the last batch may be smaller. The generator
    comes back as it was, gradients included. Only `content_aware` and
    `diversity_aware` depend on ``batch_size``.

    Args:
        generator: the full network; scored on its device.
        metric: a key of `SCORES`.
        how: parser, n_sample, batch_size, noise_prob, seed, latents, progress, options: see
            `Compression.scores.sampling.draw_sampling`. `content_aware` needs a parser.

    Returns:
        One 1-D CPU tensor per channel group, higher is more important.

    Raises:
        ValueError: unknown metric, a number out of range, or no parser for `content_aware`.
        EmptyContentError: no content in any image.
    """
    if metric not in SCORES:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join(SCORES)}")
    return SCORES[metric].compute(generator, draw_sampling(generator, **how))
