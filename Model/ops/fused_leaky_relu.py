"""Bias, leaky ReLU and gain in one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.ops.dispatch import Impl, check_impl


def fused_leaky_relu(
    x: Tensor,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = 2**0.5,
    impl: Impl = "auto",
) -> Tensor:
    """Compute ``leaky_relu(x + bias) * scale``, differentiable twice.

    The gain keeps unit variance through the activation (StyleGAN2's equalised learning rate).
    Leaky ReLU is positively homogeneous, so the gain moves inside and rides along with the bias:
    two passes over memory instead of three, and one saved tensor instead of two.

    Args:
        x: (N, C, ...) values.
        bias: (C,) added along dimension 1, or None.
        negative_slope: slope below zero, > 0.
        scale: gain after the activation, > 0.
        impl: see `Model.ops`.

    Returns:
        A tensor of x's shape.
    """
    check_impl("fused_leaky_relu", impl)
    if bias is None:
        scaled = x * scale
    else:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scaled = torch.add((bias * scale).view(shape), x, alpha=scale)
    return F.leaky_relu(scaled, negative_slope, inplace=True)
