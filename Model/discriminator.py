"""The StyleGAN2 discriminator (residual: Karras et al., CVPR 2020, figure 7c)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from Model.generator import pyramid_width, resolution_log2
from Model.layers import Blur, EqualConv2d, EqualLinear, FusedLeakyReLU, fast_layout
from Model.precision import bounded, in_float32
from Util import distributed


class ConvLayer(nn.Sequential):
    """Convolution; optionally a blur before and stride 2, optionally bias and leaky ReLU after."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        downsample: bool = False,
        activate: bool = True,
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
        layers.append(EqualConv2d(in_channels, out_channels, kernel_size, stride, padding))
        if activate:
            layers.append(FusedLeakyReLU(out_channels))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 skip, at half the resolution after them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_channels, in_channels, 3)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, downsample=True)
        self.skip = ConvLayer(in_channels, out_channels, 1, downsample=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, H, W) to (N, O, H/2, W/2) at unchanged variance."""
        # The sum of two paths has twice the variance of each.
        return bounded(self.conv2(self.conv1(x)) + self.skip(x)) * math.sqrt(0.5)


GROUP = 4
"""Images that the minibatch standard deviation compares with each other."""


def minibatch_stddev(x: Tensor, group_size: int = GROUP, over_processes: bool = False) -> Tensor:
    """Append the mean standard deviation over groups of images as one more map (ProGAN, section 3).

    Images i and j share a group if i = j modulo N / group. Where ``group_size`` does not divide N,
    the next smaller divisor is taken, so any batch works.

    Args:
        x: (N, C, H, W) activations.
        group_size: images that are compared with each other.
        over_processes: N is the batch of all processes, of which process r of p has images r,
            r + p, ... A group that does not lie in one process is then compared across them.

    Returns:
        (N, C + 1, H, W).
    """
    own, _, height, width = x.shape
    world = distributed.world_size() if over_processes else 1
    n = own * world
    group = next(g for g in range(min(group_size, n), 0, -1) if n % g == 0)
    if own % group == 0:  # the groups of all processes' batch are those of each one's
        stddev = _group_stddev(x, group).repeat(group)
    else:
        rows = distributed.gather_rows(x).unflatten(0, (world, own))
        stddev = _group_stddev(rows.transpose(0, 1).flatten(0, 1), group).repeat(group)
        stddev = stddev.view(own, world)[:, distributed.rank()]
    return torch.cat([x, stddev.view(own, 1, 1, 1).expand(own, 1, height, width)], dim=1)


def _group_stddev(x: Tensor, group: int) -> Tensor:
    """Mean standard deviation of every group of images (N, C, H, W): (N / group,)."""
    grouped = x.unflatten(0, (group, len(x) // group))
    return torch.sqrt(grouped.var(dim=0, unbiased=False) + 1e-8).mean(dim=(1, 2, 3))


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
        features = self.convs(fast_layout(images)).chunk(batches)
        logits = [self._head(batch) for batch in features]
        return logits[0] if batches == 1 else torch.cat(logits)

    @in_float32
    def _head(self, x: Tensor) -> Tensor:
        x = minibatch_stddev(x, over_processes=self.batch_over_processes)
        return self.final_linear(self.final_conv(x).flatten(1))
