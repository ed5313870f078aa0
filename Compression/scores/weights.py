"""Scores of the weights alone: norms of modulated filters, and styles. No image is made."""

import torch
from torch import Tensor

from Compression.scores.sampling import Sampling, Scores, readers
from Model.generator import Generator


def _mean_filter_norms(generator: Generator, sampling: Sampling) -> list[Tensor]:
    """L1 norms of the filters after modulation and demodulation, averaged over the latents.

    The mean is that of the signed weights. A latent only scales a filter, so it is enough to
    average the scale: sum |mean(W * gain * style)| = sum |W| * |mean(gain * style)|.

    Returns:
        (O, I) per channel group, sums over the k * k kernel positions.
    """
    layers = readers(generator)
    factors: list[Tensor | float] = [0.0] * len(layers)
    for z in sampling.latents.split(sampling.batch_size):
        w = generator.mapping(z.to(generator.device))
        for i, layer in enumerate(layers):
            style = layer.conv.style(w)
            gain = layer.conv.demodulation(style)
            factors[i] = factors[i] + gain.T @ style / len(sampling.latents)
        sampling.progress(len(z))
    return [
        layer.conv.weight[0].abs().sum(dim=(2, 3)) * torch.as_tensor(factor).abs()
        for layer, factor in zip(layers, factors, strict=True)
    ]


@torch.no_grad()
def l1_out(generator: Generator, sampling: Sampling) -> Scores:
    """L1 norm of the mean modulated weights that read the channel."""
    return [norms.sum(dim=0) for norms in _mean_filter_norms(generator, sampling)]


@torch.no_grad()
def l1_in(generator: Generator, sampling: Sampling) -> Scores:
    """L1 norm of the mean modulated weights that make the channel.

    The constant input is made by no weights; its channels are scored by their own L1 norm.
    """
    makers = _mean_filter_norms(generator, sampling)[:-1]
    constant = generator.input.input.abs().sum(dim=(0, 2, 3))
    return [constant, *(norms.sum(dim=1) for norms in makers)]


@torch.no_grad()
def l1_style(generator: Generator, sampling: Sampling) -> Scores:
    """Absolute value of the channel's mean style (the modulation, without the weight scale)."""
    layers = readers(generator)
    sums = [torch.zeros_like(layer.conv.modulation.bias) for layer in layers]
    for z in sampling.latents.split(sampling.batch_size):
        w = generator.mapping(z.to(sums[0].device))
        for total, layer in zip(sums, layers, strict=True):
            total += layer.conv.modulation(w).sum(dim=0)
        sampling.progress(len(z))
    return [total.abs() / len(sampling.latents) for total in sums]
