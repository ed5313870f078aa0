"""Edits faces in the latent space of several generators: style mixing, or morphing."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from Compression.content import parser_for
from Evaluation import editing, sampling
from Evaluation.command_line import (
    add_perceptual_flags,
    distance_name,
    perceptual_for,
    print_json,
)
from Evaluation.distances import Distance
from Evaluation.editing import Latents, synthesise
from Evaluation.picture_command_line import (
    caption,
    load_models,
    picture_parser,
    scale_of,
    target_stem,
    with_ending,
)
from Evaluation.projection import load_projection
from Model.generator import Generator
from Util.animation import save_gif
from Util.cli import OneLineParser, run_script
from Util.device import pick_device
from Util.pictures import captioned, framed, grid, rescale, save_png
from Util.settings import at_least, blame, file_path, integers

EXAMPLES = """Every face of A is edited towards faces of B. Mixing shows A in the first column, B in
the first row, and between them A with the styles of B in some layers. Morphing shows one row from
each A to the B of the same place, and an animation that goes there and back.

The figures are perceptual distances of unedited to edited pictures, each multiplied by its own
content mask. Mixing: a_to_mixed is small where identity survives, a_to_b is what different faces
of the model are apart. Morphing: nearer_end, from the pictures between the ends to the end that is
closer, is small where they still show one of the two; step is between neighbours.

examples:
  python3 get_edited_image.py
      style_mixing.png of the bundled models, with how much of each face survives
  python3 get_edited_image.py --layers fine --a 0,1 --b 5,6,7
  python3 get_edited_image.py --mode morphing --a 0,1 --b 2,3 --space z
      morphing.png and morphing.gif
  python3 get_edited_image.py --ckpt FULL.pt SMALL.pt --projection_a full.npz small.npz
      mixes projected portraits, one file of get_projected_image.py for each checkpoint
"""
STEMS = {"mixing": "style_mixing", "morphing": "morphing"}


def build_parser() -> OneLineParser:
    """Declare the command line."""
    parser = picture_parser("get_edited_image.py", __doc__, EXAMPLES)
    add_perceptual_flags(parser)
    add = parser.add_argument
    add("--mode", choices=STEMS, default="mixing", help="what to do (default: %(default)s)")
    for side, default in (("a", "0,1,2"), ("b", "3,4,5,6,7, to morph as many as in A from 3 on")):
        add(
            f"--{side}",
            type=integers,
            metavar="I,J,...",
            help=f"faces of {side.upper()}: numbers of images of --seed (default: {default}), or"
            f" with --projection_{side} of pictures in the file, from 0 (default: all)",
        )
        add(
            f"--projection_{side}",
            type=file_path,
            nargs="+",
            metavar="NPZ",
            help=f"take {side.upper()} from projected pictures: a file for each checkpoint",
        )
    add(
        "--layers",
        default="coarse",
        metavar="L",
        help="mixing: layers of w+ that come from B: coarse (0-3), middle (4-7), fine (8 and on),"
        " or a range such as 2-5 (default: %(default)s)",
    )
    add(
        "--space",
        choices=("w", "z"),
        default="w",
        help="morphing: linear in w, or spherical in z (default: %(default)s)",
    )
    add(
        "--steps",
        type=at_least(3),
        default=7,
        metavar="N",
        help="morphing: pictures from A to B, with both, at least 3 (default: %(default)s)",
    )
    add(
        "--out",
        type=file_path,
        metavar="NAME",
        help="the picture is NAME.png, the animation of a morph NAME.gif; or a folder for them"
        " (default: style_mixing or morphing)",
    )
    return parser


class Faces:
    """The faces A and B of every model.

    Raises:
        ValueError: names the flag.
    """

    def __init__(self, args: argparse.Namespace, models: Mapping[str, Generator]) -> None:
        self.args, self.models = args, models
        self.centres = {name: sampling.mean_latent(m, args.seed) for name, m in models.items()}
        self.projected = {side: self._projected(side) for side in "ab"}
        self.numbers = {"a": self._numbers("a", range(3))}
        n = len(self.numbers["a"]) if args.mode == "morphing" else 5
        self.numbers["b"] = self._numbers("b", range(3, 3 + n))
        if args.mode == "morphing":
            self._check_morph()
        else:
            with blame("layers"):
                n_latent = next(iter(models.values())).n_latent
                self.layers = editing.style_layers(args.layers, n_latent)

    def _check_morph(self) -> None:
        n_a, n_b = len(self.numbers["a"]), len(self.numbers["b"])
        if n_a != n_b:
            raise ValueError(f"--a has {n_a} faces and --b {n_b}; a morph goes from each to one")
        if self.args.space == "z" and any(self.projected.values()):
            raise ValueError("--space z: projected pictures have no z; take --space w")

    def _projected(self, side: str) -> dict[str, Latents]:
        flag, files = f"projection_{side}", vars(self.args)[f"projection_{side}"] or []
        if files and len(files) != len(self.models):
            raise ValueError(
                f"--{flag}: {len(files)} files for {len(self.models)} checkpoints; a projection"
                " belongs to one model, so give one each"
            )
        with blame(flag):
            found = {
                name: load_projection(file, model)
                for file, (name, model) in zip(files, self.models.items(), strict=False)
            }
        return {name: Latents(p.w_plus, p.noise) for name, p in found.items()}

    def _numbers(self, side: str, default: Sequence[int]) -> Sequence[int]:
        n = min((len(latents) for latents in self.projected[side].values()), default=None)
        numbers = vars(self.args)[side]
        if numbers is None:
            return default if n is None else range(n)
        if not numbers or min(numbers) < 0 or (n is not None and max(numbers) >= n):
            known = "numbers from 0 on" if n is None else f"the file has 0 to {n - 1}"
            raise ValueError(f"--{side} {','.join(map(str, numbers))}: {known}")
        return tuple(numbers)

    def z(self, name: str, side: str) -> Tensor:
        """Draw z (N, style_dim), the same for all models."""
        return sampling.latents(self.models[name], self.numbers[side], self.args.seed)

    def from_z(self, name: str, z: Tensor) -> Latents:
        """Map z, truncated towards the model's own mean."""
        return editing.from_z(self.models[name], z, self.args.truncation, self.centres[name])

    def latents(self, name: str, side: str) -> Latents:
        """Faces A or B of a model."""
        if self.projected[side]:
            return self.projected[side][name][self.numbers[side]]
        return self.from_z(name, self.z(name, side))

    def morph(self, name: str, t: float) -> Latents:
        """Faces between A (t = 0) and B (t = 1) of a model."""
        if self.args.space == "z":
            z = editing.spherical(self.z(name, "a"), self.z(name, "b"), t)
            return self.from_z(name, z)
        return editing.morph(self.latents(name, "a"), self.latents(name, "b"), t)


Content = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) -> the same, each multiplied by its own content mask."""

Result = tuple[np.ndarray, dict[str, float]]
"""The picture of one model, and its distances."""


def mix(faces: Faces, name: str, scale: float, content: Content, distance: Distance) -> Result:
    """Mix the styles of a model's faces."""
    a, b = faces.latents(name, "a"), faces.latents(name, "b")
    all_latents = (a, b, editing.mix(a, b, faces.layers))
    left, top, mixed = (synthesise(faces.models[name], latents) for latents in all_latents)
    distances = editing.mixing_distances(content(left), content(top), content(mixed), distance)

    def shown(images: Tensor, columns: int) -> np.ndarray:
        return grid(rescale(images, scale), columns, gap=4)

    return framed(shown(left, 1), shown(top, len(b)), shown(mixed, len(b))), distances


def morph(faces: Faces, name: str, scale: float, content: Content, distance: Distance) -> Result:
    """Morph a model's faces, one row each."""
    steps = torch.linspace(0, 1, faces.args.steps).tolist()
    frames = [synthesise(faces.models[name], faces.morph(name, t)) for t in steps]
    rows = rescale(torch.stack(frames, dim=1).flatten(0, 1), scale)
    distances = editing.morphing_distances([content(frame) for frame in frames], distance)
    return grid(rows, columns=len(steps), gap=4), distances


def morph_frames(
    faces: Faces, captions: Mapping[str, str], scale: float, n: int
) -> Iterator[np.ndarray]:
    """Pictures of an animation that goes from A to B and back, slowly at both."""
    for k in tqdm(range(n), desc="morphing", unit="frame"):
        t = (1 - math.cos(2 * math.pi * k / n)) / 2
        blocks = {}
        for name, model in faces.models.items():
            images = rescale(synthesise(model, faces.morph(name, t)), scale)
            blocks[captions[name]] = grid(images, columns=len(images), gap=4)
        yield captioned(blocks, gap=8)


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """One line for each model, one column for each distance."""
    width = max(map(len, figures)) + 2
    lines = [" " * width + "".join(f"{key:>14}" for key in next(iter(figures.values())))]
    for name, distances in figures.items():
        cells = "".join(f"{value:>14.4f}" for value in distances.values())
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Edit, measure and show.

    Raises:
        ValueError: naming the flag or file.
    """
    device = pick_device(args.device)
    stem = target_stem(args.out or Path(STEMS[args.mode]), STEMS[args.mode])
    models = load_models(args, device)
    faces = Faces(args, models)
    scale = scale_of(args, next(iter(models.values())).size)
    parser = parser_for(args.parser_ckpt, args.ckpt[0], device)
    distance = perceptual_for(args, args.ckpt[0], device)
    edit: Callable[..., Result] = mix if args.mode == "mixing" else morph
    with torch.no_grad():
        results = {
            name: edit(faces, name, scale, lambda x: x * parser(x), distance)
            for name in tqdm(models, desc=args.mode, unit="model")
        }
    captions = {name: caption(name, model) for name, model in models.items()}
    files = [with_ending(stem, ".png")]
    save_png(files[0], captioned({captions[n]: r[0] for n, r in results.items()}, gap=24))
    if args.mode == "morphing" and args.frames:
        files.append(with_ending(stem, ".gif"))
        frames = list(morph_frames(faces, captions, scale, args.frames))
        save_gif(files[1], frames, args.fps, args.colours)
    figures = {name: distances for name, (_, distances) in results.items()}
    print(f"content-aware {distance_name(args.perceptual)}\n{table(figures)}")
    print("saved", " and ".join(map(str, files)))
    made = {"files": list(map(str, files)), "models": figures}
    print_json(args, made, protocol(args))


def protocol(args: argparse.Namespace) -> dict[str, str]:
    """What the distances mean, for --json."""
    what = {
        "mixing": "means over all pairs of A and B",
        "morphing": f"means over the {args.steps} pictures of each row and over the rows",
    }
    distance = f"{distance_name(args.perceptual)} of images times their own content mask"
    return {"distance": distance, "of": what[args.mode]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
