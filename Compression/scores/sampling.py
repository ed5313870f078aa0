"""What scores draw on: latents, layer noise, the content mask, and which weights stand for a group.

All random numbers are drawn on the CPU from one seed, so that a seed means the same images on
every device. Latents, layer noise and pixel noise come from streams of their own: the images do not
depend on the batch size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from Evaluation.features import Mask
from Model.generator import Generator
from Model.layers import StyledConv, ToRGB
from Util import memory
from Util.streams import stream

Scores = list[Tensor]
"""One 1-D tensor per channel group; higher is more important."""

LATENTS, LAYER_NOISE, PIXEL_NOISE, CHANCE, DIRECTIONS, INITIALISATION = range(6)
"""What a random stream is for."""


@dataclass(frozen=True)
class Sampling:
    """What a score may draw on besides the generator.

    Attributes:
        latents: z of all images, (n, style_dim), on the CPU.
        batch_size: images whose gradients are summed before their absolute value is taken.
        noise_prob: probability that a pixel inside the content mask is noised.
        seed: seed of the random streams.
        parser: see `Mask`; None where there is no face parser.
        progress: called with the number of images done since the last call.
        options: the score's own settings, of the type that its entry in the table names.
    """

    latents: Tensor
    batch_size: int
    noise_prob: float
    seed: int
    parser: Mask | None
    progress: Callable[[int], None]
    options: Any = None

    def stream(self, purpose: int) -> torch.Generator:
        """Return the random stream for a purpose (LATENTS, ...), from its start."""
        return stream(self.seed, purpose)


def readers(generator: Generator) -> list[StyledConv | ToRGB]:
    """The layer per channel group whose weights stand for the group.

    A group of channels enters the next styled convolution; the last one enters only the last ToRGB.
    The other ToRGBs also read channels, but do not take part in scores.
    """
    return [*generator.styled_convs, generator.to_rgbs[-1]]  # type: ignore[list-item]


def chunks(generator: Generator, sampling: Sampling) -> Iterator[tuple[Tensor, list[Tensor], bool]]:
    """Inputs of the generator, few enough images at a time for the memory.

    Yields:
        z (n, style_dim), layer noise (n, 1, h, w) per layer, and whether a batch ends here.
    """
    stream = sampling.stream(LAYER_NOISE)
    for batch in sampling.latents.split(sampling.batch_size):
        parts = batch.split(memory.at_once(generator.size, memory.SCORING))
        for i, z in enumerate(parts):
            yield (
                z.to(generator.device),
                layer_noise(generator, len(z), stream),
                i == len(parts) - 1,
            )
            sampling.progress(len(z))


def layer_noise(generator: Generator, n: int, stream: torch.Generator) -> list[Tensor]:
    """Draw layer noise (n, 1, h, w) per layer, image by image: the batch size changes nothing."""
    sides = [noise.shape[-1] for noise in generator.fixed_noise]
    areas = [side**2 for side in sides]
    rows = torch.randn(n, sum(areas), generator=stream).to(generator.device)
    maps = rows.split(areas, dim=1)
    return [m.view(-1, 1, side, side) for m, side in zip(maps, sides, strict=True)]


def draw_sampling(
    generator: Generator,
    *,
    parser: Mask | None = None,
    n_sample: int = 400,
    batch_size: int = 10,
    noise_prob: float = 0.05,
    seed: int = 0,
    latents: Tensor | None = None,
    progress: Callable[[int], None] = lambda images: None,
    options: Any = None,
) -> Sampling:
    """Draw the latents of a sampling, unless they are given.

    Args:
        generator: says the size of z.
        parser: see `Sampling`, as the further arguments.
        n_sample: images, >= 1.
        batch_size: >= 1.
        noise_prob: in (0, 1].
        seed: >= 0.
        latents: z to use instead of ``n_sample`` drawn ones, (n, style_dim).
        progress: see `Sampling`.
        options: see `Sampling`.

    Raises:
        ValueError: a number is out of range.
    """
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
    return Sampling(latents.cpu(), batch_size, noise_prob, seed, parser, progress, options)
