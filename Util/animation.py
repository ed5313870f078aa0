"""Animated GIFs."""

from collections.abc import Sequence
from os import PathLike

import numpy as np
from PIL import Image

from Util.files import atomic_path


def shared_palette(frames: Sequence[np.ndarray], colours: int = 256) -> Image.Image:
    """Choose the colours of an animation: those of its pixels, and pure black and white.

    One palette for all frames: with one each, still parts would shimmer and the file would grow. A
    colour counts by the root of its frequency, or large backgrounds would take all of the palette
    and leave none for the eyes.

    Args:
        frames: (H, W, 3) bytes each.
        colours: in [8, 256].
    """
    counts = np.zeros(2**18, dtype=np.int64)  # of colours with 6 bits a channel
    for frame in frames:
        red, green, blue = np.moveaxis(frame >> 2, -1, 0).astype(np.int64)
        counts += np.bincount((red << 12 | green << 6 | blue).ravel(), minlength=len(counts))
    codes = np.repeat(np.arange(len(counts)), np.ceil(np.sqrt(counts)).astype(int))
    pixels = np.stack([codes >> 12, codes >> 6 & 63, codes & 63], axis=-1).astype(np.uint8) * 4 + 2
    chosen = Image.fromarray(pixels[None]).quantize(colours - 2, Image.Quantize.MEDIANCUT, kmeans=1)
    palette = Image.new("P", (1, 1))
    palette.putpalette([0, 0, 0, 255, 255, 255, *(chosen.getpalette() or [])])
    return palette


def indexed(frame: np.ndarray, palette: Image.Image) -> Image.Image:
    """Give each pixel of (H, W, 3) bytes the nearest colour of a `shared_palette`.

    Without dithering: its pattern would crawl from frame to frame, and does not compress.
    """
    nearest = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
    indices = np.array(nearest)
    # Pillow's search is approximate, and a white that is not white shows.
    for index, value in enumerate((0, 255)):
        indices[(frame == value).all(axis=-1)] = index
    image = Image.fromarray(indices)
    image.putpalette(palette.getpalette() or [])
    return image


def save_gif(
    path: str | PathLike[str], frames: Sequence[np.ndarray], fps: int = 12, colours: int = 128
) -> None:
    """Write an endless animation, atomically.

    Args:
        path: of the .gif.
        frames: (H, W, 3) bytes each, all of one size.
        fps: frames per second, at most 50; a GIF's delays are whole hundredths of a second.
        colours: in [8, 256].
    """
    palette = shared_palette(frames, colours)
    first, *others = (indexed(frame, palette) for frame in frames)
    delay = 10 * max(2, round(100 / fps))
    with atomic_path(path) as temporary:
        first.save(
            temporary,
            "GIF",
            save_all=True,
            append_images=others,
            duration=delay,
            loop=0,
            disposal=1,
        )
