"""Parsers that see square pictures of a fixed size, normalised per channel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalised(nn.Module):
    """Prepares pictures for a network.

    Args:
        network: pictures (N, 3, input_size, input_size) -> any output.
        input_size: side in pixels.
        mean: of the three channels of pictures in [0, 1].
        std: their standard deviations.
        class_names: see `Parser`.
        classes_excluded: see `Parser`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str],
        classes_excluded: Sequence[int],
    ) -> None:
        super().__init__()
        self.network, self.input_size = network, input_size
        self.class_names, self.classes_excluded = tuple(class_names), tuple(classes_excluded)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Resize pictures in [-1, 1] with antialiasing, and normalise them as [0, 1]."""
        size = (self.input_size, self.input_size)
        images = images.add(1).mul(0.5).clamp(0, 1)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std
