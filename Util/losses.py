"""Training losses: pure functions of logits, images and latents."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Two image batches (N, 3, H, W) in [-1, 1] -> distance of each pair, broadcastable to (N,)."""


def d_logistic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator loss, mean softplus(-real) + mean softplus(fake) (Goodfellow et al., 2014)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def g_nonsaturating_loss(fake_logits: Tensor) -> Tensor:
    """Generator loss, mean softplus(-fake) (Goodfellow et al., 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """Mean squared norm of the logits' gradient at real images, without weight.

    Args:
        real_logits: (N, 1), computed from ``real_images``.
        real_images: (N, 3, H, W) that require gradients.

    Returns:
        Scalar, differentiable again (Mescheder et al., 2018, eq. 9; the caller puts the 1/2).
    """
    (grad,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return grad.square().sum(dim=(1, 2, 3)).mean()


def path_length_penalty(
    images: Tensor,
    w_plus: Tensor,
    mean_length: Tensor,
    decay: float = 0.01,
    noise: Tensor | None = None,
    average: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> tuple[Tensor, Tensor, Tensor]:
    """Path length regularisation (StyleGAN2, section 3.2, eq. 4).

    Args:
        images: (N, 3, H, W), computed from ``w_plus`` with gradients.
        w_plus: (N, n_latent, style_dim).
        mean_length: running mean of the lengths, a scalar.
        decay: weight of this batch in the running mean.
        noise: (N, 3, H, W) standard normal direction in image space; drawn when None.
        average: differentiable mean of a scalar over the processes that share the batch.

    Returns:
        The penalty (not weighted; it carries the gradient of the updated mean too, as in the
        original), the detached updated mean, and the detached lengths (N,).
    """
    if noise is None:
        noise = torch.randn_like(images)
    noise = noise / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * noise).sum(), w_plus, create_graph=True)
    lengths = grad.square().sum(dim=2).mean(dim=1).sqrt()
    updated = mean_length + decay * (average(lengths.mean()) - mean_length)
    return (lengths - updated).square().mean(), updated.detach(), lengths.detach()


def distillation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    perceptual: Perceptual | None = None,
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


def at_most(images: Tensor, side: int) -> Tensor:
    """Reduce images (N, 3, H, W) bilinearly to ``side`` px where they are larger."""
    if images.shape[-1] <= side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
