"""GAN losses and their regularisers: pure functions of logits, images and latents."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def d_logistic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator loss, mean softplus(-real) + mean softplus(fake) (Goodfellow et al., 2014)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def g_nonsaturating_loss(fake_logits: Tensor) -> Tensor:
    """Generator loss, mean softplus(-fake) (Goodfellow et al., 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits: Tensor, real_images: Tensor, scale: Tensor | None = None) -> Tensor:
    """Mean squared norm of the logits' gradient at real images, without weight.

    Args:
        real_logits: (N, 1), computed from ``real_images``.
        real_images: (N, 3, H, W) that require gradients.
        scale: factor of what is back-propagated, divided out again, where that is float16.

    Returns:
        Scalar, differentiable again (Mescheder et al., 2018, eq. 9; the caller puts the 1/2).
    """
    total = real_logits.sum()
    if scale is not None:
        total = total * scale
    (grad,) = torch.autograd.grad(total, real_images, create_graph=True)
    if scale is not None:
        grad = grad / scale
    return grad.square().sum(dim=(1, 2, 3)).mean()


def path_lengths(
    images: Tensor, w_plus: Tensor, noise: Tensor, create_graph: bool = True
) -> Tensor:
    """Lengths |J^T y| of the images' derivative along a direction (StyleGAN2, section 3.2, eq. 4).

    Args:
        images: (N, 3, H, W), computed from ``w_plus`` with gradients.
        w_plus: (N, n_latent, style_dim).
        noise: (N, 3, H, W) standard normal direction in image space.
        create_graph: make them differentiable again.

    Returns:
        (N,): root mean over the layers of the squared norms.
    """
    noise = noise / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * noise).sum(), w_plus, create_graph=create_graph)
    return grad.square().sum(dim=2).mean(dim=1).sqrt()


def length_penalty(
    lengths: Tensor,
    mean_length: Tensor,
    decay: float = 0.01,
    average: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> tuple[Tensor, Tensor]:
    """Mean squared distance of lengths (N,) to their running mean; see `path_length_penalty`.

    Returns:
        The penalty and the updated mean, neither detached.
    """
    updated = mean_length + decay * (average(lengths.mean()) - mean_length)
    return (lengths - updated).square().mean(), updated


def path_length_penalty(
    images: Tensor,
    w_plus: Tensor,
    mean_length: Tensor,
    decay: float = 0.01,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Path length regularisation (StyleGAN2, section 3.2, eq. 4).

    Args:
        images: (N, 3, H, W), computed from ``w_plus`` with gradients.
        w_plus: (N, n_latent, style_dim).
        mean_length: running mean of the lengths, a scalar.
        decay: weight of this batch in the running mean.
        noise: (N, 3, H, W) standard normal direction in image space; drawn when None.

    Returns:
        The penalty (not weighted; it carries the gradient of the updated mean too, as in the
        original), the detached updated mean, and the detached lengths (N,).
    """
    lengths = path_lengths(images, w_plus, torch.randn_like(images) if noise is None else noise)
    penalty, updated = length_penalty(lengths, mean_length, decay)
    return penalty, updated.detach(), lengths.detach()
