"""A small classifier of what a picture shows: one answer for each of several attributes."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 64
"""Side in px of the pictures it works at."""
WIDTHS = (24, 40, 64, 96, 96)
FEATURES = 96


def _block(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


class AttributeClassifier(nn.Module):
    """Five convolutions, a layer of features that keeps places apart, and a head per attribute.

    Args:
        attributes: name -> the values that it may have.
        inside: names of the attributes that lie inside the content of interest.

    Raises:
        ValueError: an attribute with less than two values, or an unknown name in ``inside``.
    """

    def __init__(self, attributes: Mapping[str, Sequence[str]], inside: Sequence[str]) -> None:
        super().__init__()
        if not attributes or any(len(values) < 2 for values in attributes.values()):
            raise ValueError("attributes of a classifier have two values or more")
        if unknown := set(inside) - set(attributes):
            raise ValueError(f"{', '.join(sorted(unknown))}: no such attribute")
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        self.inside = tuple(inside)
        a, b, c, d, e = WIDTHS
        self.trunk = nn.Sequential(
            *_block(3, a, kernel=4, stride=2),
            *_block(a, b),
            nn.MaxPool2d(2),
            *_block(b, c),
            nn.MaxPool2d(2),
            *_block(c, d),
            *_block(d, e),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(e * (SIDE // 16) ** 2, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in self.attributes.items()}
        )

    @property
    def config(self) -> dict[str, object]:
        """What its file says besides the tensors."""
        attributes = {name: list(values) for name, values in self.attributes.items()}
        return {"attributes": attributes, "inside": list(self.inside)}

    def features(self, images: Tensor) -> Tensor:
        """Compute the penultimate features (N, 96) of images (N, 3, H, W), nominally in [-1, 1]."""
        if images.shape[2:] != (SIDE, SIDE):
            images = F.interpolate(
                images, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
            )
        return self.trunk(images.clamp(-1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits (N, values) of every attribute, by name."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}
