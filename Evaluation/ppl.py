"""Perceptual path length: how much the picture changes per step in w.

Karras et al., "A Style-Based Generator Architecture for GANs", CVPR 2019, section 4.1, in w.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from Evaluation.sampling import POSITION, latents, layer_noise, stream
from Model.generator import Generator

Protocol = Literal["paper", "standard"]
PROTOCOLS: dict[Protocol, str] = {
    "paper": "w space, t uniform in [0, 1], fresh layer noise for every image, not divided by"
    " eps^2 (Liu et al., 2021)",
    "standard": "w space, t uniform in [0, 1], the same layer noise at both ends of a pair,"
    " divided by eps^2 (Karras et al., 2020)",
}


@dataclass(frozen=True)
class PathPairs:
    """Pairs of neighbouring images on random lines in w; pair i depends on the seed and i alone.

    Attributes:
        generator: whose images.
        eps: distance of the two images along the line.
        seed: of latents, positions and noise.
        shared_noise: both images of a pair have the same layer noise.
    """

    generator: Generator
    eps: float
    seed: int
    shared_noise: bool

    @torch.no_grad()
    def images(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Both images of these pairs, (n, 3, size, size) each."""
        n, g = len(indices), self.generator
        ends = [2 * i for i in indices], [2 * i + 1 for i in indices]
        start, end = (g.mapping(latents(g, numbers, self.seed)) for numbers in ends)
        w = torch.cat([start.lerp(end, t) for t in self._positions(indices).to(start)])
        first = layer_noise(g, ends[0], self.seed)
        second = first if self.shared_noise else layer_noise(g, ends[1], self.seed)
        noise = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        images = g([w], input_is_latent=True, noise=noise)
        return images[:n], images[n:]

    def _positions(self, indices: Sequence[int]) -> Tensor:
        """Where on their lines the two images of every pair are, (2, n, 1)."""
        cpu = torch.device("cpu")
        t = [torch.rand(1, generator=stream(self.seed, i, POSITION, cpu)) for i in indices]
        return torch.stack(t).repeat(2, 1, 1) + torch.tensor([0.0, self.eps]).view(2, 1, 1)


def pair_distances(
    pairs: PathPairs,
    perceptual: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[Sequence[int]],
    progress: Callable[[int], object] = lambda n: None,
) -> list[Tensor]:
    """Perceptual distances of pairs, one (n,) on the CPU for every batch of their numbers."""
    distances = []
    for indices in batches:
        distances.append(perceptual(*pairs.images(indices)).flatten().cpu())
        progress(len(indices))
    return distances


def perceptual_path_length(
    distances: NDArray[np.floating], eps: float, protocol: Protocol
) -> float:
    """Mean of the distances between the 1st and the 99th percentile.

    Args:
        distances: of all pairs, (N,).
        eps: distance of the two images in t.
        protocol: see `PROTOCOLS`.
    """
    distances = np.asarray(distances, dtype=np.float64)
    low = np.percentile(distances, 1, method="lower")
    high = np.percentile(distances, 99, method="higher")
    mean = distances[(distances >= low) & (distances <= high)].mean()
    return float(mean if protocol == "paper" else mean / eps**2)
