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


def framed(
    left: np.ndarray,
    top: np.ndarray,
    inside: np.ndarray,
    gap: int = 12,
    names: tuple[str, str] = ("", ""),
) -> np.ndarray:
    """Put one grid to the left of another and one above it, a little apart, on white.

    Args:
        left: (H, W', 3) bytes.
        top: (H', W, 3).
        inside: (H, W, 3).
        gap: pixels between them.
        names: of the left and of the top one, with arrows to them in the empty corner, where that
            is large enough.

    Returns:
        (H' + gap + H, W' + gap + W, 3) bytes.
    """
    height, width = len(top) + gap, left.shape[1] + gap
    canvas = np.full((height + len(left), width + top.shape[1], 3), 255, dtype=np.uint8)
    canvas[height:, : left.shape[1]] = left
    canvas[: len(top), width:] = top
    canvas[height:, width:] = inside
    corner = canvas[: len(top), : left.shape[1]]
    if any(names) and min(corner.shape[:2]) >= 64:
        corner[:] = _signpost(*names, corner.shape[1], corner.shape[0])
    return canvas


def _signpost(down: str, right: str, width: int, height: int) -> np.ndarray:
    """Two names with arrows, one down and one to the right, (height, width, 3) bytes."""
    size = text_size(min(width, height))
    image = Image.new("RGB", (width, height), "white")
    draw, line, head = ImageDraw.Draw(image), max(1, size // 10), size // 3
    x, y, end = width // 2, height - size // 3, size
    draw.text((x, y - 2 * end), down, fill="black", font=_font(size), anchor="mm")
    draw.line([(x, y - end), (x, y - head)], fill="black", width=line)
    draw.polygon([(x - head, y - head), (x + head, y - head), (x, y)], fill="black")
    x, y = width - size // 3, height // 2 - size
    draw.text((x - 2 * end, y), right, fill="black", font=_font(size), anchor="mm")
    draw.line([(x - end, y), (x - head, y)], fill="black", width=line)
    draw.polygon([(x - head, y - head), (x - head, y + head), (x, y)], fill="black")
    return np.asarray(image)


def text_size(side: int) -> int:
    """Height in px of text that suits pictures of this side."""
    return min(max(16, side // 8), 48)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Break a text into lines of at most ``width`` px, between words."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def with_text(picture: np.ndarray, text: str, size: int = 16, above: bool = False) -> np.ndarray:
    """Put a text under a picture, or above it, on white, in as many lines as it needs.

    Args:
        picture: (H, W, 3) bytes.
        text: one paragraph.
        size: height of the letters in pixels.
        above: a title in place of a caption.
    """
    width = picture.shape[1]
    lines = _wrapped(text, width - 16, size)
    step = round(1.3 * size)
    strip = Image.new("RGB", (width, len(lines) * step + size // 2), "white")
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        middle = size // 4 + i * step + step // 2
        draw.text((8, middle), line, fill="black", font=_font(size), anchor="lm")
    parts = [np.asarray(strip), picture]
    return np.concatenate(parts if above else parts[::-1])


def captioned(
    blocks: Mapping[str, np.ndarray], gap: int = 4, margin: int = 0, size: int = 16
) -> np.ndarray:
    """Stack pictures, each with its caption to the left of it, on white.

    Args:
        blocks: caption, of one or more lines -> (H, W, 3) bytes; W is that of the first.
        gap: pixels between pictures.
        margin: width of the captions in pixels; 0: what the longest needs.
        size: height of the letters in pixels.

    Returns:
        (H', W', 3) bytes.
    """
    font, pad = _font(size), 8
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


def headed(texts: Sequence[str], width: int, gap: int = 4, size: int = 16) -> np.ndarray:
    """Write the captions of a grid's columns, centred, on white.

    Args:
        texts: one for each column.
        width: of the grid in pixels.
        gap: pixels between its pictures.
        size: height of the letters in pixels.

    Returns:
        (1.5 * size, width, 3) bytes.
    """
    font, column = _font(size), (width + gap) / len(texts)
    picture = Image.new("RGB", (width, round(1.5 * size)), "white")
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        middle = i * column + (column - gap) / 2
        draw.text((middle, picture.height // 2), text, fill="black", font=font, anchor="mm")
    return np.asarray(picture)


def side_by_side(rows: Mapping[str, Tensor], scale: int = 2, margin: int = 0) -> np.ndarray:
    """Show one captioned row per network, one column per latent.

    Args:
        rows: caption -> (N, 3, H, W) images in [-1, 1], or (N, 1, H, W) masks in [0, 1].
        scale: every pixel becomes this many, squared.
        margin: width of the captions in pixels; 0: what the longest needs.

    Returns:
        (H', W', 3) bytes.
    """
    strips: dict[str, np.ndarray] = {}
    for caption, images in rows.items():
        if images.shape[1] == 1:
            images = images.mul(2).sub(1).expand(-1, 3, -1, -1)
        strips[caption] = grid(images, columns=len(images)).repeat(scale, 0).repeat(scale, 1)
    size = text_size(next(iter(rows.values())).shape[-1] * scale)
    return captioned(strips, gap=2 * scale, margin=margin, size=size)


def save_png(path: str | PathLike[str], pixels: np.ndarray) -> None:
    """Write (H, W, 3) or (H, W) bytes as a PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
