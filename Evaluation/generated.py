"""Show what several models make of the same latents: a picture, and an animated walk."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from Evaluation import sampling
from Evaluation.editing import circle
from Evaluation.settings import PictureSettings, PrecisionSettings, Result
from Evaluation.side_by_side import load_models, save_pictures, sizes, stacked, target_stem
from Model.complexity import macs
from Model.generator import Generator
from Util import memory
from Util.pictures import grid, rescale, save_png, to_uint8
from Util.progress import track
from Util.settings import SettingError, file_or_folder, setting

PROTOCOL = {
    "latents": "image i depends on seed and i; shared by the models",
    "walk": "z = cos(t) z_i + sin(t) z'_i for t in [0, 2 pi), z'_i that of seed + 1",
    "truncation": "towards each model's own mean w of 4096 z",
}
Render = Callable[[Tensor], np.ndarray]
"""z (n_sample, style_dim) -> a picture (H, W, 3) of what all models make of it."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSettings(PrecisionSettings, PictureSettings):
    """Settings of `show_generated`."""

    n_sample: int = setting(4, "latents; the images 0 ... N-1 of --seed", low=1)
    columns: int = setting(0, "pictures in a row; 0: all of a model in one (default)", low=0)
    noise: str = setting(
        "fixed",
        "layer noise: the stored maps, or a draw for every latent, which it keeps on its walk",
        choices=("fixed", "random"),
    )
    files: int = setting(
        0,
        "write the images 0 ... N-1 of --seed one by one too, at full size, as"
        " OUT_files/MODEL/000000.png, ...; 0: none (default)",
        low=0,
        metavar="N",
    )
    out: Path = setting(
        Path("generated"),
        "the picture is OUT.png, the walk OUT.gif; or a folder for generated.png and .gif"
        " (default: generated)",
        parse=file_or_folder,
    )


def show_generated(settings: GeneratedSettings) -> Result:
    """Write the picture and the walk.

    Raises:
        SettingError: names the setting and what to do.
    """
    stem = target_stem(settings.out, "generated")
    folder = stem.with_name(f"{stem.name}_files")
    models = load_models(settings, settings.pick_device())
    if settings.files:
        _check_folders(folder, models, settings.files)
    first = next(iter(models.values()))
    render, render_frame = (_renderer(settings, models, animated) for animated in (False, True))
    # The second latents are those of the next seed, so that a walk does not depend on n_sample.
    seeds = (settings.seed, settings.seed + 1)
    start, through = (sampling.draw_z(first, range(settings.n_sample), seed) for seed in seeds)
    walk = _walk(settings.frames, render_frame, start, through)
    files = save_pictures(settings, stem, render(start), walk)
    if settings.files:
        _save_files(settings, models, folder)
        files.append(str(folder))
    costs = {name: {"macs": macs(model)} for name, model in models.items()}
    lines = sizes(settings, models)
    figures: dict[str, Any] = {"files": files, "models": costs}
    if first.precision:
        shown = {name: sampling.from_z(model, start) for name, model in models.items()}
        errors = {name: grey_levels_off(models[name], latents) for name, latents in shown.items()}
        figures["grey_levels_off"] = errors
        for name, (mean, most) in errors.items():
            off = f"{mean:.2f} grey levels off float32 on average, {most:.1f} at most"
            lines.append(f"{name}: {settings.precision} is {off}")
    lines.append(f"saved {' and '.join(files)}")
    return Result(figures, PROTOCOL, lines, settings, {"ckpt": settings.checkpoints})


def grey_levels_off(model: Generator, latents: sampling.Latents) -> tuple[float, float]:
    """Compare a model's images with those in float32: mean and largest difference, of 255."""
    chosen = model.precision
    images = []
    for model.precision in (chosen, None):
        images.append(sampling.render(model, latents).clamp(-1, 1) * 127.5)
    model.precision = chosen
    difference = (images[0] - images[1]).abs()
    return difference.mean().item(), difference.max().item()


def _renderer(
    settings: GeneratedSettings, models: Mapping[str, Generator], animated: bool
) -> Render:
    """Put the models' pictures of shared latents under each other."""
    scale = settings.scale_of(next(iter(models.values())).size, animated)
    # Retraining changes the mapping too, so w is truncated towards each model's own mean.
    centres = {name: sampling.mean_latent(model, settings.seed) for name, model in models.items()}

    def block(name: str, z: Tensor) -> np.ndarray:
        model, noise = models[name], None
        if settings.noise == "random":
            noise = sampling.draw_noise(model, range(settings.n_sample), settings.seed)
        latents = sampling.from_z(model, z, settings.truncation, centres[name], noise)
        images = rescale(sampling.render(model, latents), scale)
        return grid(images, columns=settings.columns or settings.n_sample, gap=4)

    return lambda z: stacked(models, {name: block(name, z) for name in models}, scale)


def _check_folders(folder: Path, names: Iterable[str], n: int) -> None:
    """Refuse models' folders elsewhere, or with another call's pictures among the new ones.

    Raises:
        SettingError: names the folder.
    """
    new = {f"{i:06d}.png" for i in range(n)}
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise SettingError("names", f"{name!r} is no name of a folder, and --files makes one")
        if others := [file for file in (folder / name).glob("*.png") if file.name not in new]:
            raise SettingError(
                "files",
                f"{folder / name} holds {others[0].name} already; remove the folder, or change out",
            )


def _save_files(settings: GeneratedSettings, models: Mapping[str, Generator], folder: Path) -> None:
    """Write one file for every image of every model, in the model's own folder."""
    for name, model in models.items():
        centre = sampling.mean_latent(model, settings.seed)
        fixed = settings.noise == "fixed"
        batch = memory.at_once(model.size, memory.INFERENCE, 16)
        parts = list(sampling.shares(settings.files, batch))
        for part in track(parts, len(parts), name, "batch"):
            images = sampling.images(model, part, settings.seed, settings.truncation, centre, fixed)
            for i, pixels in zip(part, to_uint8(images), strict=True):
                save_png(folder / name / f"{i:06d}.png", pixels)


def _walk(n: int, render: Render, start: Tensor, through: Tensor) -> Iterator[np.ndarray]:
    """Render a closed walk; the first frame is the picture of ``start``."""
    for k in track(range(n), n, "walking", "frame"):
        yield render(circle(start, through, k / n))
