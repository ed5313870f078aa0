"""Gain, noise, bias, leaky ReLU and scale in one operator, after a filter if there is one."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.ops.dispatch import Impl, gradient_wanted, use_native
from Model.ops.upfirdn2d import filtered_size, upfirdn2d


class Epilogue(NamedTuple):
    """What follows a convolution of StyleGAN2 (Karras et al., 2020, figure 2d).

    x becomes ``scale * leaky_relu(x * gain + noise_strength * noise + bias)``: demodulation, layer
    noise, bias, activation, and the scale that keeps unit variance through it. The order is that of
    the compiled operators' arguments.

    Attributes:
        bias: (C,) added along dimension 1, or None.
        noise: (N or 1, 1, ...) added to every channel, or None.
        noise_strength: (1,) factor of the noise; None stands for 1.
        gain: (N, C) factor of each map, or None.
        negative_slope: slope below zero, > 0.
        scale: gain after the activation, > 0.
    """

    bias: Tensor | None = None
    noise: Tensor | None = None
    noise_strength: Tensor | None = None
    gain: Tensor | None = None
    negative_slope: float = 0.2
    scale: float = 2**0.5

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Bias, noise, its strength, and gain."""
        return self[:4]

    def to(self, dtype: torch.dtype) -> "Epilogue":
        """Convert the tensors."""
        bias, noise, strength, gain = (None if t is None else t.to(dtype) for t in self.tensors)
        return Epilogue(bias, noise, strength, gain, self.negative_slope, self.scale)


def apply_epilogue(x: Tensor, epilogue: Epilogue, impl: Impl = "auto") -> Tensor:
    """Compute an epilogue (see there) of x (N, C, ...).

    The compiled operator reads and writes each value once. Differentiable twice in every tensor.
    """
    if use_native("fused_leaky_relu", impl, x, *epilogue.tensors):
        return torch.ops.stylegan.fused_leaky_relu(x, *epilogue)
    bias, noise, strength, gain, negative_slope, scale = epilogue
    ones = (1,) * (x.ndim - 2)
    if noise is not None and strength is not None:
        noise = strength * noise
    if gain is not None:
        gain = _of_maps(gain, x)
        x = x * gain if noise is None else torch.addcmul(noise, gain, x)
    elif noise is not None:
        x = x + noise
    # Leaky ReLU is positively homogeneous, so the scale moves inside and rides along with the bias:
    # two passes over memory instead of three, and one saved tensor instead of two.
    if bias is None:
        scaled = x * scale
    else:
        scaled = torch.add((bias * scale).view(1, -1, *ones), x, alpha=scale)
    return F.leaky_relu(scaled, negative_slope, inplace=True)


def scaled_maps(x: Tensor, factors: Tensor, impl: Impl = "auto") -> Tensor:
    """Multiply every map of x (N, C, ...) by its factor (N, C).

    The compiled operator computes the gradients by both in one pass. Differentiable twice.
    """
    # A compiler fuses the product with what is around it.
    if torch.compiler.is_compiling() or not use_native("fused_leaky_relu", impl, x, factors):
        return x * _of_maps(factors, x)
    if gradient_wanted(x, factors):
        return _ScaledMaps.apply(x, factors)
    return torch.ops.stylegan.fused_leaky_relu(x, None, None, None, factors, 1.0, 1.0)


class _ScaledMaps(torch.autograd.Function):
    """Its derivative is that of an epilogue that neither adds nor bends anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, factors)
        return torch.ops.stylegan.fused_leaky_relu(x, None, None, None, factors, 1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, factors = ctx.saved_tensors
        # With a slope of 1, whose sign is looked at does not matter.
        dx, _, products, _ = torch.ops.stylegan.fused_leaky_relu_backward(
            grads[0], x, x, factors, 1.0, 1.0, False
        )
        return dx, products.to(factors.dtype)


def _of_maps(factors: Tensor, x: Tensor) -> Tensor:
    """View (N, C) so that it multiplies x (N, C, ...)."""
    return factors.view(*factors.shape, *[1] * (x.ndim - 2))


def fused_leaky_relu(
    x: Tensor,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = 2**0.5,
    impl: Impl = "auto",
) -> Tensor:
    """Compute ``scale * leaky_relu(x + bias)``, the `Epilogue` of a layer without a style.

    Args:
        x: (N, C, ...) values.
        bias: (C,) or None.
        negative_slope: slope below zero, > 0.
        scale: gain after the activation, > 0.
        impl: see `Model.ops`.
    """
    return apply_epilogue(x, Epilogue(bias, negative_slope=negative_slope, scale=scale), impl)


def filtered_leaky_relu(
    x: Tensor, kernel: Tensor, pad: tuple[int, int], epilogue: Epilogue, impl: Impl = "auto"
) -> Tensor:
    """Compute ``apply_epilogue(upfirdn2d(x, kernel, pad=pad), epilogue)`` in one pass over memory.

    The blur after an upsampling convolution and what follows it; the filtered values are never
    written. The noise has the result's size.

    Returns:
        (N, C, H + sum(pad) - K + 1, W + sum(pad) - K + 1).
    """
    # As in upfirdn2d: only the reference computes a gradient for the filter.
    if kernel.requires_grad or not use_native("filtered_leaky_relu", impl, x, *epilogue.tensors):
        return apply_epilogue(upfirdn2d(x, kernel, pad=pad, impl=impl), epilogue, impl)
    height, width = filtered_size(x, kernel, 1, 1, pad)
    return torch.ops.stylegan.filtered_leaky_relu(x, kernel, pad[0], height, width, *epilogue)
