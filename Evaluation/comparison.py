"""How close pictures are to those they stand for, whole and inside the content of interest."""

import torch
from torch import Tensor

from Evaluation.distances import Distance


def content_l1(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Compute the mean absolute difference per value inside the content mask.

    Args:
        student: (N, 3, H, W) images, nominally in [-1, 1].
        teacher: the same of the teacher.
        mask: (N, 1, H, W) in {0, 1}, of the teacher's images.

    Returns:
        A distance in [0, 2] for images in [-1, 1]; 0 for an empty mask.
    """
    inside = mask.sum().clamp(min=1) * student.shape[1]
    return (((student - teacher).abs() * mask).sum() / inside).item()


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the peak signal-to-noise ratio of image pairs; the peak is their range, 2.

    Args:
        a: (N, 3, H, W), nominally in [-1, 1]; clamped to it, without an 8-bit step.
        b: the same.
        mask: (N, 1, H, W) in {0, 1}: the pixels that count; None counts all.

    Returns:
        10 log10(4 / mean squared error), (N,), in dB; infinite for equal images, not a number for
        an empty mask.
    """
    squares = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=1, keepdim=True)
    mask = torch.ones_like(squares) if mask is None else mask
    error = (squares * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


@torch.no_grad()
def fidelity(real: Tensor, made: Tensor, mask: Tensor, perceptual: Distance) -> dict[str, Tensor]:
    """Measure how close pictures are to the real ones.

    Args:
        real: (N, 3, H, W) in [-1, 1].
        made: the same of a generator; values beyond are clamped.
        mask: (N, 1, H, W) in {0, 1}: the content of the real pictures.
        perceptual: see `Distance`.

    Returns:
        (N,) each: psnr (dB) and perceptual of the whole pictures; content_psnr (dB) over the
        masked pixels only, and content_perceptual with both pictures multiplied by the mask. Both
        are not a number where the mask is empty.
    """
    made = made.clamp(-1, 1)
    empty = ~mask.bool().flatten(1).any(dim=1)
    masked = perceptual(real * mask, made * mask)
    return {
        "psnr": psnr(real, made),
        "perceptual": perceptual(real, made),
        "content_psnr": psnr(real, made, mask),
        "content_perceptual": masked.masked_fill(empty, torch.nan),
    }
