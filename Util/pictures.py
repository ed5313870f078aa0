"""Images as pictures a person looks at."""

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from Util.files import atomic_path


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


def rescale(images: Tensor, scale: float) -> Tensor:
    """Enlarge images by repeating pixels, or reduce them by averaging.

    Args:
        images: (N, C, H, W).
        scale: a whole number, or one over a whole number.
    """
    if scale < 1:
        return F.avg_pool2d(images, round(1 / scale))
    return images.repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)


def framed(left: np.ndarray, top: np.ndarray, inside: np.ndarray, gap: int = 12) -> np.ndarray:
    """Put one grid to the left of another and one above it, a little apart, on white.

    Args:
        left: (H, W', 3) bytes.
        top: (H', W, 3).
        inside: (H, W, 3).
        gap: pixels between them.

    Returns:
        (H' + gap + H, W' + gap + W, 3) bytes.
    """
    height, width = len(top) + gap, left.shape[1] + gap
    canvas = np.full((height + len(left), width + top.shape[1], 3), 255, dtype=np.uint8)
    canvas[height:, : left.shape[1]] = left
    canvas[: len(top), width:] = top
    canvas[height:, width:] = inside
    return canvas


def captioned(blocks: Mapping[str, np.ndarray], gap: int = 4, margin: int = 0) -> np.ndarray:
    """Stack pictures, each with its caption to the left of it, on white.

    Args:
        blocks: caption, of one or more lines -> (H, W, 3) bytes; W is that of the first.
        gap: pixels between pictures.
        margin: width of the captions in pixels; 0: what the longest needs.

    Returns:
        (H', W', 3) bytes.
    """
    font, pad = ImageFont.load_default(16), 8
    if not margin:
        ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
        widths = [ruler.multiline_textbbox((0, 0), caption, font=font)[2] for caption in blocks]
        margin = int(np.ceil(max(widths))) + 2 * pad
    heights = [len(block) + gap for block in blocks.values()]
    width = next(iter(blocks.values())).shape[1]
    picture = Image.new("RGB", (margin + width, sum(heights) - gap), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for (caption, block), height in zip(blocks.items(), heights, strict=True):
        picture.paste(Image.fromarray(block), (margin, top))
        draw.text((pad, top + len(block) // 2), caption, fill="black", font=font, anchor="lm")
        top += height
    return np.asarray(picture)


def headed(texts: Sequence[str], width: int, gap: int = 4) -> np.ndarray:
    """Write the captions of a grid's columns, centred, on white.

    Args:
        texts: one for each column.
        width: of the grid in pixels.
        gap: pixels between its pictures.

    Returns:
        (24, width, 3) bytes.
    """
    font, column = ImageFont.load_default(16), (width + gap) / len(texts)
    picture = Image.new("RGB", (width, 24), "white")
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        middle = i * column + (column - gap) / 2
        draw.text((middle, 12), text, fill="black", font=font, anchor="mm")
    return np.asarray(picture)


def side_by_side(rows: Mapping[str, Tensor], scale: int = 2, margin: int = 120) -> np.ndarray:
    """Show one captioned row per network, one column per latent.

    Args:
        rows: caption -> (N, 3, H, W) images in [-1, 1], or (N, 1, H, W) masks in [0, 1].
        scale: every pixel becomes this many, squared.
        margin: width of the captions in pixels.

    Returns:
        (H', W', 3) bytes.
    """
    strips = {}
    for caption, images in rows.items():
        if images.shape[1] == 1:
            images = images.mul(2).sub(1).expand(-1, 3, -1, -1)
        strips[caption] = grid(images, columns=len(images)).repeat(scale, 0).repeat(scale, 1)
    return captioned(strips, gap=2 * scale, margin=margin)


def save_png(path: str | PathLike[str], pixels: np.ndarray) -> None:
    """Write (H, W, 3) or (H, W) bytes as a PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
