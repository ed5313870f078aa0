"""The formulations that everything is measured against: those of the original implementation.

Weights modulated for every sample and convolved in groups; filters as zero insertion, padding and
a one-channel convolution; noise, bias, activation and gain one after another; masks and pixel noise
made image by image, with the parser's auxiliary outputs. The same numbers as ours
(tests/test_textbook.py), from the same parameters, in PyTorch's default layout.
"""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Compression.content import ContentParser
from Model.discriminator import ConvLayer, Discriminator, ResBlock, minibatch_stddev
from Model.face_parser import BiSeNet, Conv2d
from Model.generator import Generator
from Model.layers import Blur, EqualConv2d, FusedLeakyReLU, ModulatedConv2d, StyledConv, ToRGB


def upfirdn2d(
    x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    """Insert zeros, pad, convolve one channel at a time, drop samples."""
    n, channels, height, width = x.shape
    x = F.pad(x.reshape(-1, 1, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
    x = x.reshape(-1, 1, height * up, width * up)
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1]))
    x = F.conv2d(x, kernel.flip((0, 1))[None, None])[:, :, ::down, ::down]
    return x.reshape(n, channels, *x.shape[2:])


def bias_leaky_relu(x: Tensor, bias: Tensor) -> Tensor:
    """Bias, activation and gain, three passes."""
    return F.leaky_relu(x + bias.view(1, -1, 1, 1), 0.2) * 2**0.5


class _Activation(nn.Module):
    def __init__(self, ours: FusedLeakyReLU) -> None:
        super().__init__()
        self.bias = ours.bias

    def forward(self, x: Tensor) -> Tensor:
        return bias_leaky_relu(x, self.bias)


class _Blur(nn.Module):
    def __init__(self, ours: Blur, down: int) -> None:
        super().__init__()
        self.ours, self.down = ours, down

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.ours.kernel, down=self.down, pad=self.ours.pad)


class _ModulatedConv(nn.Module):
    def __init__(self, ours: ModulatedConv2d) -> None:
        super().__init__()
        self.ours, self.weight = ours, ours.weight

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        ours, n = self.ours, len(x)
        outputs, inputs, side = self.weight.shape[1:4]
        style = ours.modulation(w).view(n, 1, inputs, 1, 1)
        weight = ours.scale * self.weight * style
        if ours.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, n * inputs, *x.shape[2:])
        if ours.upsample:
            weight = weight.transpose(1, 2).reshape(n * inputs, outputs, side, side)
            y = F.conv_transpose2d(x, weight, stride=2, groups=n)
            y = y.view(n, outputs, *y.shape[2:])
            return upfirdn2d(y, ours.blur.kernel, pad=ours.blur.pad)
        weight = weight.view(n * outputs, inputs, side, side)
        y = F.conv2d(x, weight, padding=side // 2, groups=n)
        return y.view(n, outputs, *y.shape[2:])


class _StyledConv(nn.Module):
    def __init__(self, ours: StyledConv) -> None:
        super().__init__()
        self.conv, self.noise = _ModulatedConv(ours.conv), ours.noise
        self.activate = _Activation(ours.activate)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, _: None = None) -> Tensor:
        y = self.conv(x, w)
        if noise is None:
            noise = torch.randn(len(y), 1, *y.shape[2:], device=y.device)
        return self.activate(y + self.noise.weight * noise)


class _ToRGB(nn.Module):
    def __init__(self, ours: ToRGB) -> None:
        super().__init__()
        self.conv, self.bias = _ModulatedConv(ours.conv), ours.bias
        self.ours = ours

    def forward(self, x: Tensor, w: Tensor, rgb: Tensor | None, _: None = None) -> Tensor:
        y = self.conv(x, w) + self.bias
        return y if rgb is None else y + upfirdn2d(rgb, self.ours.upsample.kernel, 2, pad=(2, 1))


class _Input(nn.Module):
    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.input = ours.input

    def forward(self, batch: int) -> Tensor:
        return self.input.repeat(batch, 1, 1, 1)


def textbook_generator(generator: Generator) -> Generator:
    """A copy whose layers compute as the original's do."""
    copied: Any = copy.deepcopy(generator)
    layers = len(generator.styled_convs), len(generator.rgb_layers)
    copied._modulation = lambda w_plus: [[None] * n for n in layers]  # each layer by itself
    copied.input = _Input(copied.input)
    copied.conv1 = _StyledConv(copied.conv1)
    copied.convs = nn.ModuleList(_StyledConv(layer) for layer in copied.convs)
    copied.to_rgb1 = _ToRGB(copied.to_rgb1)
    copied.to_rgbs = nn.ModuleList(_ToRGB(layer) for layer in copied.to_rgbs)
    return copied


class _Convolution(nn.Module):
    def __init__(self, ours: EqualConv2d) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = ours.weight, ours.stride, ours.padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class _ResBlock(nn.Module):
    """Scales the sum of its paths, where ours scales each path's last layer."""

    def __init__(self, ours: ResBlock) -> None:
        super().__init__()
        self.conv1, self.conv2, self.skip = ours.conv1, ours.conv2, ours.skip

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) * 0.5**0.5


def textbook_parser(network: BiSeNet) -> BiSeNet:
    """A copy whose convolutions are PyTorch's."""
    copied = copy.deepcopy(network)
    layers: list[Any] = [m for m in copied.modules() if isinstance(m, Conv2d)]
    for layer in layers:
        layer.__class__ = nn.Conv2d  # which it extends by a faster way to compute
    return copied


class TextbookDiscriminator(nn.Module):
    """A copy of a discriminator that computes as the original does."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.ours = copy.deepcopy(discriminator)
        for layer in [m for m in self.ours.modules() if isinstance(m, ConvLayer)]:
            self._replace(layer)
        self.ours.convs = nn.Sequential(
            *(_ResBlock(m) if isinstance(m, ResBlock) else m for m in self.ours.convs)
        )

    @staticmethod
    def _replace(layer: Any) -> None:
        for i, module in enumerate(layer):
            if isinstance(module, FusedLeakyReLU):
                layer[i] = _Activation(module)
            elif isinstance(module, Blur):
                # Ours drops samples in the blur of the skip; the original, in its convolution.
                layer[i] = _Blur(module, down=1)
                layer[i + 1].stride = 2
            elif isinstance(module, EqualConv2d):
                layer[i] = _Convolution(module)

    def forward(self, images: Tensor, batches: int = 1) -> Tensor:
        """Logits (N, 1), of one batch after the other."""
        if batches > 1:
            return torch.cat([self(batch) for batch in images.chunk(batches)])
        x = self.ours.final_conv(minibatch_stddev(self.ours.convs(images)))
        return self.ours.final_linear(x.flatten(1))


@torch.no_grad()
def content_masks(parser: ContentParser, images: Tensor) -> Tensor:
    """Content masks (N, 1, H, W), one image at a time, by way of NumPy."""
    network: Any = parser.network
    masks = []
    for image in images:
        logits = network(network.prepare(image[None]))[0]
        parsing = logits[0].argmax(0).cpu().numpy()
        mask = np.ones(parsing.shape, dtype=np.float32)
        for excluded in np.flatnonzero(parser.is_content.cpu().numpy() == 0):
            mask[parsing == excluded] = 0
        resized = F.interpolate(
            torch.from_numpy(mask)[None, None], images.shape[2:], mode="bilinear"
        )
        masks.append((resized > 0.5).float())
    return torch.cat(masks).to(images.device)


def salt_and_pepper(images: Tensor, masks: Tensor, prob: float, seed: int) -> Tensor:
    """Noise on the content's pixels, one image at a time, by way of NumPy."""
    rng = np.random.default_rng(seed)
    noisy = []
    for image, mask in zip(images.detach().cpu().numpy(), masks.cpu().numpy(), strict=True):
        changed = (rng.random(mask.shape[1:]) < prob) & (mask[0] > 0.5)
        values = np.where(rng.random(mask.shape[1:]) < 0.5, -1.0, 1.0).astype(np.float32)
        noisy.append(torch.from_numpy(np.where(changed, values, image)))
    return torch.stack(noisy).to(images.device)


def content_aware_scores(
    generator: Generator, parser: ContentParser, z: Tensor, prob: float, seed: int = 0
) -> list[Tensor]:
    """Scores of one batch: every gradient of the generator, of which the convolutions' are read.

    Args:
        generator: from `textbook_generator`.
        parser: makes the masks.
        z: (N, style_dim).
        prob: share of the content's pixels that become noise.
        seed: of the noise.
    """
    generator.zero_grad()
    images = generator([z])
    noisy = salt_and_pepper(images, content_masks(parser, images), prob, seed)
    (images - noisy).abs().sum().backward()
    layers = [generator.conv1, *generator.convs, generator.to_rgbs[-1]]
    return [layer.conv.weight.grad.abs().mean(dim=(0, 1, 3, 4)) for layer in layers]
