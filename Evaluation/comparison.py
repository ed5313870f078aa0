"""How far a student's pictures are from its teacher's."""

import torch
from torch import Tensor

from Model.generator import Generator


@torch.no_grad()
def render(generator: Generator, z: Tensor, batch: int = 25) -> Tensor:
    """Images (N, 3, size, size) of z (N, style_dim) with the stored layer noise."""
    return torch.cat([generator([part], randomize_noise=False) for part in z.split(batch)])


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
