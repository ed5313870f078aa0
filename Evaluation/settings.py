"""Settings that evaluations share, and what each of them returns."""

import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from Evaluation.distances import LPIPS_TRUNKS, Distance, load_distance
from Evaluation.features import ContentMask, LoadMask
from Model import bundled
from Model.checkpoint import load_generator
from Model.generator import Generator
from Model.precision import PRECISIONS, emulates_bfloat16
from Util.device import DeviceSettings
from Util.progress import tell
from Util.settings import SettingError, Settings, blame, plain, setting, some_words

PICTURE_SIDE = 128
"""Side in px that smaller pictures are enlarged to where the setting scale says nothing else."""
FRAME_SIDE = 256
"""Side in px that larger pictures of an animation are reduced to, likewise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(DeviceSettings):
    """Settings of every evaluation."""

    generated_img_size: int = setting(
        0, "image side of the model in px; 0: as the checkpoint has it (default)", low=0
    )
    seed: int = setting(0, "seed of all random draws", low=0)
    info_print: bool = setting(False, "print what is done, with which settings")
    json: bool = setting(
        False,
        "print one JSON line (figures, protocol, settings) and nothing else; the text goes to"
        " standard error",
    )

    def load(self, path: Path, device: torch.device) -> Generator:
        """Load the frozen generator of a checkpoint, refused where its images have another size."""
        with blame("ckpt"):
            generator = load_generator(path, device=device)
        check_size("generated_img_size", self.generated_img_size, path, generator)
        return generator.eval().requires_grad_(False)


def check_size(name: str, size: int | None, file: str | Path, generator: Generator) -> None:
    """Refuse a setting that gives another image side than a checkpoint has; none and 0 go with any.

    Raises:
        SettingError: names the setting and the file.
    """
    if size and size != generator.size:
        raise SettingError(
            name,
            f"{size} contradicts {file}, whose images are {generator.size} px; leave it out or give"
            f" {generator.size}",
        )


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings(EvaluationSettings):
    """Settings of evaluations whose images may be made in half precision."""

    precision: str = setting(
        "float32",
        "of the generator: float32, or bf16, some grey levels off and meant for CPUs with AMX",
        choices=tuple(PRECISIONS),
    )

    def load(self, path: Path, device: torch.device) -> Generator:
        """Load the frozen generator of a checkpoint (see there) in the precision that is set."""
        if self.precision == "bf16" and device.type == "cpu" and emulates_bfloat16():
            _warn_once(
                "--precision bf16: this processor has no bfloat16, float32 is many times as fast"
            )
        return super().load(path, device).prepare(self.precision)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(EvaluationSettings):
    """Settings of an evaluation of one model."""

    ckpt: Path = setting(
        bundled.MODEL,
        "generator checkpoint; its g_ema is taken (default: bundled)",
        metavar="FILE",
        exists="file",
    )


@dataclass(frozen=True, kw_only=True)
class PerceptualSettings(Settings):
    """Settings of a perceptual distance; the defaults depend on the model."""

    perceptual: str | None = setting(
        None,
        "perceptual distance: LPIPS with that network (weights are downloaded on first use), or the"
        " content parser's features (default: parser for the bundled models, else vgg)",
        choices=(*LPIPS_TRUNKS, "parser"),
    )
    perceptual_ckpt: Path | None = setting(
        None,
        "its torchvision weights (vgg16, alexnet or squeezenet1_1)",
        metavar="FILE",
        exists="file",
    )
    parser_ckpt: Path | None = setting(
        None,
        "parser that finds the content, a file or a name as prune.py has it (default: the bundled"
        " one for the bundled models, else Model/parser_model/79999_iter.pth)",
        metavar="FILE",
        aliases=("parser",),
        exists="parser",
    )

    def network(self, model: Path) -> str:
        """Name the network of the perceptual distance for a model."""
        return self.perceptual or ("parser" if bundled.is_bundled(model) else "vgg")

    def distance_name(self, model: Path) -> str:
        """Name the perceptual distance for a model."""
        network = self.network(model)
        return "parser distance" if network == "parser" else f"LPIPS-{network.upper()}"

    def load_distance(self, model: Path, device: torch.device) -> Distance:
        """Load the perceptual distance for a model; see `Evaluation.distances.load_distance`."""
        network, trunk = self.network(model), self.perceptual_ckpt
        return load_distance(network, trunk, lambda: self.parser_file(model), device)

    def check_parser(self, model: Path) -> None:
        """Find out before anything is loaded that the parser of the distance is missing."""
        if self.network(model) == "parser":
            self.parser_file(model)

    def parser_file(self, model: Path) -> Path:
        """The parser for a model.

        Raises:
            SettingError: there is none; says where to get it.
        """
        with blame("parser_ckpt"):
            return self.parser_ckpt or bundled.default_parser(model)


@dataclass(frozen=True, kw_only=True)
class ContentSettings(PerceptualSettings):
    """Settings of a perceptual distance and of the content."""

    content: tuple[str, ...] = setting(
        (),
        "classes of the parser that are content, such as skin,hair,eyes or all,-background"
        " (default: the parser's own)",
        metavar="CLASS,...",
        parse=some_words,
    )

    def load_mask(self, load_mask: LoadMask, model: Path, device: torch.device) -> ContentMask:
        """Load the content mask for a model."""
        with blame("parser_ckpt"):
            return load_mask(self.parser_file(model), device, self.content)


@dataclass(frozen=True, kw_only=True)
class PictureSettings(EvaluationSettings):
    """Settings of pictures that show several models side by side."""

    ckpt: tuple[Path, ...] = setting(
        (),
        "generator checkpoints; each one's g_ema is taken (default: the bundled ones)",
        metavar="FILE",
        nargs="+",
        exists="file",
    )
    names: tuple[str, ...] | None = setting(
        None, "captions of the checkpoints (default: the files' names)", nargs="+"
    )
    truncation: float = setting(
        0.8, "pull w towards each model's own mean: 1 not at all, in (0, 1]", above=0, high=1
    )
    scale: float = setting(
        0,
        "enlarge pictures by a whole number, or reduce them by 0.5, 0.25, ...; 0: as they are, but"
        f" at least {PICTURE_SIDE} px, and in an animation at most {FRAME_SIDE} px (default)",
    )
    frames: int = setting(48, "frames of the animation; 0: no animation", low=0)
    fps: int = setting(12, "frames per second, at most 50", low=1)
    colours: int = setting(
        128, "colours of the animation, 8 to 256; fewer make the file smaller", low=8, high=256
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.scale
        if scale and not (scale > 0 and max(scale, 1 / scale) % 1 == 0):
            raise SettingError("scale", f"{scale:g} is neither a whole number nor 0.5, 0.25, ...")

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """The files that are shown."""
        bundled_files = (bundled.MODEL, bundled.COMPRESSED)
        return self.ckpt or tuple(file for file in bundled_files if file.is_file())

    def scale_of(self, size: int, animated: bool = False) -> float:
        """Return the factor from the pictures of a model to those that are shown."""
        scale = self.scale or max(1, PICTURE_SIDE / size)
        if animated and not self.scale:
            scale = min(scale, FRAME_SIDE / size)
        if size * scale < 8:
            raise SettingError("scale", f"{scale:g} leaves less than 8 px of {size} px; take more")
        return scale


def finite(value: Any) -> Any:
    """Replace numbers that are not finite, at any depth, by None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        figures: by their names; those of several models or pictures are nested. Numbers that are
            not finite are null in JSON.
        protocol: how they were measured.
        lines: all of it in words.
        settings: of the evaluation.
        chosen: values that stand for settings that were left open, by name.
    """

    figures: Mapping[str, Any]
    protocol: Any
    lines: Sequence[str]
    settings: EvaluationSettings
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def show(self) -> None:
        """Print the text or, where the settings ask for it, one line of JSON.

        The text then goes to standard error, so that what is piped on is JSON alone.
        """
        rounded = ["(tf32: products of float32 rounded to TensorFloat-32, where the GPU has it)"]
        text = "\n".join([*self.lines, *(rounded if self.settings.tf32 else [])])
        if self.settings.json:
            tell(text)
            text = self._json()
        print(text)

    def _json(self) -> str:
        settings = plain(self.settings) | dict(self.chosen)
        settings = {k: v for k, v in settings.items() if k not in ("json", "info_print")}
        content = {"figures": finite(self.figures), "protocol": self.protocol, "settings": settings}
        return json.dumps(content, default=str)
