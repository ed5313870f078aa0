"""Distillation from the full-size teacher inside the content of interest (paper, section 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from Evaluation.distances import Distance, at_most


def distillation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    perceptual: Distance | None = None,
) -> tuple[Tensor, Tensor]:
    """Distance of the student's pictures to the teacher's, inside the content mask.

    Content-Aware GAN Compression, eq. 4 and 5. Given lists of running RGB sums, the L1 terms of
    all resolutions add up, each under the mask averaged down to it, and the perceptual term
    compares the last.

    Args:
        student: (N, 3, H, W) images, or the list for every resolution.
        teacher: the same of the teacher; no gradient flows into it.
        mask: (N, 1, H, W) in [0, 1] at the last resolution, applied to both sides; None keeps all.
        perceptual: distance of image pairs at up to 256 px; None leaves that term 0.

    Returns:
        L1 term (mean over all values, masked ones included) and perceptual term, without weights.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    l1 = students[-1].new_zeros(())
    for s, t in zip(students, teachers, strict=True):
        difference = (s - t.detach()).abs()
        l1 = l1 + (difference if mask is None else difference * _at_size(mask, s)).mean()
    if perceptual is None:
        return l1, torch.zeros_like(l1)
    pair = [students[-1], teachers[-1].detach()]
    if mask is not None:
        pair = [image * mask for image in pair]
    return l1, perceptual(*(at_most(image, 256) for image in pair)).mean()


def _at_size(mask: Tensor, images: Tensor) -> Tensor:
    """Average a mask down to the images' resolution."""
    if mask.shape[2:] == images.shape[2:]:
        return mask
    return F.adaptive_avg_pool2d(mask, (images.shape[2], images.shape[3]))
