"""Channel scores: how much each channel of a generator matters.

A score turns a generator into one 1-D tensor per channel group (`Generator.channels`); higher
means more important. `SCORES` lists them all. Choosing channels by the scores is the work of
`Compression.selection`, building the smaller generator that of `Compression.surgery`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from Compression.scores.activations import asv, l1_map, l1_norm_asv, l2_norm_asv
from Compression.scores.content_aware import (
    EmptyContentError,
    content_aware,
    salt_and_pepper,
    weight_gradient_score,
)
from Compression.scores.sampling import CHANCE, LATENTS, ContentMask, Sampling, Scores
from Compression.scores.weights import l1_in, l1_out, l1_style
from Model.generator import Generator
from Util.streams import stream

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
    options: type | None = None


SCORES = {
    "content_aware": Score(
        content_aware, "weight gradient of a distance inside the content mask", needs_parser=True
    ),
    "l1_out": Score(l1_out, "L1 norm of the mean modulated weights that read the channel"),
    "l1_in": Score(l1_in, "L1 norm of the mean modulated weights that make the channel"),
    "l1_style": Score(l1_style, "absolute value of the channel's mean style"),
    "asv": Score(asv, "standard deviation of the activation over images, mean over pixels"),
    "l1_norm_asv": Score(l1_norm_asv, "asv divided by the mean absolute activation"),
    "l2_norm_asv": Score(l2_norm_asv, "asv divided by the L2 norm of the activation"),
    "l1_map": Score(l1_map, "mean absolute activation"),
    "random": Score(chance, "random numbers, the baseline"),
}


def channel_scores(
    generator: Generator,
    metric: str = "content_aware",
    *,
    parser: ContentMask | None = None,
    n_sample: int = 400,
    batch_size: int = 10,
    noise_prob: float = 0.05,
    seed: int = 0,
    latents: Tensor | None = None,
    progress: Callable[[int], None] = lambda images: None,
    options: Any = None,
) -> Scores:
    """Score every channel of a generator.

    Exactly ``n_sample`` images (or latents) take part; the last batch may be smaller. The generator
    comes back as it was, gradients included. Only `content_aware` depends on ``batch_size``.

    Args:
        generator: the full network; scored on its device.
        metric: a key of `SCORES`.
        parser: images (N, 3, H, W) in [-1, 1] -> content mask (N, 1, H, W), such as a
            `Compression.content.ContentParser`; needed by `content_aware` alone.
        n_sample: images, >= 1.
        batch_size: images per batch, >= 1. How many are in memory at a time follows from their
            size and not from this.
        noise_prob: probability that a content pixel is noised, in (0, 1].
        seed: seed of latents, layer noise and pixel noise, >= 0.
        latents: z to use instead of ``n_sample`` drawn ones, (n, style_dim).
        progress: called with the number of images done since the last call.
        options: the score's own settings; None takes their defaults.

    Returns:
        One 1-D CPU tensor per channel group, higher is more important.

    Raises:
        ValueError: unknown metric, a number out of range, or no parser for `content_aware`.
        EmptyContentError: no content in any image.
    """
    if metric not in SCORES:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join(SCORES)}")
    for name, value, low in (
        ("n_sample", n_sample, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < low:
            raise ValueError(f"{name} is {value}; it must be at least {low}")
    if not 0 < noise_prob <= 1:
        raise ValueError(f"noise_prob is {noise_prob}; it must be above 0 and at most 1")
    if latents is None:
        draw = stream(seed, LATENTS)
        latents = torch.randn(n_sample, generator.style_dim, generator=draw)
    score = SCORES[metric]
    if options is None and score.options is not None:
        options = score.options()
    sampling = Sampling(latents.cpu(), batch_size, noise_prob, seed, parser, progress, options)
    return [values.detach().cpu() for values in score.function(generator, sampling)]
