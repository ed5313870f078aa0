"""Gain, noise, bias, leaky ReLU and scale in one operator, after a filter if there is one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.ops.dispatch import Impl, use_native
from Model.ops.upfirdn2d import filtered_size, upfirdn2d


def fused_leaky_relu(
    x: Tensor,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = 2**0.5,
    impl: Impl = "auto",
    *,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Compute ``scale * leaky_relu(x * gain + noise_strength * noise + bias)``.

    Everything that follows a convolution of StyleGAN2 (Karras et al. 2020, figure 2): demodulation,
    layer noise, bias, activation, and the gain that keeps unit variance through it. The compiled
    operator reads and writes each value once. Differentiable twice in every tensor.

    Args:
        x: (N, C, ...) values.
        bias: (C,) added along dimension 1, or None.
        negative_slope: slope below zero, > 0.
        scale: gain after the activation, > 0.
        impl: see `Model.ops`.
        noise: (N or 1, 1, ...) added to every channel, or None.
        noise_strength: (1,) factor of the noise; None stands for 1.
        gain: (N, C) factor of each map, or None.

    Returns:
        A tensor of x's shape.
    """
    if use_native("fused_leaky_relu", impl, x, bias, noise, noise_strength, gain):
        return torch.ops.stylegan.fused_leaky_relu(
            x, bias, noise, noise_strength, gain, negative_slope, scale
        )
    x = _with_noise(x, noise, noise_strength, gain)
    # Leaky ReLU is positively homogeneous, so the scale moves inside and rides along with the bias:
    # two passes over memory instead of three, and one saved tensor instead of two.
    if bias is None:
        scaled = x * scale
    else:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scaled = torch.add((bias * scale).view(shape), x, alpha=scale)
    return F.leaky_relu(scaled, negative_slope, inplace=True)


def _with_noise(
    x: Tensor, noise: Tensor | None, strength: Tensor | None, gain: Tensor | None
) -> Tensor:
    """Return x * gain + strength * noise, in one pass if both are there."""
    if noise is not None and strength is not None:
        noise = strength * noise
    if gain is None:
        return x if noise is None else x + noise
    gain = gain.view(*gain.shape, *[1] * (x.ndim - 2))
    return x * gain if noise is None else torch.addcmul(noise, gain, x)


def filtered_leaky_relu(
    x: Tensor,
    kernel: Tensor,
    pad: tuple[int, int],
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = 2**0.5,
    impl: Impl = "auto",
    *,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Compute ``fused_leaky_relu(upfirdn2d(x, kernel, pad=pad), ...)`` in one pass over memory.

    The blur after an upsampling convolution and what follows it; the filtered values are never
    written. Arguments are those of the two operators, with noise of the result's size.

    Returns:
        (N, C, H + sum(pad) - K + 1, W + sum(pad) - K + 1).
    """
    if kernel.requires_grad or not use_native(
        "filtered_leaky_relu", impl, x, bias, noise, noise_strength, gain
    ):
        y = upfirdn2d(x, kernel, pad=pad, impl=impl)
        return fused_leaky_relu(
            y, bias, negative_slope, scale, impl,
            noise=noise, noise_strength=noise_strength, gain=gain,
        )  # fmt: skip
    height, width = filtered_size(x, kernel, 1, 1, pad)
    return torch.ops.stylegan.filtered_leaky_relu(
        x, kernel, pad[0], height, width, bias, noise, noise_strength, gain, negative_slope, scale
    )
