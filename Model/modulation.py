"""What the latents set in all layers of a synthesis network, computed for all of them at once.

    styles         s = (A w / sqrt(S) + b) / sqrt(fan in)        StyleGAN2, eq. 1
    demodulation   g = (sum over i and taps (s_i W_oi)^2 + 1e-8)^-1/2        eq. 3
    RGB weights    V = s W

Layer by layer (`Model.layers.ModulatedConv2d` and `ToRGB`) these are a dozen small operators each,
and more in their derivatives. On a GPU with few images, launching those takes longer than all that
they compute. The derivatives here are operators on lists, and can be derived again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.layers import EPSILON, ModulatedConv2d
from Model.precision import in_float32


def plan(
    convs: Sequence[ModulatedConv2d], rgbs: Sequence[ModulatedConv2d]
) -> tuple[Tensor, Tensor]:
    """List what does not change from call to call, for every input channel of every layer.

    Args:
        convs: all styled convolutions in order; convolution l takes the l-th w.
        rgbs: all layers that make RGB; the k-th takes w 2 k + 1.

    Returns:
        The index of the w that sets the channel's style, and the layer's fan-in.
    """
    taken = [*range(len(convs)), *range(1, len(convs) + 1, 2)]
    latents: list[int] = []
    fan_ins: list[float] = []
    for latent, layer in zip(taken, (*convs, *rgbs), strict=True):
        width = layer.weight.shape[2]
        latents += [latent] * width
        fan_ins += [layer.weight[0, 0].numel()] * width
    return torch.tensor(latents), torch.tensor(fan_ins, dtype=torch.float32)


@in_float32
def modulate(
    w_plus: Tensor,
    convs: Sequence[ModulatedConv2d],
    rgbs: Sequence[ModulatedConv2d],
    latents: Tensor,
    fan_ins: Tensor,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
    """Compute `ModulatedConv2d.factors` of all styled convolutions, and the weights of all RGBs.

    Args:
        w_plus: (N, n_latent, style_dim).
        convs: see `plan`.
        rgbs: see `plan`.
        latents: from `plan`.
        fan_ins: from `plan`.

    Returns:
        Weight (O, I, k, k), style (N, I) and demodulation (N, O) of each convolution; modulated
        weight (N, 3, I) of each RGB.
    """
    layers = [layer.modulation for layer in (*convs, *rgbs)]
    weight = _Joined.apply(*[layer.weight for layer in layers])
    bias = _Joined.apply(*[layer.bias for layer in layers])
    # Of these, each channel's product with its own w is wanted. The others are some thousandths of
    # what a network of 256 px computes.
    products = F.linear(w_plus, weight)
    own = products.gather(1, latents.expand(w_plus.shape[0], 1, -1)).squeeze(1)
    styles = torch.add(bias, own, alpha=1 / math.sqrt(weight.shape[1])) * fan_ins.rsqrt()

    widths = [conv.weight.shape[2] for conv in convs]
    of_convs, of_rgbs = styles.split([sum(widths), styles.shape[1] - sum(widths)], 1)
    gains = _Demodulation.apply(of_convs, *[conv.weight for conv in convs])
    weights = [conv.weight.squeeze(0) for conv in convs]
    factors = list(zip(weights, of_convs.split(widths, 1), gains, strict=True))
    rows = torch.cat([rgb.weight for rgb in rgbs], 2).view(1, 3, -1) * of_rgbs.unsqueeze(1)
    return factors, rows.split([rgb.weight.shape[2] for rgb in rgbs], 2)


class _Joined(torch.autograd.Function):
    """torch.cat along dimension 0, with a derivative that is one operator."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.lengths = [len(tensor) for tensor in tensors]
        return torch.cat(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0].split(ctx.lengths)


def _by_tap(styles: Tensor, taps: int) -> Tensor:
    """Square styles (N, I) and repeat each for all taps of its weights: (N, I * taps)."""
    return styles.square().unsqueeze(2).expand(-1, -1, taps).flatten(1)


class _Demodulation(torch.autograd.Function):
    """g = (S P^T + epsilon)^-1/2 with the squares S of the styles and P of the weights.

    With h = -g^3 dL/dg, half of which is the derivative by the sums:  dL/ds = s (h P) summed over
    the taps, dL/dW = W (h^T S).
    """

    @staticmethod
    def forward(ctx: Any, styles: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = _by_tap(styles, weights[0][0, 0, 0].numel())
        powers = [p.view(p.shape[1], -1) for p in torch._foreach_mul(weights, weights)]
        parts = rows.split([power.shape[1] for power in powers], 1)
        gains = [part @ power.t() for part, power in zip(parts, powers, strict=True)]
        torch._foreach_add_(gains, EPSILON)
        torch._foreach_rsqrt_(gains)
        ctx.save_for_backward(styles, *weights, *gains)
        return tuple(gains)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        styles, *others = ctx.saved_tensors
        weights, gains = others[: len(grads)], others[len(grads) :]
        taps = weights[0][0, 0, 0].numel()
        slopes = torch._foreach_neg(torch._foreach_mul(torch._foreach_pow(gains, 3), grads))
        of_styles = None
        if ctx.needs_input_grad[0]:
            powers = [p.view(p.shape[1], -1) for p in torch._foreach_mul(weights, weights)]
            sums = torch.cat([h @ power for h, power in zip(slopes, powers, strict=True)], 1)
            of_styles = sums.unflatten(1, (-1, taps)).sum(2) * styles
        if not any(ctx.needs_input_grad[1:]):
            return (of_styles, *[None] * len(weights))
        parts = _by_tap(styles, taps).split([w[0, 0].numel() for w in weights], 1)
        products = [h.t() @ part for h, part in zip(slopes, parts, strict=True)]
        of_weights = [p.view(w.shape) for p, w in zip(products, weights, strict=True)]
        return (of_styles, *torch._foreach_mul(weights, of_weights))
