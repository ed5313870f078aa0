"""The class of every pixel, of logits that a parser has computed at a fraction of the side."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.ops.dispatch import Impl, use_native


def upsampled_argmax(
    logits: Tensor, size: Sequence[int], align_corners: bool, impl: Impl = "auto"
) -> Tensor:
    """Enlarge logits bilinearly and find the largest at every pixel.

    The compiled operator writes no enlarged maps, of which a face parser has 19. It rounds
    otherwise than PyTorch does, which decides where two classes are equally likely.

    Args:
        logits: (N, classes, h, w).
        size: H and W.
        align_corners: see `torch.nn.functional.interpolate`.
        impl: see `Model.ops`; native for float32 on a CPU.

    Returns:
        (N, H, W) int64. No gradient.
    """
    logits = logits.detach()
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32
    if (fits or impl == "native") and use_native("upsampled_argmax", impl, logits):
        return torch.ops.stylegan.upsampled_argmax(logits, *size, align_corners)
    maps = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)
    return argmax_of_maps(maps)


def argmax_of_maps(maps: Tensor) -> Tensor:
    """Find the largest of the maps (N, C, H, W) at every pixel: (N, H, W) int64."""
    # PyTorch's argmax takes twice as long as its max, and that is fastest over contiguous values.
    return maps.permute(0, 2, 3, 1).max(dim=3).indices
