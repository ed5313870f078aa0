"""The StyleGAN2 discriminator (residual: Karras et al., CVPR 2020, figure 7c)."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from Model.generator import pyramid_width, resolution_log2
from Model.layers import (
    Blur,
    EqualConv2d,
    EqualLinear,
    FusedLeakyReLU,
    fast_layout,
    scaled_weights,
)
from Model.precision import bounded, in_float32
from Util import distributed

Weights = Mapping[nn.Module, Tensor]
"""Convolution -> its scaled weight, see `Model.layers.scaled_weights`; one that is missing scales
its weight itself."""


class ConvLayer(nn.Sequential):
    """Convolution; optionally a blur before and stride 2, optionally bias and leaky ReLU after.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k, odd.
        downsample: halve the resolution.
        activate: add a bias and activate.
        gain: further factor of the result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        downsample: bool = False,
        activate: bool = True,
        gain: float = 1.0,
    ) -> None:
        layers: list[nn.Module] = []
        stride, padding = 1, kernel_size // 2
        if downsample and kernel_size == 1:
            # A strided 1x1 convolution reads every other sample: the blur computes no more.
            layers.append(Blur(pad=(1, 1), down=2))
        elif downsample:
            pad = (kernel_size + 1) // 2
            layers.append(Blur(pad=(pad, pad)))
            stride, padding = 2, 0
        own = 1.0 if activate else gain
        layers.append(EqualConv2d(in_channels, out_channels, kernel_size, stride, padding, own))
        if activate:
            layers.append(FusedLeakyReLU(out_channels, gain * math.sqrt(2)))
        super().__init__(*layers)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Map (N, I, H, W) to (N, O, H', W')."""
        for layer in self:
            known = weights and weights.get(layer)
            x = layer(x) if known is None else layer(x, known)
        return x


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 skip, at half the resolution after them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The sum of two paths has twice the variance of each.
        half = math.sqrt(0.5)
        self.conv1 = ConvLayer(in_channels, in_channels, 3)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, downsample=True, gain=half)
        self.skip = ConvLayer(
            in_channels, out_channels, 1, downsample=True, activate=False, gain=half
        )

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Map (N, I, H, W) to (N, O, H/2, W/2) at unchanged variance."""
        y = self.conv2(self.conv1(x, weights), weights)
        return bounded(y + self.skip(x, weights))


GROUP = 4
"""Images that the minibatch standard deviation compares with each other."""


def minibatch_stddev(x: Tensor, over_processes: bool = False, batches: int = 1) -> Tensor:
    """Append the mean standard deviation over groups of images as one more map (ProGAN, section 3).

    Images i and j share a group if i = j modulo N / group. Where `GROUP` does not divide N, the
    next smaller divisor is taken, so any batch works.

    Args:
        x: (batches * N, C, H, W) activations.
        over_processes: N is the batch of all processes, of which process r of p has images r,
            r + p, ... A group that does not lie in one process is then compared across them.
        batches: of equal sizes, one after the other; only images of one are compared.

    Returns:
        (batches * N, C + 1, H, W).
    """
    own = len(x) // batches
    world = distributed.world_size() if over_processes else 1
    n = own * world
    group = next(g for g in range(min(GROUP, n), 0, -1) if n % g == 0)
    if own % group == 0:  # the groups of all processes' batch are those of each one's
        maps = _stddev_maps(x.unflatten(0, (batches, group, own // group)))
    else:
        rows = distributed.gather_rows(x).unflatten(0, (world, batches, own)).movedim(0, 2)
        maps = _stddev_maps(rows.reshape(batches, group, n // group, *x.shape[1:]))
        maps = maps.unflatten(0, (-1, world))[:, distributed.rank()]
    return torch.cat([x, maps], dim=1)


def _stddev_maps(x: Tensor) -> Tensor:
    """Mean standard deviation of each image's group, as a map.

    Args:
        x: (B, group, n, C, H, W); a group's images have the same first and third index.

    Returns:
        (B * group * n, 1, H, W).
    """
    stddev = torch.sqrt(x.var(dim=1, unbiased=False, keepdim=True) + 1e-8)
    means = stddev.mean(dim=(3, 4, 5), keepdim=True)
    return means.expand(*x.shape[:3], 1, *x.shape[4:]).flatten(0, 2)


def _weights(part: nn.Module) -> Weights:
    """Scale the weights of all convolutions of a part of the network."""
    return scaled_weights([layer for layer in part.modules() if isinstance(layer, EqualConv2d)])


class Discriminator(nn.Module):
    """StyleGAN2 discriminator: images (N, 3, size, size) -> logits (N, 1).

    Args:
        size: image side in pixels, a power of two >= 8.
        channel_multiplier: width factor of the full-size network above 32 px.
        channels: log2(size) - 1 widths, one per resolution from 4 px up to ``size``; None gives the
            full-size network.

    Attributes:
        batch_over_processes: the images of all processes are one batch; see `minibatch_stddev`.
            All must then call it together, with equally many.
    """

    def __init__(
        self, size: int, channel_multiplier: int = 2, channels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        log2 = resolution_log2(size)
        self.size, self.batch_over_processes = size, False
        widths = list(
            channels or (pyramid_width(2**i, channel_multiplier) for i in range(2, log2 + 1))
        )
        if len(widths) != log2 - 1 or min(widths) < 1:
            raise ValueError(
                f"a {size} px discriminator needs {log2 - 1} positive widths, got {tuple(widths)}"
            )
        self.channels = tuple(widths)
        downward = widths[::-1]
        blocks = [ResBlock(a, b) for a, b in pairwise(downward)]
        self.convs = nn.Sequential(ConvLayer(3, downward[0], 1), *blocks)
        self.final_conv = ConvLayer(widths[0] + 1, widths[0], 3)
        self.final_linear = nn.Sequential(
            EqualLinear(widths[0] * 16, widths[0], activation=True), EqualLinear(widths[0], 1)
        )

    def forward(self, images: Tensor, batches: int = 1) -> Tensor:
        """Return one unbounded logit per image; higher means more real.

        Args:
            images: (N, 3, size, size).
            batches: of equal sizes, one after the other; only images of one are compared.
        """
        # Of several processes, each block scales its own: gradients are then whole block by block,
        # and on their way to the others while the backward pass goes on.
        weights = _weights(self) if distributed.world_size() == 1 else None
        x = fast_layout(images)
        for block in self.convs:
            x = block(x, weights or _weights(block))
        return self._head(x, batches, weights or _weights(self.final_conv))

    @in_float32
    def _head(self, x: Tensor, batches: int, weights: Weights) -> Tensor:
        over_processes = self.batch_over_processes
        x = minibatch_stddev(x, over_processes=over_processes, batches=batches)
        return self.final_linear(self.final_conv(x, weights).flatten(1))
