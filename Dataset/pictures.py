"""Decode pictures as a viewer shows them; nothing here imports PyTorch."""

import os
import warnings
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


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


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # which Pillow would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Crop an image centrally to a square and resample it (Lanczos) to ``size`` pixels a side."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)
