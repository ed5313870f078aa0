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

from Evaluation.distances import Distance
from Evaluation.sampling import POSITION, draw_noise, draw_z, shares, synthesise
from Evaluation.settings import ModelSettings, PerceptualSettings, Result
from Model.generator import Generator
from Util import distributed, memory
from Util.device import tf32_allowed
from Util.progress import Progress
from Util.settings import SettingError, setting, some_words
from Util.streams import stream

Protocol = Literal["paper", "standard", "ends"]
PROTOCOLS: dict[Protocol, str] = {
    "paper": "w space, t uniform in [0, 1], fresh layer noise for every image, not divided by"
    " eps^2 (Liu et al., 2021)",
    "standard": "w space, t uniform in [0, 1], the same layer noise at both ends of a pair,"
    " divided by eps^2 (Karras et al., 2019, full paths)",
    "ends": "as standard, but t = 0 (Karras et al., 2020: StyleGAN2's ppl2_wend)",
}


@dataclass(frozen=True)
class PathPairs:
    """Pairs of neighbouring images on random lines in w; pair i depends on the seed and i alone.

    Attributes:
        generator: whose images.
        eps: distance of the two images along the line.
        seed: of latents, positions and noise.
        shared_noise: both images of a pair have the same layer noise.
        full: pairs lie anywhere on their lines, not at the start alone.
    """

    generator: Generator
    eps: float
    seed: int
    shared_noise: bool
    full: bool = True

    @torch.no_grad()
    def images(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Make both images of these pairs, (n, 3, size, size) each."""
        n, g = len(indices), self.generator
        ends = [2 * i for i in indices], [2 * i + 1 for i in indices]
        start, end = (g.mapping(draw_z(g, numbers, self.seed)) for numbers in ends)
        w = torch.cat([start.lerp(end, t) for t in self._positions(indices).to(start)])
        first = draw_noise(g, ends[0], self.seed)
        second = first if self.shared_noise else draw_noise(g, ends[1], self.seed)
        noise = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        images = synthesise(g, w, noise)
        return images[:n], images[n:]

    def _positions(self, indices: Sequence[int]) -> Tensor:
        """Draw where on their lines the two images of every pair are, (2, n, 1)."""
        t = [torch.rand(1, generator=stream(self.seed, i, POSITION)) for i in indices]
        t = t if self.full else [torch.zeros(1)] * len(t)
        return torch.stack(t).repeat(2, 1, 1) + torch.tensor([0.0, self.eps]).view(2, 1, 1)


def pair_distances(
    pairs: PathPairs,
    perceptual: Distance,
    batches: Sequence[Sequence[int]],
    progress: Callable[[int], object] = lambda n: None,
) -> list[Tensor]:
    """Compute distances of pairs, one (n,) on the CPU for every batch of their numbers."""
    distances = []
    for indices in batches:
        distances.append(perceptual(*pairs.images(indices)).flatten().cpu())
        progress(len(indices))
    return distances


def perceptual_path_length(
    distances: NDArray[np.floating], eps: float, protocol: Protocol
) -> float:
    """Average the distances between the 1st and the 99th percentile.

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


def path_length(
    generator: Generator,
    perceptual: Distance,
    protocol: Protocol,
    n: int,
    batch_size: int = 50,
    eps: float = 1e-4,
    seed: int = 0,
) -> float:
    """Measure a generator's path length over ``n`` `PathPairs`, which the processes share."""
    pairs = PathPairs(generator, eps, seed, protocol != "paper", protocol != "ends")
    rank, world = distributed.rank(), distributed.world_size()
    batch_size = memory.at_once(generator.size, memory.INFERENCE // 2, batch_size)  # two a pair
    batches = list(shares(n, batch_size, rank, world))
    total = sum(map(len, batches))
    with Progress(total, protocol, "pair", shown=rank == 0, leave=False) as bar:
        own = pair_distances(pairs, perceptual, batches, bar.update)
    distances = torch.cat(distributed.gather_in_turn(own)).numpy()
    return perceptual_path_length(distances, eps, protocol)


@dataclass(frozen=True, kw_only=True)
class PathSettings(PerceptualSettings, ModelSettings):
    """Settings of `measure`."""

    n_sample: int = setting(5000, "pairs of images", low=1)
    batch_size: int = setting(50, "pairs at a time, fewer where images are large", low=1)
    eps: float = setting(1e-4, "step along a line between two w, in [1e-6, 1)", low=1e-6, below=1)
    protocols: tuple[Protocol, ...] = setting(
        ("paper", "standard"),
        "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items())
        + " (default: paper,standard)",
        choices=tuple(PROTOCOLS),
        parse=some_words,
    )


def measure(settings: PathSettings) -> Result:
    """Measure a model's path length by every protocol that is asked for.

    The processes of a launcher join here; the caller lets them leave (`Util.distributed`).

    Raises:
        SettingError: names the setting and what to do.
    """
    device = distributed.join(settings.pick_device())
    if tf32_allowed(device):
        raise SettingError(
            "tf32", "rounds by more than the two images of a pair differ; leave it out here"
        )
    settings.check_parser(settings.ckpt)
    generator = settings.load(settings.ckpt, device)
    perceptual = settings.load_distance(settings.ckpt, device)
    distance = settings.distance_name(settings.ckpt)
    distributed.meet()  # one that downloads takes its time
    n, eps = settings.n_sample, settings.eps
    figures: dict[str, float] = {}
    lines = []
    for protocol in settings.protocols:
        value = path_length(
            generator, perceptual, protocol, n, settings.batch_size, eps, settings.seed
        )
        figures[protocol] = value
        lines.append(f"PPL ({protocol} protocol, {distance}): {value:.6g}")
        if settings.info_print:
            lines.append(f"  {n} pairs, eps {eps:g}; {PROTOCOLS[protocol]}; 1 % trimmed")
    about = {"distance": distance, "trimmed": "1 % at each end"}
    about |= {protocol: PROTOCOLS[protocol] for protocol in settings.protocols}
    chosen = {"perceptual": settings.network(settings.ckpt)}
    return Result(figures, about, lines, settings, chosen)
