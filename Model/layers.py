"""Layers of StyleGAN2 (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN").

Weights are stored with unit variance and scaled at run time: equalised learning rate (ProGAN,
section 4.1). Parameter names are those of the widely used PyTorch checkpoint format.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Model.ops import (
    Epilogue,
    conv2d,
    fused_leaky_relu,
    make_kernel,
    styled_conv,
    styled_upsampling_conv3x3,
    upfirdn2d,
)
from Model.ops.dispatch import gradient_wanted
from Model.precision import bounded, half_type, in_float32, preferred_layout


def fast_layout(x: Tensor) -> Tensor:
    """Give a 4-D tensor the layout in which the convolutions to come run fastest.

    Every later layer keeps it. See `Model.precision.preferred_layout`.
    """
    kind = x.device.type
    return x.contiguous(memory_format=preferred_layout(kind, half_type(kind) is not None))


class Conv2d(nn.Conv2d):
    """PyTorch's layer without dilation and groups, through `Model.ops.conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, h, w) to (N, O, h / stride, w / stride)."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


EPSILON = 1e-8
"""Added to sums of squares before their root is taken."""


class PixelNorm(nn.Module):
    """Normalise every vector along dimension 1 to unit mean square (ProGAN, section 4.2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x), (N, C, ...) -> (N, C, ...)."""
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPSILON)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: weight / sqrt(fan_in) * lr_mul, bias * lr_mul."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_init: float = 0.0,
        lr_mul: float = 1.0,
        activation: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.lr_mul = lr_mul
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_features) to (N, out_features), through leaky ReLU when ``activation``."""
        scale = self.lr_mul / math.sqrt(self.weight.shape[1])
        if gradient_wanted(x, self.weight, self.bias) and not torch.compiler.is_compiling():
            y = _ScaledLinear.apply(x, self.weight, self.bias, scale, self.lr_mul)
        else:
            y = torch.addmm(self.bias, x, self.weight.T, beta=self.lr_mul, alpha=scale)
        return fused_leaky_relu(y) if self.activation else y


class _ScaledLinear(torch.autograd.Function):
    """x (scale W)^T + lr_mul b, with the scales inside the products of its derivative too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: float, lr_mul: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.lr_mul = scale, lr_mul
        return torch.addmm(bias, x, weight.T, beta=lr_mul, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _scaled_product(grad, weight, ctx.scale, x)
        if ctx.needs_input_grad[1]:
            dweight = _scaled_product(grad.t(), x, ctx.scale, weight)
        if ctx.needs_input_grad[2]:
            dbias = grad.sum(0)
            dbias = dbias if ctx.lr_mul == 1 else dbias * ctx.lr_mul
        return dx, dweight, dbias, None, None


def _scaled_product(a: Tensor, b: Tensor, scale: float, like: Tensor) -> Tensor:
    """Scale a product that has the shape of another tensor."""
    if torch.is_grad_enabled():  # the derivative of what follows would reach `like`
        return (a @ b) * scale
    return torch.addmm(like, a, b, beta=0, alpha=scale)


class EqualConv2d(nn.Module):
    """Bias-free convolution with equalised learning rate: weight / sqrt(in_channels * k * k).

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k.
        stride: of the convolution.
        padding: zeros on every side.
        gain: further factor of the weight.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.stride, self.padding, self.gain = stride, padding, gain

    @property
    def scale(self) -> float:
        """Factor of the weight."""
        return self.gain / math.sqrt(math.prod(self.weight.shape[1:]))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Convolve (N, I, H, W) to (N, O, H', W').

        Args:
            x: (N, I, H, W).
            weight: that of `scaled_weights`; None scales it here.
        """
        weight = self.weight * self.scale if weight is None else weight
        return conv2d(x, weight, stride=self.stride, padding=self.padding)


def scaled_weights(layers: Sequence[EqualConv2d]) -> dict[nn.Module, Tensor]:
    """Scale the weights of all layers at once: layer -> weight (O, I, k, k)."""
    scales = [layer.scale for layer in layers]
    weights = _Scaled.apply(scales, *[layer.weight for layer in layers])
    return dict(zip(layers, weights, strict=True))


class _Scaled(torch.autograd.Function):
    """Tensors times numbers; forward and derivative are one operator each, however many."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.scales = scales
        return tuple(torch._foreach_mul(tensors, scales))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *torch._foreach_mul(grads, ctx.scales))


class FusedLeakyReLU(nn.Module):
    """`fused_leaky_relu` with a learned bias per channel, and a gain after it."""

    def __init__(self, channels: int, scale: float = 2**0.5) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Activate (N, C, ...)."""
        return bounded(fused_leaky_relu(x, self.bias.to(x.dtype), scale=self.scale))


class Blur(nn.Module):
    """Low-pass filter [1, 3, 3, 1] x [1, 3, 3, 1], optionally keeping every ``down``th sample."""

    kernel: Tensor

    def __init__(self, pad: tuple[int, int], gain: float = 1.0, down: int = 1) -> None:
        super().__init__()
        self.register_buffer("kernel", make_kernel(gain=gain))
        self.pad = pad
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """Filter (N, C, H, W), see `upfirdn2d`."""
        return upfirdn2d(x, self.kernel, down=self.down, pad=self.pad)


class Upsample(nn.Module):
    """Upsample twofold with the filter [1, 3, 3, 1] x [1, 3, 3, 1]."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", make_kernel(gain=4.0))

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Upsample (N, C, H, W) to (N, C, 2H, 2W)."""
        return upfirdn2d(x, self.kernel, up=2, pad=(2, 1))


class ModulatedConv2d(nn.Module):
    """Weights of a convolution whose input channels are scaled by a style (StyleGAN2, section 2.2).

    Scaling the activations instead of the weights gives the same values with one weight for all
    samples: y = demodulation * conv(style * x), and demodulation is a matrix product. `StyledConv`
    and `ToRGB` compute the convolution, each with what follows it.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: odd k.
        style_dim: size of the latent the style is computed from.
        demodulate: normalise each output map to unit expected variance.
        upsample: transposed convolution with stride 2, then a blur.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        demodulate: bool = True,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(1, out_channels, in_channels, kernel_size, kernel_size)
        )
        self.modulation = EqualLinear(style_dim, in_channels, bias_init=1.0)
        self.demodulate = demodulate
        self.upsample = upsample
        if upsample:
            self.blur = Blur(pad=(1, 1), gain=4.0)

    @property
    def scale(self) -> float:
        """Equalised learning rate: 1 / sqrt(I * k * k)."""
        return 1 / math.sqrt(math.prod(self.weight.shape[2:]))

    @in_float32
    def style(self, w: Tensor) -> Tensor:
        """Return each input channel's scale s (eq. 1) times `scale`: (N, style_dim) -> (N, I)."""
        return self.modulation(w) * self.scale

    @in_float32
    def demodulation(self, style: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return each output channel's 1 / sqrt(sum (s W)^2) (eq. 3): (N, I) -> (N, O).

        Ones where the layer does not demodulate. W is the layer's unless another is given.
        """
        if not self.demodulate:
            return style.new_ones(len(style), self.weight.shape[1])
        # The product sums over inputs and taps at once; a sum over the taps first would cost more.
        weight = self.weight if weight is None else weight
        power = weight.view(self.weight.shape[1], -1).square()
        taps = power.shape[1] // style.shape[1]
        return torch.rsqrt(F.linear(style.square().repeat_interleave(taps, 1), power) + EPSILON)

    def factors(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a demodulated layer computes with.

        Under float16 autocast the weights are divided by each output channel's largest, the styles
        by each image's largest: demodulation cancels both, and no sum before it overflows (Karras
        et al., 2020, ADA, appendix C).

        Args:
            w: (N, style_dim) latents.

        Returns:
            Weight (O, I, k, k), style (N, I) and demodulation (N, O).
        """
        if half_type(w.device.type) != torch.float16:
            style = self.style(w)
            return self.weight.squeeze(0), style, self.demodulation(style)
        with torch.autocast(w.device.type, enabled=False):
            style = self.modulation(w.float())
            style = style / style.abs().amax(dim=1, keepdim=True).clamp(min=1e-8)
            largest = self.weight.abs().amax(dim=(2, 3, 4), keepdim=True).clamp(min=1e-8)
            weight = self.weight * (self.scale / largest)
            return weight.squeeze(0), style, self.demodulation(style, weight)


class NoiseInjection(nn.Module):
    """Learned strength of a layer's noise, zero at the start (StyleGAN, section 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class StyledConv(nn.Module):
    """Modulated convolution, layer noise, bias and leaky ReLU (StyleGAN2, figure 2d)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style_dim: int,
        upsample: bool = False,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(
            in_channels, out_channels, kernel_size, style_dim, upsample=upsample
        )
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channels)

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        noise: Tensor | None = None,
        factors: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map activations to activations, twice the side where the layer upsamples.

        Args:
            x: (N, I, H, W) activations.
            w: (N, style_dim) latents.
            noise: (1 or N, 1, H', W') layer noise; None draws it afresh for every image.
            factors: those of `ModulatedConv2d.factors`; None computes them from w.

        Returns:
            (N, O, H', W') activations.
        """
        if noise is None:
            up = 2 if self.conv.upsample else 1
            noise = torch.randn(len(x), 1, x.shape[2] * up, x.shape[3] * up, device=x.device)
        weight, style, gain = factors or self.conv.factors(w)
        epilogue = Epilogue(self.activate.bias, noise, self.noise.weight, gain)
        if not self.conv.upsample:
            return bounded(styled_conv(x, weight, style, epilogue))
        kernel = self.conv.blur.kernel
        return bounded(styled_upsampling_conv3x3(x, weight, style, kernel, epilogue))


class ToRGB(nn.Module):
    """1x1 modulated convolution to RGB, added to the upsampled last RGB (StyleGAN2, figure 7b).

    It is not demodulated, and its weight scale follows its own fan-in, so removing channels raises
    the gain of what remains by sqrt(full / kept). The original code does the same and published
    compressed checkpoints rely on it; retraining makes up for it.
    """

    def __init__(self, in_channels: int, style_dim: int, upsample: bool = True) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if upsample:
            self.upsample = Upsample()

    def forward(
        self, x: Tensor, w: Tensor, rgb: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Add a resolution's RGB.

        Args:
            x: (N, I, H, W) activations.
            w: (N, style_dim) latents.
            rgb: (N, 3, H/2, W/2) the last RGB.
            weight: (N, 3, I) modulated weights; None computes them from w.

        Returns:
            (N, 3, H, W).
        """
        # With three outputs, modulating the weights spares a pass over the activations.
        if weight is None:
            weight = self.conv.weight.view(3, -1) * self.conv.style(w)[:, None]
        if x.is_contiguous():  # (N, I, HW) is then a view, (N, HW, I) a copy
            y = torch.bmm(weight.to(x.dtype), x.flatten(2)).view(len(x), 3, *x.shape[2:])
        else:
            y = torch.bmm(x.permute(0, 2, 3, 1).flatten(1, 2), weight.transpose(1, 2))
            y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        y = bounded(y) + self.bias
        return y if rgb is None else y + self.upsample(rgb)


class ConstantInput(nn.Module):
    """The learned 4x4 input of the synthesis network (StyleGAN, section 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, batch: int) -> Tensor:
        """Return (batch, C, 4, 4)."""
        return fast_layout(self.input.expand(batch, -1, -1, -1))
