"""Positions of the feature maps that stand for all of them, drawn by their weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from Evaluation.features import masks_of


@dataclass(frozen=True)
class Positions:
    """Positions of one resolution in every picture of a batch.

    Attributes:
        side: of the maps in px.
        index: (n, P), row * side + column.
        weight: (n, P); a sum over them estimates the weighted sum over all positions.
    """

    side: int
    index: Tensor
    weight: Tensor

    def take(self, maps: Tensor) -> Tensor:
        """Values (n, P, C) of maps (n, C, side, side)."""
        values = maps.flatten(2).transpose(1, 2)
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[2]))


def content_weight(
    images: Tensor, mask: Callable[[Tensor], Tensor] | None, outside: float
) -> Tensor:
    """Weight of every pixel: 1 inside the content, ``outside`` elsewhere; 1 without a mask.

    Args:
        images: (N, 3, H, W).
        mask: images -> content mask (N, 1, H, W).
        outside: in (0, 1].

    Returns:
        (N, 1, H, W).
    """
    if mask is None or outside == 1:
        return torch.ones_like(images[:, :1])
    return masks_of(mask, images).lerp(torch.ones_like(images[:, :1]), outside)


def draw_positions(weight: Tensor, side: int, count: int, stream: torch.Generator) -> Positions:
    """All positions with their weight where they are few, else some in proportion to it.

    Args:
        weight: (N, 1, H, W), above 0.
        side: of the maps; the weight is averaged down to it.
        count: most positions of a picture.
        stream: a CPU generator.
    """
    weight = F.adaptive_avg_pool2d(weight, side).flatten(1)
    n, positions = weight.shape
    if positions <= count:
        index = torch.arange(positions, device=weight.device).expand(n, -1)
        return Positions(side, index, weight)
    index = torch.multinomial(weight.cpu().float(), count, replacement=True, generator=stream)
    mean = weight.sum(dim=1, keepdim=True) / count
    return Positions(side, index.to(weight.device), mean.expand(-1, count))
