"""Pictures of a generator: of latents, or by number.

Image i depends on the seed and on i alone. The batch size, the number of processes and what was
drawn before do not change it (beyond the rounding of the convolutions), so that figures can be
compared and evaluation leaves the random streams of a training alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from Model.generator import Generator
from Util import memory
from Util.streams import stream

LATENT, NOISE, MEAN, POSITION, PRINCIPAL = range(5)
"""What a stream is for, the last number of its key (seed, index, purpose): z, layer noise, the mean
latent, a position between two latents, z of the principal components."""


@dataclass(frozen=True)
class Latents:
    """What a generator makes N pictures of.

    Attributes:
        w_plus: (N, n_latent, style_dim).
        noise: one map per styled convolution, (1 or N, 1, h, w); 1 is shared by all pictures.
    """

    w_plus: Tensor
    noise: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.w_plus)

    def __getitem__(self, indices: Sequence[int]) -> "Latents":
        """Select pictures by their numbers, in this order, with repetitions."""
        i = list(indices)
        return Latents(self.w_plus[i], [n if len(n) == 1 else n[i] for n in self.noise])


def draw_z(generator: Generator, indices: Sequence[int], seed: int) -> Tensor:
    """Draw z (len(indices), style_dim), the same on every device.

    Args:
        generator: says the size of z and the device.
        indices: numbers of the images, >= 0.
        seed: >= 0.
    """
    streams = (stream(seed, index, LATENT) for index in indices)
    z = [torch.randn(generator.style_dim, generator=numbers) for numbers in streams]
    return torch.stack(z).to(generator.device)


def draw_noise(generator: Generator, indices: Sequence[int], seed: int) -> list[Tensor]:
    """Draw layer noise (len(indices), 1, h, w) per styled convolution; devices differ in it."""
    device = generator.device
    sides = [noise.shape[-1] for noise in generator.fixed_noise]
    areas = [side * side for side in sides]
    streams = (stream(seed, index, NOISE, device=device) for index in indices)
    flat = [torch.randn(sum(areas), generator=numbers, device=device) for numbers in streams]
    parts = torch.stack(flat).split(areas, dim=1)
    return [part.view(-1, 1, side, side) for part, side in zip(parts, sides, strict=True)]


@torch.no_grad()
def mean_latent(generator: Generator, seed: int, n: int = 4096) -> Tensor:
    """Average w over ``n`` random z, (1, style_dim): the centre of truncation."""
    z = torch.randn(n, generator.style_dim, generator=stream(seed, 0, MEAN))
    return generator.mapping(z.to(generator.device)).mean(dim=0, keepdim=True)


@torch.no_grad()
def from_z(
    generator: Generator,
    z: Tensor,
    truncation: float = 1.0,
    centre: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
) -> Latents:
    """Map z to latents.

    Args:
        generator: any.
        z: (N, style_dim).
        truncation: psi in (0, 1]; below 1 moves w towards ``centre``, then required.
        centre: (1, style_dim), the generator's own: see `mean_latent`.
        noise: (1 or N, 1, h, w) per styled convolution; None takes the stored maps.
    """
    w_plus = generator.w_plus([z], truncation=truncation, truncation_latent=centre)
    return Latents(w_plus, noise or generator.fixed_noise)


def synthesise(generator: Generator, w: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Make pictures, all at once and differentiably.

    Args:
        generator: any.
        w: (N, style_dim), or w+ (N, n_latent, style_dim).
        noise: (1 or N, 1, h, w) per styled convolution.

    Returns:
        (N, 3, size, size), nominally in [-1, 1].
    """
    return generator([w], input_is_latent=True, noise=noise)


@torch.no_grad()
def render(generator: Generator, latents: Latents, batch: int = 16) -> Tensor:
    """Make pictures (N, 3, size, size) of latents, at most ``batch`` at a time."""
    batch = memory.at_once(generator.size, memory.INFERENCE, batch)
    parts = (latents[part] for part in shares(len(latents), batch))
    return torch.cat([synthesise(generator, part.w_plus, part.noise) for part in parts])


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
    """Make the images of these numbers, all at once.

    Args:
        generator: in any mode, on any device.
        indices: numbers of the images, >= 0.
        seed: of latents and noise, >= 0.
        truncation: see `from_z`.
        centre: see `from_z`.
        fixed_noise: take the stored layer noise instead of a draw for every image.

    Returns:
        (len(indices), 3, size, size), nominally in [-1, 1].
    """
    noise = None if fixed_noise else draw_noise(generator, indices, seed)
    made = from_z(generator, draw_z(generator, indices, seed), truncation, centre, noise)
    return synthesise(generator, made.w_plus, made.noise)
