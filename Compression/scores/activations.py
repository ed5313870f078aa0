"""Scores of the activations: how large they are, and how much they vary over images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from Compression.scores.sampling import Sampling, Scores, chunks
from Model.generator import Generator


def _activations(generator: Generator, sampling: Sampling) -> Iterator[list[Tensor]]:
    """The activations (n, C, h, w) of every channel group, few images at a time."""
    for z, noise, _ in chunks(generator, sampling):
        with torch.no_grad():
            made = generator.synthesis(generator.w_plus([z]), noise, features=True)
            constant = generator.input(len(z))
        yield [constant, *made.features]


def l1_map(generator: Generator, sampling: Sampling) -> Scores:
    """Mean absolute activation over images and pixels."""
    sums = [torch.zeros(width, device=generator.device) for width in generator.channels]
    for activations in _activations(generator, sampling):
        for total, x in zip(sums, activations, strict=True):
            total += x.abs().mean(dim=(2, 3)).sum(dim=0)
    return [total / len(sampling.latents) for total in sums]


class _Spread:
    """Variation of activations over images, from one pass over them.

    Sums are taken of the differences to the first image, which keeps them small, and exactly zero
    where nothing varies (the constant input).
    """

    def __init__(self, first: Tensor) -> None:
        self.origin = first[:1].clone()
        self.count = 0
        self.differences = torch.zeros_like(self.origin[0])
        self.squares = torch.zeros_like(self.origin[0])
        self.l1 = self.origin.new_zeros(self.origin.shape[1])
        self.power = torch.zeros_like(self.l1)

    def add(self, x: Tensor) -> None:
        """Take in activations (n, C, h, w)."""
        difference = x - self.origin
        self.count += len(x)
        self.differences += difference.sum(dim=0)
        self.squares += difference.square_().sum(dim=0)
        self.l1 += x.abs().sum(dim=(0, 2, 3))
        self.power += x.square().sum(dim=(0, 2, 3))

    def asv(self) -> Tensor:
        """Standard deviation over the images, averaged over the pixels, (C,)."""
        mean = self.differences / self.count
        variance = self.squares / self.count - mean.square()
        return variance.clamp(min=0).sqrt().mean(dim=(1, 2))

    def l1_norm_asv(self) -> Tensor:
        """`asv` divided by the mean absolute activation; 0 for a map that is zero."""
        values = self.count * self.squares[0].numel()
        return (self.asv() / (self.l1 / values)).nan_to_num(0.0)

    def l2_norm_asv(self) -> Tensor:
        """`asv` divided by the L2 norm over all images and pixels; 0 for a map that is zero."""
        return (self.asv() / self.power.sqrt()).nan_to_num(0.0)


def _spreads(generator: Generator, sampling: Sampling) -> list[_Spread]:
    spreads: list[_Spread] = []
    for activations in _activations(generator, sampling):
        if not spreads:
            spreads = [_Spread(x) for x in activations]
        for spread, x in zip(spreads, activations, strict=True):
            spread.add(x)
    return spreads


def asv(generator: Generator, sampling: Sampling) -> Scores:
    """Standard deviation of the activation over the images, averaged over the pixels.

    The constant input does not vary: all of its channels score 0, and equal scores go by index.
    """
    return [spread.asv() for spread in _spreads(generator, sampling)]


def l1_norm_asv(generator: Generator, sampling: Sampling) -> Scores:
    """`asv` relative to the mean absolute activation."""
    return [spread.l1_norm_asv() for spread in _spreads(generator, sampling)]


def l2_norm_asv(generator: Generator, sampling: Sampling) -> Scores:
    """`asv` relative to the L2 norm of the activation.

    The norm is a sum over images and pixels; as all channels of a group share their number, it
    ranks as a mean would.
    """
    return [spread.l2_norm_asv() for spread in _spreads(generator, sampling)]
