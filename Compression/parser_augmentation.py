"""Vary training pictures together with their label maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CELEBAMASK_FLIP_PAIRS = ((2, 3), (4, 5), (7, 8))
"""CelebAMask-HQ's classes that are each other's mirror image: brows, eyes, ears."""

Batch = tuple[Tensor, Tensor]
"""Pictures (N, 3, H, W) in [-1, 1] and label maps (N, H, W), int64."""


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied.

    Attributes:
        flip_pairs: pairs of classes that change places when a picture is mirrored.
        image_size: side in pixels that pictures are reduced to before the parser enlarges them
            again, as it does with the pictures of a small generator; None leaves them as they are.
        rotation: largest angle in degrees, either way.
        log_scale: largest change of the natural logarithm of the size, either way.
        shift: largest shift as a fraction of the side, either way.
        colour: largest relative change of brightness, contrast, saturation and of each channel.
        noise: largest standard deviation of white noise, images in [-1, 1].
    """

    flip_pairs: Sequence[tuple[int, int]] = ()
    image_size: int | None = None
    rotation: float = 10.0
    log_scale: float = 0.15
    shift: float = 0.06
    colour: float = 0.2
    noise: float = 0.05


def augment(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> Batch:
    """Vary a batch and reduce the pictures to `how.image_size`.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        labels: (N, H, W), int64.
        how: the limits of the variation.
        generator: a CPU generator that all draws come from.

    Returns:
        Pictures (N, 3, H', W'), about [-1, 1], and label maps (N, H, W).
    """
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    images, labels = flip(images, labels, chosen, how.flip_pairs)
    images, labels = _move(images, labels, how, generator)
    images = _recolour(images, how.colour, generator)
    return _degrade(reduce_images(images, how.image_size), how.noise, generator), labels


def flip(images: Tensor, labels: Tensor, chosen: Tensor, pairs: Sequence[tuple[int, int]]) -> Batch:
    """Mirror some pictures; left and right classes change places.

    Args:
        images: (N, 3, H, W).
        labels: (N, H, W), int64.
        chosen: (N,), bool: which to mirror.
        pairs: classes that are each other's mirror image.
    """
    classes = 1 + max([int(labels.max()), *(c for pair in pairs for c in pair)])
    swapped = torch.arange(classes, device=labels.device)
    for a, b in pairs:
        swapped[a], swapped[b] = b, a
    images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)
    return images, torch.where(chosen.view(-1, 1, 1), swapped[labels.flip(2)], labels)


def _uniform(count: int, limit: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (count,) from [-limit, limit], on the CPU, so that a seed means the same run."""
    return (torch.rand(count, generator=generator) * 2 - 1).mul(limit).to(like.device)


def _move(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> Batch:
    """Rotate, scale and shift half of the pictures; what comes in at the border repeats it."""
    n = len(images)
    limits = torch.tensor((math.radians(how.rotation), how.log_scale, 2 * how.shift, 2 * how.shift))
    moving = torch.rand(n, generator=generator) < 0.5
    draws = (torch.rand(4, n, generator=generator) * 2 - 1) * limits.view(4, 1) * moving
    angle, log_scale, shift_x, shift_y = draws.to(images.device)
    scale = log_scale.exp()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (torch.stack((cos, -sin, shift_x), 1), torch.stack((sin, cos, shift_y), 1))
    size = [n, 1, *images.shape[2:]]
    grid = F.affine_grid(torch.stack(rows, 1), size, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    moved = F.grid_sample(
        labels.unsqueeze(1).float(), grid, "nearest", "border", align_corners=False
    )
    return images, moved.squeeze(1).long()


def _recolour(images: Tensor, limit: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and the channels' balance."""
    n = len(images)

    def factor() -> Tensor:
        return 1 + _uniform(n, limit, images, generator).view(-1, 1, 1, 1)

    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor() + mean + (factor() - 1)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * factor() + grey
    balance = torch.cat([factor() for _ in range(3)], dim=1)
    return ((images + 1) * balance - 1).clamp(-1, 1)


def _degrade(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Blur half of the pictures by differing amounts and add noise to half of them.

    Pictures of a generator in training are slightly soft and slightly noisy.
    """
    n = len(images)
    kernel = torch.tensor((0.25, 0.5, 0.25), device=images.device)
    weight = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    blur = _uniform(n, 1.0, images, generator).clamp(min=0).view(-1, 1, 1, 1)
    sigma = _uniform(n, noise, images, generator).clamp(min=0).view(-1, 1, 1, 1)
    draw = torch.randn(images.shape, generator=generator).to(images.device)
    return images + blur * (soft - images) + sigma * draw


def reduce_images(images: Tensor, size: int | None) -> Tensor:
    """Average pictures (N, 3, H, W) over areas to (N, 3, size, size); None leaves them as is."""
    return images if size is None else F.interpolate(images, (size, size), mode="area")
