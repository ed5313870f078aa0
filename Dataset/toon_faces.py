"""A deterministic set of toon portraits with exact label maps, rendered without any download.

The faces are remixes of "ToonHead" (https://www.figma.com/community/file/1589627891082866389) by
Johan Melin (https://www.johanmelin.com), licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), as packaged by DiceBear (`dicebear-styles`). Colours
and framing are changed and a background is drawn behind them; pictures made from them carry the
same attribution.

Each avatar is a stack of parts. A picture draws them over a busy background; its label map draws
the same parts in the same places in one flat colour per class, so the two agree to the pixel. The
classes are CelebAMask-HQ's: background, skin (the head with its ears), brows, eyes, mouth, neck
(the body), cloth, hair (with rear hair and beard). `l_` is the side on the picture's left.
"""

import colorsys
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from Util.cli import check_writable, if_interrupted, run_settings
from Util.files import atomic_path
from Util.progress import Progress
from Util.settings import Settings, blame, setting
from Util.workers import cores, worker_pool

VERSION = 1
CANVAS = 256.0
"""Side of a picture in the units that backgrounds are drawn in."""
FACE_CENTRE = (384.0, 356.0)
"""Between the eyes and the mouth, in the avatar's own 768 units."""
HEAD_HEIGHT = 452.0
"""From the crown of the head to the chin, in the avatar's units."""

PART_CLASSES = {
    "rearHair": 17,
    "body": 14,
    "head": 1,
    "clothes": 16,
    "mouth": 11,
    "beard": 17,
    "eyes": 4,
    "eyebrows": 2,
    "hair": 17,
}
# Open eyes and mouths more often than the style's even choice: thin lines say little at 64 px.
EYES = {"happy": 0.4, "wide": 0.3, "wink": 0.1, "bow": 0.1, "humble": 0.1}
MOUTHS = {"laugh": 0.3, "agape": 0.25, "angry": 0.2, "smile": 0.15, "sad": 0.1}
SIDED = {2: 3, 4: 5}
"""Class of a pair on the picture's left -> class of its twin on the right."""

NATURAL_HAIR = ("#17110e", "#2c1b18", "#4a2c1d", "#724133", "#a55728", "#b58143", "#d6b370",
                "#ead7a4", "#8c8279", "#d9d5cf")  # fmt: skip
SKIN = ("#4a2c1f", "#7d4e36", "#a36b4f", "#c08a68", "#c68e7a", "#e0ac8b", "#f1c3a5", "#f6cfb5",
        "#fbdcc8")  # fmt: skip
IRIS = ("#4b2422", "#2b1a14", "#6b4423", "#2f5d8a", "#3c7a4f", "#5a6670")


class ToonFacesError(ValueError):
    """The set cannot be made; the message names the folder or package and what to do."""


@dataclass(frozen=True, kw_only=True)
class ToonFacesSettings(Settings):
    """Which pictures of the set are rendered. Ranges that do not overlap are disjoint sets."""

    out: Path = setting(..., "folder for images/ and labels/", metavar="DIR")
    n: int = setting(20_000, "pictures", low=1)
    size: int = setting(64, "side in pixels", low=8)
    seed: int = setting(0, "seed of the set", low=0)
    start: int = setting(0, "first picture", low=0)
    workers: int | None = setting(None, "processes (default: one per core)", low=1)
    no_labels: bool = setting(False, "write no label maps")


def _hex(rgb: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * min(max(v, 0.0), 1.0)):02x}" for v in rgb)


def _random_colour(rng: Generator, saturation: float = 0.0, value: float = 0.15) -> str:
    """Draw any hue, with a least saturation and brightness."""
    hue, s, v = rng.random(), rng.uniform(saturation, 1), rng.uniform(value, 1)
    return _hex(colorsys.hsv_to_rgb(hue, s, v))


def _between(rng: Generator, palette: Sequence[str], spread: float = 0.04) -> str:
    """Draw a colour between two neighbours of a palette, jittered per channel."""
    i, t = int(rng.integers(len(palette) - 1)), rng.random()
    a, b = (np.array([int(c[k : k + 2], 16) for k in (1, 3, 5)]) for c in palette[i : i + 2])
    return _hex(((1 - t) * a + t * b) / 255 + rng.normal(0, spread, 3))


@contextmanager
def _installed() -> Iterator[None]:
    """Say how to install a package that the block fails to import."""
    try:
        yield
    except ImportError as error:
        raise ToonFacesError(
            f"{error.name} is not installed; run: pip install -r requirements.txt"
        ) from None


@cache
def _style() -> Any:
    """Read the avatar style, once per process."""
    with _installed():
        import dicebear_styles
        from dicebear import Style

    text = files(dicebear_styles).joinpath("toon-head.json").read_text("utf-8")
    return Style(json.loads(text))


def _choices(rng: Generator) -> tuple[dict[str, Any], str]:
    """Draw what an avatar looks like; return the style's options and the colour of the iris."""
    hair = _between(rng, NATURAL_HAIR) if rng.random() < 0.75 else _random_colour(rng, 0.4, 0.3)
    eyes, mouth = (rng.choice(list(c), p=list(c.values())) for c in (EYES, MOUTHS))
    options = {
        "eyesVariant": str(eyes),
        "mouthVariant": str(mouth),
        "seed": str(rng.integers(2**62)),
        "skinColor": _between(rng, SKIN, 0.02),
        "hairColor": hair,
        "clothesColor": _random_colour(rng),
        "beardProbability": 30,
        "rearHairProbability": 50,
    }
    return options, _between(rng, IRIS, 0.03)


def _avatar(options: dict[str, Any], iris: str) -> tuple[str, str]:
    """Draw an avatar; return the parts' definitions and their placement."""
    from dicebear import Avatar

    svg = Avatar(_style(), options).to_string()
    definitions, uses = re.findall(r"<defs>(.*)</defs><g[^>]*>(.*)</g></svg>", svg, re.S)[0]
    return re.sub(r'(<circle[^>]*fill=")#4B2422', rf"\g<1>{iris}", definitions), uses


def _flat(definitions: str) -> str:
    """Recolour every part with its class: class c becomes the grey (c, c, c) * 10."""
    parts = re.split(r'(?=<g id=")', definitions)
    for i, part in enumerate(parts):
        match = re.match(r'<g id="([a-zA-Z]+)-', part)
        if match is None:
            continue
        grey = "#" + f"{10 * PART_CLASSES[match[1]]:02x}" * 3
        part = re.sub(r'(fill|stroke)="(?!none)[^"]*"', rf'\g<1>="{grey}"', part)
        parts[i] = re.sub(r' fill-opacity="[^"]*"', "", part)
    return "".join(parts)


def _placement(rng: Generator) -> tuple[str, float]:
    """Place the face: return an SVG transform, and the tilt of the face in radians."""
    scale = rng.uniform(0.68, 0.82) * CANVAS / HEAD_HEIGHT
    x, y = CANVAS / 2 + rng.uniform(-0.04, 0.04, 2) * CANVAS
    tilt = float(np.clip(rng.normal(0, 4), -10, 10))
    mirror = -1 if rng.random() < 0.5 else 1
    return (
        f"translate({x:.3f} {y:.3f}) rotate({tilt:.3f}) scale({mirror * scale:.5f} {scale:.5f})"
        f" translate({-FACE_CENTRE[0]} {-FACE_CENTRE[1]})",
        math.radians(tilt),
    )


def _gradient(rng: Generator, a: str, b: str) -> tuple[str, str]:
    """Draw a gradient over the whole picture; return definitions and drawing."""
    x1, y1, x2, y2 = rng.uniform(-0.1, 1.1, 4)
    stops = f'<stop offset="0" stop-color="{a}"/><stop offset="1" stop-color="{b}"/>'
    if rng.random() < 0.6:
        body = f'<linearGradient id="bg" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}">'
        definition = f"{body}{stops}</linearGradient>"
    else:
        body = f'<radialGradient id="bg" cx="{x1:.2f}" cy="{y1:.2f}" r="{rng.uniform(0.5, 1):.2f}">'
        definition = f"{body}{stops}</radialGradient>"
    return definition, f'<rect width="{CANVAS}" height="{CANVAS}" fill="url(#bg)"/>'


def _texture(rng: Generator, colour: str) -> tuple[str, str]:
    """Draw a repeated texture: stripes, checks, dots, plaid or bricks; return as `_gradient`."""
    side, angle = rng.uniform(24, 72), rng.uniform(0, 180)
    opacity, h = rng.uniform(0.35, 0.9), side / 2
    tile = [
        f'<rect width="{side}" height="{h}"/>',
        f'<rect width="{h}" height="{h}"/><rect x="{h}" y="{h}" width="{h}" height="{h}"/>',
        f'<circle cx="{h}" cy="{h}" r="{rng.uniform(0.2, 0.45) * side}"/>',
        f'<rect width="{side}" height="{h * 0.6}" opacity="0.6"/>'
        f'<rect width="{h * 0.6}" height="{side}" opacity="0.6"/>',
        f'<path d="M0 {h} L{h} 0 L{side} {h} L{side} {side} L{h} {h} L0 {side}Z"/>',
    ][int(rng.integers(5))]
    definition = (
        f'<pattern id="tx" width="{side:.2f}" height="{side:.2f}" patternUnits="userSpaceOnUse"'
        f' patternTransform="rotate({angle:.1f})"><g fill="{colour}">{tile}</g></pattern>'
    )
    area = f'<rect width="{CANVAS}" height="{CANVAS}" fill="url(#tx)" opacity="{opacity:.2f}"/>'
    return definition, area


def _shape(rng: Generator, colour: str) -> str:
    """Draw one circle, ring, box, band or polygon."""
    x, y = rng.uniform(0, CANVAS, 2)
    r, kind = rng.uniform(0.06, 0.28) * CANVAS, int(rng.integers(5))
    paint = f'fill="{colour}" opacity="{rng.uniform(0.55, 1):.2f}"'
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {paint}/>'
    if kind == 1:
        ring = f'fill="none" stroke="{colour}" stroke-width="{r * 0.4:.1f}"'
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {ring}/>'
    turn = f'transform="rotate({rng.uniform(0, 180):.0f} {x:.1f} {y:.1f})"'
    if kind in (2, 3):
        w, h = (2 * r, 1.4 * r) if kind == 2 else (3 * CANVAS, 0.5 * r)
        box = f'x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}"'
        return f"<rect {box} {turn} {paint}/>"
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 7))))
    points = " ".join(f"{x + r * math.cos(t):.1f},{y + r * math.sin(t):.1f}" for t in angles)
    return f'<polygon points="{points}" {paint}/>'


def _background(rng: Generator) -> tuple[str, str]:
    """Draw a busy background from a palette of four colours; return as `_gradient`."""
    palette = [_random_colour(rng, 0.1, 0.2) for _ in range(4)]
    definitions, drawing = _gradient(rng, palette[0], palette[1])
    if rng.random() < 0.6:
        definition, area = _texture(rng, palette[2])
        definitions, drawing = definitions + definition, drawing + area
    shapes = (_shape(rng, palette[int(rng.integers(1, 4))]) for _ in range(rng.integers(2, 7)))
    return definitions, drawing + "".join(shapes)


def _rasterise(svg: str, side: int) -> Image.Image:
    with _installed():
        import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True))
    return Image.open(io.BytesIO(data)).convert("RGB")


def _document(definitions: str, body: str, edges: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CANVAS} {CANVAS}" fill="none"'
        f' shape-rendering="{edges}"><defs>{definitions}</defs>{body}</svg>'
    )


def _label_map(flat: Image.Image, tilt: float, eyes: np.ndarray) -> np.ndarray:
    """Read class indices off the flat drawing; split eyes and brows along the face's axis."""
    labels = (np.asarray(flat)[..., 0].astype(np.uint8) + 5) // 10
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
    right = (x - eyes[0]) * math.cos(tilt) + (y - eyes[1]) * math.sin(tilt) > 0
    for left_class, right_class in SIDED.items():
        labels[(labels == left_class) & right] = right_class
    return labels


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        options: of the avatar style, with the colours of skin, hair and clothes.
        definitions: of the avatar's parts, SVG.
        uses: their placement.
        transform: of the whole face.
        tilt: of the face, in radians.
        background: definitions and drawing.
    """

    options: Mapping[str, Any]
    definitions: str
    uses: str
    transform: str
    tilt: float
    background: tuple[str, str]


@lru_cache(maxsize=1)  # a picture that is drawn and described in turn is made up once
def scene(index: int, seed: int) -> Scene:
    """Make up a portrait; a pure function of its arguments."""
    rng = np.random.default_rng((seed, index))
    options, iris = _choices(rng)
    return Scene(options, *_avatar(options, iris), *_placement(rng), _background(rng))


def render(
    index: int, size: int = 64, seed: int = 0, labels: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Render one portrait; a pure function of its arguments.

    Args:
        index: number of the picture, >= 0.
        size: side in pixels.
        seed: of the whole set.
        labels: also draw the label map.

    Returns:
        (size, size, 3) RGB bytes, and (size, size) bytes of CelebAMask-HQ classes or None.

    Raises:
        ToonFacesError: a package is missing.
    """
    made = scene(index, seed)
    back_definitions, back = made.background
    face = f'<g transform="{made.transform}">{made.uses}</g>'
    svg = _document(back_definitions + made.definitions, back + face, "geometricPrecision")
    # Twice the size, then averaged: resvg's own edges are too coarse for small pictures.
    picture = np.asarray(_rasterise(svg, 2 * size).reduce(2))
    if not labels:
        return picture, None
    flat = _rasterise(_document(_flat(made.definitions), face, "crispEdges"), size)
    place = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", made.transform)[0]
    return picture, _label_map(flat, made.tilt, np.array(place, dtype=float) * size / CANVAS)


def render_background(index: int, size: int, seed: int = 0) -> np.ndarray:
    """Render what lies behind the face of a picture: (size, size, 3) RGB bytes."""
    definitions, drawing = scene(index, seed).background
    svg = _document(definitions, drawing, "geometricPrecision")
    return np.asarray(_rasterise(svg, 2 * size).reduce(2))


def _render_files(settings: ToonFacesSettings, indices: Sequence[int]) -> int:
    """Render and write some pictures; return their number."""
    for index in indices:
        picture, label_map = render(index, settings.size, settings.seed, not settings.no_labels)
        # The label map first: where the picture is, the pair is complete.
        for folder, pixels in (("labels", label_map), ("images", picture)):
            if pixels is not None:
                file = settings.out / folder / f"{index:08d}.png"
                with atomic_path(file, flush=False) as temporary:
                    Image.fromarray(pixels).save(temporary, format="PNG")
    return len(indices)


def _check_record(settings: ToonFacesSettings) -> None:
    """Store what a folder's pictures depend on, or compare with what is stored.

    Raises:
        ToonFacesError: the folder holds a set of other settings.
    """
    record = {
        "set": "toon_faces",
        "version": VERSION,
        "size": settings.size,
        "seed": settings.seed,
        "labels": not settings.no_labels,
        "attribution": 'remix of "ToonHead" by Johan Melin (https://www.johanmelin.com), CC BY 4.0',
    }
    file = settings.out / "dataset.json"
    if not file.is_file():
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
        return
    try:
        stored = dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ToonFacesError(f"{file}: is damaged; name another folder") from None
    for key, value in record.items():
        if stored.get(key) != value:
            raise ToonFacesError(
                f"{settings.out} holds a set with {key} {stored.get(key)}, not {value}; name"
                " another folder or delete it"
            )


def _missing(settings: ToonFacesSettings) -> list[int]:
    """Find the numbers of the pictures that are not there yet."""
    there = {path.stem for path in (settings.out / "images").glob("*.png")}
    if not settings.no_labels:
        there &= {path.stem for path in (settings.out / "labels").glob("*.png")}
    wanted = range(settings.start, settings.start + settings.n)
    return [i for i in wanted if f"{i:08d}" not in there]


def render_dataset(settings: ToonFacesSettings, progress: bool = True) -> None:
    """Render those of the pictures ``start`` to ``start + n - 1`` that the folder lacks.

    Args:
        settings: which pictures, and where. The folder gets images/NNNNNNNN.png,
            labels/NNNNNNNN.png and dataset.json.
        progress: show a bar.

    Raises:
        SettingError: the folder holds a set of other settings.
        ToonFacesError: a package is missing, or a worker was killed.
    """
    render(settings.start, 8, settings.seed)  # a missing package shows here, not in every worker
    with blame("out"):
        _check_record(settings)
    missing = _missing(settings)
    if not missing:
        return
    chunks = [missing[i : i + 64] for i in range(0, len(missing), 64)]
    done = settings.n - len(missing)
    workers = min(settings.workers or cores(), len(chunks))
    bar = Progress(settings.n, "rendering", "img", done=done, shown=progress)
    with worker_pool(workers) as pool, bar:
        try:
            jobs = [pool.submit(_render_files, settings, chunk) for chunk in chunks]
            for job in as_completed(jobs):
                bar.update(job.result())
        except BrokenProcessPool:
            raise ToonFacesError(
                "a worker was killed, perhaps for want of memory (fewer workers take less);"
                " the same command goes on from here"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(settings: ToonFacesSettings) -> None:
    check_writable("out", settings.out / "dataset.json")
    with if_interrupted(lambda: "the same command goes on from here"):
        render_dataset(settings)
    print(f"{settings.n} pictures of {settings.size} px in {settings.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_settings(
        ToonFacesSettings,
        _run,
        argv,
        prog="python -m Dataset.toon_faces",
        description="Render toon portraits on busy backgrounds, with label maps in the 19 classes\n"
        "of CelebAMask-HQ. What a folder holds already is not rendered again.",
        epilog="example: python -m Dataset.toon_faces --out Dataset/toon_faces_64px --n 20000",
    )


if __name__ == "__main__":
    sys.exit(main())
