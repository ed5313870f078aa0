"""What the toon portraits show, known exactly because they are drawn: parts and colours.

An attribute lies inside the content (the face and its hair) or outside (clothes, background), as
the parser's classes have it. `describe` names a picture's values.
"""

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from Dataset.toon_faces import render, render_background, scene
from Util.progress import track
from Util.workers import worker_pool

COLOURS = (
    *("black", "grey", "white", "brown", "orange", "yellow", "green", "cyan", "blue", "magenta"),
)
SKIN_TONES = ("dark", "brown", "tan", "light")
TONE_LIMITS = (110, 150, 195)
"""Luminance, of 255, where one tone of the skin ends and the next begins."""
CORNER = 4
"""Part of the picture's side that a corner of the background takes: a quarter."""


@dataclass(frozen=True)
class Attribute:
    """Something that a picture shows.

    Attributes:
        values: that it may have.
        inside: the content.
    """

    values: Sequence[str]
    inside: bool


ATTRIBUTES = {
    "hair": Attribute(("bun", "sideComed", "spiky", "undercut"), True),
    "rear_hair": Attribute(("none", "longStraight", "longWavy", "neckHigh", "shoulderHigh"), True),
    "beard": Attribute(
        ("none", "chin", "chinMoustache", "fullBeard", "longBeard", "moustacheTwirl"), True
    ),
    "eyes": Attribute(("bow", "happy", "humble", "wide", "wink"), True),
    "brows": Attribute(("angry", "happy", "neutral", "raised", "sad"), True),
    "mouth": Attribute(("agape", "angry", "laugh", "sad", "smile"), True),
    "skin_tone": Attribute(SKIN_TONES, True),
    "hair_colour": Attribute(COLOURS, True),
    "clothes": Attribute(("dress", "openJacket", "shirt", "tShirt", "turtleNeck"), False),
    "clothes_colour": Attribute(COLOURS, False),
    "background_left": Attribute(COLOURS, False),
    "background_right": Attribute(COLOURS, False),
}
"""Drawn parts by their names in the style; the background by the mean colours of its upper
corners."""
PARTS = {"rearHair": "rear_hair", "eyebrows": "brows"}
"""The style's names of parts that are called otherwise here."""


def colour_name(rgb: Sequence[float]) -> str:
    """Name a colour of three values in [0, 1] by its hue, saturation and brightness (HSV)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    if value < 0.25:
        return "black"
    if saturation < 0.18:
        return "grey" if value < 0.7 else "white"
    degrees = (hue * 360 + 15) % 360
    if degrees < 60:
        return "brown" if value < 0.6 else "orange"
    hues = ("yellow", "green", "cyan", "blue", "magenta")
    return hues[int(degrees // 60) - 1]


def skin_tone(rgb: Sequence[float]) -> str:
    """Name a skin colour of three values in [0, 1] by its luminance (ITU-R BT.601)."""
    luminance = 255 * float(np.dot(rgb, (0.299, 0.587, 0.114)))
    return SKIN_TONES[int(np.searchsorted(TONE_LIMITS, luminance, side="right"))]


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def describe(index: int, seed: int = 0) -> dict[str, str]:
    """Name the attributes of a portrait, see `Dataset.toon_faces.render`.

    Returns:
        A value for every attribute of `ATTRIBUTES`.
    """
    made = scene(index, seed)
    parts = dict(re.findall(r'<g id="([a-zA-Z]+)-([a-zA-Z]+)-', made.definitions))
    named = {PARTS.get(part, part): variant for part, variant in parts.items()}
    colours = {k: _rgb(made.options[f"{k}Color"]) for k in ("skin", "hair", "clothes")}
    back = render_background(index, 4 * CORNER, seed) / 255
    left, right = back[:CORNER, :CORNER], back[:CORNER, -CORNER:]
    found = {"rear_hair": "none", "beard": "none"} | named
    found |= {
        "skin_tone": skin_tone(colours["skin"]),
        "hair_colour": colour_name(colours["hair"]),
        "clothes_colour": colour_name(colours["clothes"]),
        "background_left": colour_name(left.mean(axis=(0, 1))),
        "background_right": colour_name(right.mean(axis=(0, 1))),
    }
    return {name: found[name] for name in ATTRIBUTES}


def labels_of(index: int, seed: int = 0) -> list[int]:
    """Give the attributes of a portrait as indices of their values, in the table's order."""
    found = describe(index, seed)
    return [list(a.values).index(found[name]) for name, a in ATTRIBUTES.items()]


def _described(indices: Sequence[int], size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # Picture by picture: the scene is then made up once for both.
    pairs = [(render(i, size, seed, labels=False)[0], labels_of(i, seed)) for i in indices]
    pictures, labels = zip(*pairs, strict=True)
    return np.stack(pictures), np.array(labels, dtype=np.int64)


def described_pictures(
    indices: range, size: int = 64, seed: int = 0, workers: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Render pictures together with their attributes.

    Args:
        indices: numbers of the pictures, at least one.
        size: side in pixels.
        seed: of the set.
        workers: processes; 0 renders in this one, None takes one per core.

    Returns:
        (N, size, size, 3) RGB bytes, and (N, attributes) int64, see `labels_of`.
    """
    chunks = [indices[i : i + 100] for i in range(0, len(indices), 100)]
    make = partial(_described, size=size, seed=seed)
    if workers == 0:
        made = list(map(make, chunks))
    else:
        with worker_pool(workers) as pool:
            made = list(track(pool.map(make, chunks), len(chunks), "rendering", "batch"))
    pictures, labels = zip(*made, strict=True)
    return np.concatenate(pictures), np.concatenate(labels)
