"""Images as pictures a person looks at."""

from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from Model.files import atomic_path


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert (N, C, H, W) in [-1, 1] to (N, H, W, C) bytes; values beyond are clamped."""
    scaled = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def grid(images: Tensor, columns: int = 0, gap: int = 1) -> np.ndarray:
    """Arrange images in rows on white.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        columns: pictures per row; 0 makes the grid about square.
        gap: pixels between pictures.

    Returns:
        (H', W', 3) bytes.
    """
    pictures = to_uint8(images)
    n, height, width, _ = pictures.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def save_png(path: str | PathLike[str], pixels: np.ndarray) -> None:
    """Write (H, W, 3) or (H, W) bytes as a PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
