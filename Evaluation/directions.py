"""Directions of w along which the pictures change much.

- Principal components of w = mapping(z): GANSpace (Härkönen et al., 2020), and the perturbations of
  diversity-aware pruning (Chung et al., CVPR 2024).
- Leading eigenvectors of the modulations, the directions of StyleKD's relation loss (Xu et al.,
  ECCV 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from Evaluation.sampling import PRINCIPAL
from Model.generator import Generator
from Util.streams import stream


@dataclass(frozen=True)
class Principal:
    """Principal components of w.

    Attributes:
        components: (style_dim, style_dim), one unit vector a row, by falling variance.
        deviations: standard deviation of w along each, (style_dim,).
    """

    components: Tensor
    deviations: Tensor

    @property
    def shares(self) -> Tensor:
        """Compute the share of the variance along each component, (style_dim,), sum 1."""
        variances = self.deviations.square()
        return variances / variances.sum()


def _leading(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues of a symmetric matrix, falling, and unit eigenvectors, one a row.

    The sign of an eigenvector is arbitrary: here its entry of largest magnitude is positive.
    """
    values, vectors = torch.linalg.eigh(symmetric.double())
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return values.flip(0), rows * largest.sign()


@torch.no_grad()
def principal_components(generator: Generator, seed: int, n: int = 10_000) -> Principal:
    """Compute the principal components of w.

    Args:
        generator: any.
        seed: of z, >= 0.
        n: number of w, at least 2.
    """
    z = torch.randn(n, generator.style_dim, generator=stream(seed, 0, PRINCIPAL))
    return components_of(generator.mapping(z.to(generator.device)))


def components_of(w: Tensor) -> Principal:
    """Compute the principal components of given w (N, style_dim), N >= 2."""
    variances, components = _leading(torch.cov(w.double().T).reshape(w.shape[1], -1))
    return Principal(components.float(), variances.clamp(min=0).sqrt().float())


@torch.no_grad()
def modulation_directions(generator: Generator, blocks: int = 5, each: int = 5) -> Tensor:
    """Compute leading eigenvectors of the modulations: what the styles react to most.

    For the i-th upsampling block, A_i = [modulation weights of convs.2i; of convs.2i+1]^T with
    columns of unit length; its directions are the leading eigenvectors of A_i A_i^T.

    Args:
        generator: any.
        blocks: at most so many, from 8 px on.
        each: eigenvectors of each block.

    Returns:
        Unit vectors (blocks * each, style_dim): 25 from 128 px on.
    """
    found = []
    layers = generator.styled_convs[1 : 2 * blocks + 1]
    for pair in zip(layers[::2], layers[1::2], strict=True):
        # A row of the weights makes one channel's style, so it is a column of A.
        rows = torch.cat([F.normalize(layer.conv.modulation.weight, dim=1) for layer in pair])
        found.append(_leading(rows.T.double() @ rows.double())[1][:each])
    return torch.cat(found).float()


def walk(
    w_plus: Tensor, direction: Tensor, distance: float, layers: Sequence[int] | None = None
) -> Tensor:
    """Move latents along a direction.

    Args:
        w_plus: (N, n_latent, style_dim).
        direction: (style_dim,), of unit length.
        distance: how far, in units of w; for a principal component often a multiple of its
            deviation.
        layers: the rows of w+ that move; None moves all.

    Returns:
        Moved copies, (N, n_latent, style_dim).
    """
    moved = w_plus.clone()
    rows = slice(None) if layers is None else list(layers)
    moved[:, rows] += distance * direction
    return moved
