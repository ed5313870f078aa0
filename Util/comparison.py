"""How far a student's pictures are from its teacher's, in numbers and side by side."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from Model.generator import Generator
from Util.pictures import captioned, grid


@torch.no_grad()
def render(generator: Generator, z: Tensor, batch: int = 25) -> Tensor:
    """Images (N, 3, size, size) of z (N, style_dim) with the stored layer noise."""
    images = [generator([part], randomize_noise=False) for part in z.split(batch)]
    return torch.cat([i for i in images if isinstance(i, Tensor)])


def content_l1(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Mean absolute difference per value inside the content mask.

    Args:
        student: (N, 3, H, W) images, nominally in [-1, 1].
        teacher: the same of the teacher.
        mask: (N, 1, H, W) in {0, 1}, of the teacher's images.

    Returns:
        A distance in [0, 2] for images in [-1, 1]; 0 for an empty mask.
    """
    inside = mask.sum().clamp(min=1) * student.shape[1]
    return (((student - teacher).abs() * mask).sum() / inside).item()


def side_by_side(rows: Mapping[str, Tensor], scale: int = 2, margin: int = 120) -> np.ndarray:
    """One captioned row per network, one column per latent.

    Args:
        rows: caption -> (N, 3, H, W) images in [-1, 1], or (N, 1, H, W) masks in [0, 1].
        scale: every pixel becomes this many, squared.
        margin: width of the captions in pixels.

    Returns:
        (H', W', 3) bytes.
    """
    strips = {}
    for caption, images in rows.items():
        if images.shape[1] == 1:
            images = images.mul(2).sub(1).expand(-1, 3, -1, -1)
        strips[caption] = grid(images, columns=len(images)).repeat(scale, 0).repeat(scale, 1)
    return captioned(strips, gap=2 * scale, margin=margin)
