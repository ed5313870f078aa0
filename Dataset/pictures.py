"""Decode pictures as a viewer shows them; nothing here imports PyTorch."""

import os
import warnings
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
"""Pillow's filters by which pictures are resized. Bilinear is that of the original's training."""


class UnreadableImageError(ValueError):
    """An image is missing, damaged, of an unknown format or absurdly large; says which of these."""


def read_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Decode an image file as a viewer shows it, as RGB.

    Take the first picture of an animation, turn it as its EXIF data say, put transparent parts on
    white, and reduce 16 bits a channel to 8.

    Raises:
        UnreadableImageError: it is missing, damaged, truncated or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            # Of oddities in the file, and of large pictures; absurdly large ones are an error.
            warnings.simplefilter("ignore")
            with Image.open(source) as file:
                return _as_rgb(ImageOps.exif_transpose(file))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "unknown format or damaged"
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = " ".join(reason.split()) or type(error).__name__
    raise UnreadableImageError(f"not a readable image ({reason})")


def shorter_side(file: str | os.PathLike[str]) -> int | None:
    """Read the shorter side of an image in px off its first bytes; None if it is unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return min(image.size)
    except Exception:  # decoders raise almost anything on damaged bytes
        return None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # which Pillow would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int, resample: str = "bilinear") -> Image.Image:
    """Resize an image so that its shorter side has ``size`` pixels, and crop it to a square.

    As torchvision's Resize and CenterCrop do, but only what stays is computed.

    Args:
        image: RGB, of any size.
        size: of the result's sides.
        resample: one of `FILTERS`.
    """
    if image.size == (size, size):
        return image
    short = min(image.size)
    edges = []
    for side in image.size:
        resized = size if side == short else side * size // short
        start = round((resized - size) / 2)
        edges.append((start * side / resized, (start + size) * side / resized))
    (left, right), (top, bottom) = edges
    return image.resize((size, size), FILTERS[resample], (left, top, right, bottom))


@dataclass(frozen=True)
class Resizing:
    """How pictures came to their size.

    Attributes:
        size: their side in px.
        resample: the filter of those of another size; None if it is unknown.
        sides: smallest and largest shorter side of the pictures before, in px; None if unknown.
    """

    size: int
    resample: str | None
    sides: tuple[int, int] | None

    @property
    def filter(self) -> str:
        """The filter in a word: none for pictures that had the size already."""
        return "none" if self.sides == (self.size, self.size) else self.resample or "unknown"

    @property
    def source(self) -> str:
        """The size before in words."""
        if self.sides is None:
            return "unknown"
        low, high = self.sides
        return f"{low} px" if low == high else f"{low} to {high} px"
