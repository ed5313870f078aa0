"""Show faces of several models edited (mixed, morphed, moved), and measure what survives."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from Evaluation import editing, sampling
from Evaluation.distances import Distance, within_content
from Evaluation.features import masks_of
from Evaluation.projection import load_projection
from Evaluation.sampling import Latents
from Evaluation.settings import ContentSettings, LoadMask, PictureSettings, Result
from Evaluation.side_by_side import load_models, save_pictures, sizes, stacked, target_stem
from Evaluation.walking import KINDS, Walk, find_walks, walking_distances
from Model.generator import Generator
from Util.pictures import captioned, framed, grid, headed, rescale, text_size, with_text
from Util.progress import track
from Util.settings import SettingError, blame, file_or_folder, setting

STEMS = {"mixing": "style_mixing", "morphing": "morphing", "directions": "directions"}
Numbers = tuple[int, ...] | None
Files = tuple[Path, ...] | None

FACES = (
    "faces of {}: numbers of images of --seed (default: {}), or with --projection_{} of pictures in"
    " the file, from 0 (default: all)"
)
PROJECTION = "take {} from projected pictures: a file for each checkpoint"


@dataclass(frozen=True, kw_only=True)
class EditedSettings(ContentSettings, PictureSettings):
    """Settings of `show_edited`."""

    mode: str = setting("mixing", "what to do", choices=tuple(STEMS))
    a: Numbers = setting(None, FACES.format("A", "0,1,2, to walk 0", "a"))
    projection_a: Files = setting(
        None, PROJECTION.format("A"), nargs="+", metavar="NPZ", exists="file"
    )
    b: Numbers = setting(
        None, FACES.format("B", "3,4,5,6,7, to morph as many as in A from 3 on", "b")
    )
    projection_b: Files = setting(
        None, PROJECTION.format("B"), nargs="+", metavar="NPZ", exists="file"
    )
    layers: str | None = setting(
        None,
        "mixing: layers of w+ that come from B; directions: those that move. coarse (0-3), middle"
        " (4-7), fine (8 and on), all, or a range such as 2-5 (default: coarse to mix, all to"
        " move)",
    )
    mix_noise: bool = setting(
        False,
        "mixing: the noise of these layers comes from B too; every drawn face then has layer noise"
        " of its own in place of the stored maps",
    )
    space: str = setting("w", "morphing: linear in w, or spherical in z", choices=("w", "z"))
    steps: int = setting(
        7,
        "pictures of a row, at least 3: morphing from A to B with both, directions from one end to"
        " the other",
        low=3,
    )
    directions: str = setting(
        "principal",
        "directions: the principal components of w, or the eigenvectors of the modulations, five a"
        " block; those of the first checkpoint serve all",
        choices=KINDS,
    )
    direction: tuple[int, ...] = setting((0, 1, 2), "directions: their numbers, from 0 on")
    strength: float = setting(
        2.0, "directions: how far, in standard deviations of w along them", above=0
    )
    out: Path | None = setting(
        None,
        "the picture is OUT.png, the animation OUT.gif; or a folder for them (default:"
        " style_mixing, morphing or directions)",
        parse=file_or_folder,
    )


@dataclass(frozen=True)
class Faces:
    """The faces of a model.

    Attributes:
        generator: the model.
        a: faces A.
        b: faces B.
        between: t in [0, 1] -> faces between A (0) and B (1).
    """

    generator: Generator
    a: Latents
    b: Latents
    between: Callable[[float], Latents]


Content = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) -> the same, each multiplied by its own content mask."""

Edit = tuple[np.ndarray, dict[str, float]]
"""The picture of one model, and its distances."""

Moment = Callable[[Faces, float], tuple[Latents, int]]
"""Faces of a model, t in [0, 1] -> latents of an animation at t, and how many are in a row."""


def show_edited(settings: EditedSettings, load_mask: LoadMask) -> Result:
    """Edit, measure, and write the picture and the animation.

    Args:
        settings: which faces of which models, and how.
        load_mask: see `LoadMask`.

    Raises:
        SettingError: names the setting and what to do.
    """
    device, first, mode = settings.pick_device(), settings.checkpoints[0], settings.mode
    settings.parser_file(first)
    stem = target_stem(settings.out or Path(STEMS[mode]), STEMS[mode])
    models = load_models(settings, device)
    faces = _load_faces(settings, models)
    generator = next(iter(models.values()))
    scale = settings.scale_of(generator.size)
    edit, moment = _edit_of(settings, generator)
    mask = settings.load_mask(load_mask, first, device)
    distance = within_content(settings.load_distance(first, device))
    empty = 0

    def content(pictures: Tensor) -> Tensor:
        nonlocal empty
        masks = masks_of(mask, pictures)
        empty += int((masks.flatten(1).amax(1) == 0).sum())
        return pictures * masks

    with torch.no_grad():
        edits = {
            name: edit(own, scale, content, distance)
            for name, own in track(faces.items(), len(faces), mode, "model")
        }
    picture = stacked(models, {name: shown for name, (shown, _) in edits.items()}, scale, gap=24)
    size = text_size(round(generator.size * scale))
    picture = with_text(picture, _caption(settings, generator.n_latent), size)
    frame_scale = settings.scale_of(generator.size, animated=True)
    frames = _frames(models, faces, frame_scale, moment, settings.frames)
    files = save_pictures(settings, stem, picture, frames)
    distances = {name: found for name, (_, found) in edits.items()}
    lines = [*sizes(settings, models), f"content-aware {settings.distance_name(first)}"]
    if empty:
        lines.append(f"{empty} pictures have no content; the distances leave them out")
    lines += [_table(distances), f"saved {' and '.join(files)}"]
    chosen = {"ckpt": settings.checkpoints, "perceptual": settings.network(first)}
    figures = {"files": files, "models": distances}
    return Result(figures, _protocol(settings, mask.chosen), lines, settings, chosen)


def _edit_of(
    settings: EditedSettings, generator: Generator
) -> tuple[Callable[..., Edit], Moment | None]:
    """What the mode does to the faces of a model, and what moves in the animation if any does."""
    if settings.mode == "morphing":
        return partial(_morph, n=settings.steps), lambda faces, t: (faces.between(t), len(faces.a))
    with blame("layers"):
        named = settings.layers
        if named is None:
            named = "coarse" if settings.mode == "mixing" else "all"
        layers = editing.style_layers(named, generator.n_latent)
    if settings.mode == "mixing":
        return partial(_mix, layers=layers, noise=settings.mix_noise), None
    with blame("direction"):
        walks = find_walks(
            generator, settings.directions, settings.direction, layers, settings.seed
        )
    last = settings.steps - 1
    strengths = [settings.strength * (2 * i - last) / last for i in range(settings.steps)]

    def moment(faces: Faces, t: float) -> tuple[Latents, int]:
        moved = [walk.to(faces.a, (2 * t - 1) * settings.strength).w_plus for walk in walks]
        noise = [maps.repeat(len(walks) if len(maps) > 1 else 1, 1, 1, 1) for maps in faces.a.noise]
        return Latents(torch.cat(moved), noise), len(faces.a)

    return partial(_walk, walks=walks, strengths=strengths), moment


def _load_faces(settings: EditedSettings, models: Mapping[str, Generator]) -> dict[str, Faces]:
    """Find the faces A and B of every model."""
    projected = [_projected(settings, side, models) for side in "ab"]
    a = _numbers("a", settings.a, projected[0], range(1 if settings.mode == "directions" else 3))
    n = 5 if settings.mode == "mixing" else len(a)
    b = _numbers("b", settings.b, projected[1], range(3, 3 + n))
    if settings.mode == "morphing":
        if len(a) != len(b):
            text = f"has {len(a)} faces and b {len(b)}; a morph goes from each to one"
            raise SettingError("a", text)
        if settings.space == "z" and any(projected):
            raise SettingError("space", "z: projected pictures have no z; take space w")
    return {
        name: _faces(settings, model, (a, b), [found.get(name) for found in projected])
        for name, model in models.items()
    }


def _projected(
    settings: EditedSettings, side: str, models: Mapping[str, Generator]
) -> dict[str, Latents]:
    """Load the projected pictures of a side by model, none if there are no files."""
    name, latents = f"projection_{side}", {}
    files: Files = getattr(settings, name)
    if files and len(files) != len(models):
        raise SettingError(
            name,
            f"has {len(files)} files for {len(models)} checkpoints; a projection belongs to one"
            " model, so give one each",
        )
    for file, (model, generator) in zip(files or (), models.items(), strict=False):
        with blame(name):
            found = load_projection(file, generator)
        latents[model] = Latents(found.w_plus, found.noise)
    return latents


def _numbers(
    side: str, numbers: Numbers, projected: Mapping[str, Latents], default: Sequence[int]
) -> Sequence[int]:
    """Choose the faces that the settings name among those there are."""
    n = min(map(len, projected.values()), default=None)
    if numbers is None:
        return default if n is None else range(n)
    if not numbers or min(numbers) < 0 or (n is not None and max(numbers) >= n):
        known = "numbers from 0 on" if n is None else f"the file has 0 to {n - 1}"
        raise SettingError(side, f"{','.join(map(str, numbers))}: {known}")
    return numbers


def _faces(
    settings: EditedSettings,
    generator: Generator,
    numbers: Sequence[Sequence[int]],
    projected: Sequence[Latents | None],
) -> Faces:
    """Draw the faces A and B of a model by their numbers, or take them from projected pictures."""
    centre = sampling.mean_latent(generator, settings.seed)
    z_a, z_b = (sampling.draw_z(generator, side, settings.seed) for side in numbers)

    def mapped(z: Tensor, own: Sequence[int] = ()) -> Latents:
        noise = sampling.draw_noise(generator, own, settings.seed) if own else None
        return sampling.from_z(generator, z, settings.truncation, centre, noise)

    a, b = (
        mapped(z, side if settings.mix_noise else ()) if stored is None else stored[side]
        for z, stored, side in zip((z_a, z_b), projected, numbers, strict=True)
    )
    if settings.space == "z":
        return Faces(generator, a, b, lambda t: mapped(editing.spherical(z_a, z_b, t)))
    return Faces(generator, a, b, lambda t: editing.morph(a, b, t))


def _mix(
    faces: Faces,
    scale: float,
    content: Content,
    distance: Distance,
    layers: Sequence[int],
    noise: bool,
) -> Edit:
    """Mix the styles of a model's faces."""
    a, b = faces.a, faces.b
    all_latents = (a, b, editing.mix(a, b, layers, noise))
    left, top, mixed = (sampling.render(faces.generator, latents) for latents in all_latents)
    distances = editing.mixing_distances(content(left), content(top), content(mixed), distance)

    def shown(images: Tensor, columns: int) -> np.ndarray:
        return grid(rescale(images, scale), columns, gap=4)

    grids = (shown(left, 1), shown(top, len(b)), shown(mixed, len(b)))
    return framed(*grids, names=("A", "B")), distances


def _morph(faces: Faces, scale: float, content: Content, distance: Distance, n: int) -> Edit:
    """Morph a model's faces in ``n`` pictures, one row each."""
    steps = torch.linspace(0, 1, n).tolist()
    frames = [sampling.render(faces.generator, faces.between(t)) for t in steps]
    rows = rescale(torch.stack(frames, dim=1).flatten(0, 1), scale)
    distances = editing.morphing_distances([content(frame) for frame in frames], distance)
    side = rows.shape[-1]
    heads = ["A", *(f"{k}/{n - 1}" for k in range(1, n - 1)), "B"]
    shown = grid(rows, columns=n, gap=4)
    if side >= 2 * text_size(side):
        shown = np.concatenate([shown, headed(heads, shown.shape[1], 4, text_size(side))])
    return shown, distances


def _caption(settings: EditedSettings, n_latent: int) -> str:
    """What the picture shows, in words."""
    psi = f"Truncation {settings.truncation:g}."
    if settings.mode == "morphing":
        way = "linearly in w" if settings.space == "w" else "along the arc in z"
        return f"Morphing from A to B, {way}; numbers: the share of the way. {psi}"
    if settings.mode == "directions":
        return (
            "Walks along directions of w from the face in the middle (0): standard deviations of w"
            f" along each. {psi}"
        )
    chosen = settings.layers or "coarse"
    layers = editing.style_layers(chosen, n_latent)
    last = layers.stop - 1
    which = f"layer {last}" if len(layers) == 1 else f"layers {layers.start} to {last}"
    # Layer 0 of w+ is that of the convolution at 4 px, two each are those of every further size;
    # the last one is a ToRGB's alone.
    low, high = (2 ** (2 + (min(i, n_latent - 2) + 1) // 2) for i in (layers.start, last))
    pixels = f"{low} px" if low == high else f"{low} to {high} px"
    named = f"{chosen}, " if chosen in editing.STYLE_LAYERS else ""
    noise = " and the noise" if settings.mix_noise else ""
    return (
        f"Style mixing: the face A of the row, with the styles{noise} of the face B of the column"
        f" in {which} ({named}{pixels}) of 0 to {n_latent - 1}. {psi}"
    )


def _walk(
    faces: Faces,
    scale: float,
    content: Content,
    distance: Distance,
    walks: Sequence[Walk],
    strengths: Sequence[float],
) -> Edit:
    """Walk along directions: one block of rows each, one row a face, one column a strength."""
    unedited = content(sampling.render(faces.generator, faces.a))
    blocks, distances = {}, []
    for walk in walks:
        frames = [sampling.render(faces.generator, walk.to(faces.a, s)) for s in strengths]
        rows = rescale(torch.stack(frames, dim=1).flatten(0, 1), scale)
        blocks[walk.name] = grid(rows, columns=len(strengths), gap=4)
        masked = [content(frame) for frame in frames]
        distances.append(walking_distances(unedited, masked, distance))
    width = next(iter(blocks.values())).shape[1]
    head = headed([f"{s:+.2g} sd" if s else "0" for s in strengths], width, gap=4)
    means = {k: torch.tensor([d[k] for d in distances]).nanmean().item() for k in distances[0]}
    return captioned({"": head, **blocks}, gap=8), means


def _frames(
    models: Mapping[str, Generator],
    faces: Mapping[str, Faces],
    scale: float,
    moment: Moment | None,
    n: int,
) -> Iterator[np.ndarray]:
    """Render an animation that goes from one end to the other and back, slowly at both."""
    if moment is None:
        return
    for k in track(range(n), n, "animation", "frame"):
        t = (1 - math.cos(2 * math.pi * k / n)) / 2
        blocks = {}
        for name, own in faces.items():
            latents, columns = moment(own, t)
            images = rescale(sampling.render(own.generator, latents), scale)
            blocks[name] = grid(images, columns, gap=4)
        yield stacked(models, blocks, scale)


def _table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Format one line for each model, one column for each distance."""
    width = max(map(len, figures)) + 2
    lines = [" " * width + "".join(f"{key:>14}" for key in next(iter(figures.values())))]
    for name, distances in figures.items():
        cells = "".join(f"{value:>14.4f}" for value in distances.values())
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def _protocol(settings: EditedSettings, content: str) -> dict[str, str]:
    """Say what the distances mean."""
    what = "means over all pairs of A and B"
    if settings.mode != "mixing":
        what = f"means over the {settings.steps} pictures of each row and over the rows"
    name = settings.distance_name(settings.checkpoints[0])
    mask = f"content mask of {content}" if content else "content mask"
    return {"distance": f"{name} of images times their own {mask}", "of": what}
