"""NICKEL: the discriminator's features of a teacher's picture follow the teacher's own.

    loss = sum over Haar levels j = 1 ... 4 of  mean ( H_j(f_T) - H_j(f_D) )^2

(Yeo et al., "Nickel and Diming Your GAN", ECCV 2024.) f_T are the teacher's activations
after the second convolution of its 64 px block, f_D those of the discriminator at 64 px on the same
picture, H_j the three high-frequency bands of the j-th level of the orthonormal Haar transform. It
trains the discriminator; the generator gets it by the discriminator's answer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from Compression.distillation.terms import CriticCall, Parts, Pass, Sources
from Model.discriminator import Discriminator
from Model.layers import fast_layout
from Model.precision import in_float32
from Util.settings import SettingError, Settings, setting

LEVELS = 4


@dataclass(frozen=True, kw_only=True)
class HighBandSettings(Settings):
    """Settings of the term high_band; the default is that of NICKEL's figures."""

    high_band_side: int = setting(
        64, "high_band: side in px of the features", choices=(16, 32, 64, 128, 256)
    )


def high_bands(x: Tensor) -> list[Tensor]:
    """Compute the high-frequency bands of the orthonormal Haar transform.

    Args:
        x: (N, C, h, w), sides divisible by 2 ** `LEVELS`.

    Returns:
        (N, C, 3, h / 2^j, w / 2^j) for j = 1 ... `LEVELS`: of rows, of columns, of both.
    """
    bands = []
    for _ in range(LEVELS):
        # Sums and differences, since filters would have to be brought to the device.
        total, rows = _sum_and_difference(x / 2, 2)
        x, columns = _sum_and_difference(total, 3)
        rows, both = _sum_and_difference(rows, 3)
        bands.append(torch.stack([rows, columns, both], dim=2))
    return bands


def _sum_and_difference(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Add and subtract neighbours along a dimension, which halves it."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return even + odd, even - odd


@in_float32  # the bands are differences of neighbours, next to nothing of half precision's range
def distance(features: Tensor, teacher: Tensor) -> Tensor:
    """Add up the levels' mean squared differences of high bands, of (N, C, h, w) each."""
    bands = high_bands(features - teacher.detach())  # the transform is linear
    return torch.stack([band.square().mean() for band in bands]).sum()


def features_at(discriminator: Discriminator, images: Tensor, side: int) -> Tensor:
    """Compute the discriminator's activations (N, C, side, side)."""
    blocks = discriminator.size.bit_length() - side.bit_length() + 1
    return discriminator.convs[:blocks](fast_layout(images))


def make(sources: Sources) -> Parts:
    """Make the term.

    Raises:
        SettingError: the networks have no features of that side, or not equally many.
    """
    options, discriminator = sources.options, sources.discriminator
    assert isinstance(options, HighBandSettings)
    assert discriminator is not None
    side = options.high_band_side
    if side > min(sources.teacher.size, discriminator.size):
        raise SettingError(
            "kd",
            f"high_band compares features of {side} px, but the networks make"
            f" {discriminator.size} px; set high_band_side",
        )
    layer = 2 * (side.bit_length() - 3)
    widths = sources.teacher.channels[layer + 1], discriminator.channels[side.bit_length() - 3]
    if widths[0] != widths[1]:
        raise SettingError(
            "kd",
            f"high_band compares channel by channel, but at {side} px the teacher has {widths[0]}"
            f" and the discriminator {widths[1]}",
        )
    return Parts(critic=term(layer, side))


def term(layer: int, side: int) -> CriticCall:
    """Make the term, of the teacher's styled convolution ``layer`` and its side in px."""

    def high_band(discriminator: Discriminator, teacher: Pass) -> Tensor:
        features = features_at(discriminator, teacher.made.image, side)
        return distance(features, teacher.made.features[layer])

    return high_band
