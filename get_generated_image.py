"""Shows what several generators make of the same latents: a picture, and an animated walk."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from Evaluation import sampling
from Evaluation.command_line import print_json
from Evaluation.editing import circle, from_z, synthesise
from Evaluation.picture_command_line import (
    caption,
    load_models,
    picture_parser,
    scale_of,
    target_stem,
    with_ending,
)
from Model.complexity import macs
from Model.generator import Generator
from Util.animation import save_gif
from Util.cli import OneLineParser, run_script
from Util.device import pick_device
from Util.pictures import captioned, grid, rescale, save_png
from Util.settings import at_least, file_path

EXAMPLES = """examples:
  python3 get_generated_image.py
      the bundled models: generated.png and the walk generated.gif
  python3 get_generated_image.py --ckpt FULL.pt PRUNED.pt --names full pruned \\
      --n_sample 16 --columns 8 --frames 0 --out faces.png
      two rows of 8 pictures from each of two checkpoints, without a walk
"""


def build_parser() -> OneLineParser:
    """Declare the command line."""
    parser = picture_parser("get_generated_image.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--n_sample",
        type=at_least(1),
        default=4,
        metavar="N",
        help="latents; the images 0 ... N-1 of --seed (default: %(default)s)",
    )
    add(
        "--columns",
        type=at_least(0),
        default=0,
        metavar="N",
        help="pictures in a row; 0: all of a model in one (default)",
    )
    add(
        "--noise",
        choices=("fixed", "random"),
        default="fixed",
        help="layer noise: the stored maps, or a draw for every latent, which it keeps on its walk"
        " (default: %(default)s)",
    )
    add(
        "--out",
        type=file_path,
        default=Path("generated"),
        metavar="NAME",
        help="the picture is NAME.png, the walk NAME.gif; or a folder for generated.png and .gif"
        " (default: %(default)s)",
    )
    return parser


Render = Callable[[Tensor], np.ndarray]
"""z (n_sample, style_dim) -> a picture (H, W, 3) of what all models make of it."""


def renderer(args: argparse.Namespace, models: Mapping[str, Generator]) -> Render:
    """Make the picture of every model under each other.

    The latents are shared; the mapping networks are not, since retraining changes them too. So w is
    truncated towards each model's own mean.
    """
    scale = scale_of(args, next(iter(models.values())).size)
    captions = {name: caption(name, model) for name, model in models.items()}
    centres = {name: sampling.mean_latent(model, args.seed) for name, model in models.items()}

    def block(name: str, z: Tensor) -> np.ndarray:
        model, noise = models[name], None
        if args.noise == "random":
            noise = sampling.layer_noise(model, range(args.n_sample), args.seed)
        latents = from_z(model, z, args.truncation, centres[name], noise)
        images = rescale(synthesise(model, latents), scale)
        return grid(images, columns=args.columns or args.n_sample, gap=4)

    return lambda z: captioned({captions[name]: block(name, z) for name in models}, gap=8)


def walk(
    args: argparse.Namespace, render: Render, start: Tensor, through: Tensor
) -> list[np.ndarray]:
    """Frames of a closed walk; the first one is the picture of ``start``."""
    turns = tqdm(range(args.frames), desc="walking", unit="frame")
    return [render(circle(start, through, k / args.frames)) for k in turns]


def run(args: argparse.Namespace) -> None:
    """Make picture and walk.

    Raises:
        ValueError: naming the flag or file.
    """
    stem = target_stem(args.out, "generated")
    models = load_models(args, pick_device(args.device))
    render, first = renderer(args, models), next(iter(models.values()))
    # The second latents are those of the next seed, so that a walk does not depend on --n_sample.
    start, through = (
        sampling.latents(first, range(args.n_sample), seed) for seed in (args.seed, args.seed + 1)
    )
    files = [with_ending(stem, ".png")]
    save_png(files[0], render(start))
    if args.frames:
        files.append(with_ending(stem, ".gif"))
        save_gif(files[1], walk(args, render, start, through), args.fps, args.colours)
    print("saved", " and ".join(map(str, files)))
    protocol = {
        "latents": "image i depends on seed and i; shared by the models",
        "walk": "z = cos(t) z_i + sin(t) z'_i for t in [0, 2 pi), z'_i that of seed + 1",
        "truncation": "towards each model's own mean w of 4096 z",
    }
    figures = {name: {"macs": macs(model)} for name, model in models.items()}
    print_json(args, {"files": list(map(str, files)), "models": figures}, protocol)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
