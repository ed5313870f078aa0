"""Show several models side by side: their generators, captions and files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from Evaluation.settings import PictureSettings
from Model.complexity import macs, parameters
from Model.generator import Generator
from Util.animation import save_gif
from Util.cli import check_writable
from Util.pictures import captioned, save_png, text_size
from Util.settings import SettingError


def load_models(settings: PictureSettings, device: torch.device) -> dict[str, Generator]:
    """Load the generators by their names.

    Raises:
        SettingError: a file holds none, names are not distinct, or the models cannot share latents.
    """
    files = settings.checkpoints
    names = settings.names or tuple(path.stem for path in files)
    if len(names) != len(files) or len(set(names)) != len(names):
        raise SettingError(
            "names",
            f"has {', '.join(names)}; {len(files)} checkpoints need as many different names",
        )
    loaded = [settings.load(path, device) for path in files]
    first, *others = loaded
    for path, model in zip(files[1:], others, strict=True):
        if (model.size, model.style_dim) != (first.size, first.style_dim):
            raise SettingError(
                "ckpt",
                f"{path}: {model.size} px and style_dim {model.style_dim}, but {files[0]} has"
                f" {first.size} px and {first.style_dim}; the same latents need models of one size"
                " and style_dim",
            )
    return dict(zip(names, loaded, strict=True))


def sizes(settings: PictureSettings, models: Mapping[str, Generator]) -> list[str]:
    """Describe each model in a line, if the settings ask for details."""
    return [
        f"{name}: {model.size} px, {macs(model):,} MACs, {parameters(model):,} parameters"
        for name, model in models.items()
        if settings.info_print
    ]


def stacked(
    models: Mapping[str, Generator], blocks: Mapping[str, np.ndarray], scale: float, gap: int = 8
) -> np.ndarray:
    """Stack the models' pictures, shown at this scale, each beside its name and cost."""
    captions = {}
    for name, block in blocks.items():
        count = macs(models[name])
        cost = f"{count / 1e9:.1f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"
        captions[f"{name}\n{cost} MACs"] = block
    size = text_size(round(next(iter(models.values())).size * scale))
    return captioned(captions, gap, size=size)


def target_stem(out: Path, default: str) -> Path:
    """Find where pictures go: ``out`` without .png or .gif, or the default name in that folder.

    Raises:
        SettingError: no file can be made there.
    """
    stem = out / default if out.is_dir() else out
    if stem.suffix in (".png", ".gif"):
        stem = stem.with_suffix("")
    check_writable("out", stem.with_name(f"{stem.name}.png"))
    return stem


def save_pictures(
    settings: PictureSettings, stem: Path, picture: np.ndarray, frames: Iterable[np.ndarray]
) -> list[str]:
    """Write a picture and, of its frames if there are any, an animation; return the files."""
    # Not with_suffix, which would take a dot within the name for an ending.
    png, gif = (stem.with_name(stem.name + ending) for ending in (".png", ".gif"))
    save_png(png, picture)
    if moving := list(frames):
        save_gif(gif, moving, settings.fps, settings.colours)
        return [str(png), str(gif)]
    return [str(png)]
