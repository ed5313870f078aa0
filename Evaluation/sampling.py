"""Images of a generator in which image i depends on the seed and on i alone.

The batch size, the number of processes and what was drawn before do not change it (beyond the
rounding of the convolutions), so that figures can be compared and evaluation leaves the random
streams of a training alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from Model.generator import Generator

LATENT, NOISE, MEAN, POSITION = range(4)
"""What a stream is for: z, layer noise, the mean latent, a position between two latents."""


def stream(seed: int, index: int, purpose: int, device: torch.device) -> torch.Generator:
    """The random stream of one image; streams of other arguments are independent of it."""
    state = np.random.SeedSequence((seed, index, purpose)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> 1))


def latents(generator: Generator, indices: Sequence[int], seed: int) -> Tensor:
    """Draw z (len(indices), style_dim), the same on every device.

    Args:
        generator: says the size of z and the device.
        indices: numbers of the images, >= 0.
        seed: >= 0.
    """
    cpu = torch.device("cpu")
    z = [
        torch.randn(generator.style_dim, generator=stream(seed, index, LATENT, cpu))
        for index in indices
    ]
    return torch.stack(z).to(generator.device)


def layer_noise(generator: Generator, indices: Sequence[int], seed: int) -> list[Tensor]:
    """Draw layer noise (len(indices), 1, h, w) per styled convolution; devices differ in it."""
    device = generator.device
    sides = [noise.shape[-1] for noise in generator.fixed_noise]
    areas = [side * side for side in sides]
    flat = [
        torch.randn(sum(areas), generator=stream(seed, index, NOISE, device), device=device)
        for index in indices
    ]
    parts = torch.stack(flat).split(areas, dim=1)
    return [part.view(-1, 1, side, side) for part, side in zip(parts, sides, strict=True)]


@torch.no_grad()
def mean_latent(generator: Generator, seed: int, n: int = 4096) -> Tensor:
    """Mean w of ``n`` random z, (1, style_dim): the centre of truncation."""
    z = torch.randn(
        n, generator.style_dim, generator=stream(seed, 0, MEAN, torch.device("cpu"))
    ).to(generator.device)
    return generator.mapping(z).mean(dim=0, keepdim=True)


def shares(n: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Split 0 ... n-1 into batches and yield those of one process, the last one maybe smaller."""
    for start in range(rank * batch_size, n, world * batch_size):
        yield range(start, min(start + batch_size, n))


@torch.no_grad()
def images(
    generator: Generator,
    indices: Sequence[int],
    seed: int,
    truncation: float = 1.0,
    centre: Tensor | None = None,
    fixed_noise: bool = False,
) -> Tensor:
    """Generate the images of these numbers.

    Args:
        generator: in any mode, on any device.
        indices: numbers of the images, >= 0.
        seed: of latents and noise, >= 0.
        truncation: psi in (0, 1]; below 1 moves w towards ``centre``, then required.
        centre: (1, style_dim), see `mean_latent`.
        fixed_noise: take the stored layer noise instead of a draw for every image.

    Returns:
        (len(indices), 3, size, size), nominally in [-1, 1].
    """
    noise = None if fixed_noise else layer_noise(generator, indices, seed)
    return generator(
        [latents(generator, indices, seed)],
        truncation=truncation,
        truncation_latent=centre,
        noise=noise,
        randomize_noise=False,
    )
