"""What the scripts share that show several models side by side: flags, models, captions, files."""

import argparse
from pathlib import Path

import torch

from Evaluation.command_line import evaluation_parser, load_evaluated
from Model.complexity import macs, parameters
from Model.generator import Generator
from Util.cli import OneLineParser, check_writable
from Util.settings import at_least, fraction

PICTURE_SIDE = 128
"""Side in px of one picture where --scale does not say otherwise."""


def picture_parser(prog: str, description: str | None, examples: str) -> OneLineParser:
    """A parser with the flags that every script for pictures has."""
    parser = evaluation_parser(prog, description, examples, several=True)
    add = parser.add_argument
    add(
        "--names",
        nargs="+",
        metavar="NAME",
        help="captions of the checkpoints (default: the files' names)",
    )
    add(
        "--truncation",
        type=fraction(low_open=True),
        default=0.8,
        metavar="PSI",
        help="pull w towards each model's own mean: 1 not at all, in (0, 1] (default: %(default)s)",
    )
    add(
        "--scale",
        type=picture_scale,
        default=0,
        metavar="S",
        help="enlarge pictures by a whole number, or reduce them by 0.5, 0.25, ...; 0: to"
        f" {PICTURE_SIDE} px (default)",
    )
    add(
        "--frames",
        type=at_least(0),
        default=48,
        metavar="N",
        help="frames of the animation; 0: no animation (default: %(default)s)",
    )
    add(
        "--fps",
        type=at_least(1),
        default=12,
        metavar="F",
        help="frames per second, at most 50 (default: %(default)s)",
    )
    add(
        "--colours",
        type=int,
        default=128,
        choices=range(8, 257),
        metavar="N",
        help="colours of the animation, 8 to 256; fewer make the file smaller"
        " (default: %(default)s)",
    )
    return parser


def picture_scale(text: str) -> float:
    """Argument type: 0, a whole number, or one over a whole number."""
    value = float(text)
    if value and not (value > 0 and max(value, 1 / value) % 1 == 0):
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number nor 0.5, 0.25, ...")
    return value


def scale_of(args: argparse.Namespace, size: int) -> float:
    """The factor between a model's pictures and those that are shown.

    Raises:
        ValueError: nothing would be left of them.
    """
    scale = args.scale or PICTURE_SIDE / size
    if size * scale < 8:
        raise ValueError(f"--scale {args.scale:g} leaves less than 8 px of {size} px; take more")
    return scale


def load_models(args: argparse.Namespace, device: torch.device) -> dict[str, Generator]:
    """The generators of --ckpt by their names.

    Raises:
        ValueError: names the flag; a file is none, names are not distinct, or the models cannot
            share latents.
    """
    names = args.names or [path.stem for path in args.ckpt]
    if len(names) != len(args.ckpt) or len(set(names)) != len(names):
        raise ValueError(
            f"--names: {len(args.ckpt)} checkpoints need as many different names, got"
            f" {', '.join(names)}"
        )
    models = {
        name: load_evaluated(path, args.generated_img_size, device)
        for name, path in zip(names, args.ckpt, strict=True)
    }
    first, *others = models.values()
    for path, model in zip(args.ckpt[1:], others, strict=True):
        if (model.size, model.style_dim) != (first.size, first.style_dim):
            raise ValueError(
                f"--ckpt {path}: {model.size} px and style_dim {model.style_dim}, but"
                f" {args.ckpt[0]} has {first.size} px and {first.style_dim}; the same latents"
                " need models of one size and style_dim"
            )
    if args.info_print:
        for name, model in models.items():
            print(
                f"{name}: {model.size} px, {macs(model):,} MACs, {parameters(model):,} parameters"
            )
    return models


def caption(name: str, model: Generator) -> str:
    """Name and cost of a model, for a picture."""
    count = macs(model)
    cost = f"{count / 1e9:.1f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return f"{name}\n{cost} MACs"


def target_stem(out: Path, default: str) -> Path:
    """Where pictures go: --out without .png or .gif, or the default name in that folder.

    Raises:
        ValueError: no file can be made there.
    """
    stem = out / default if out.is_dir() else out
    if stem.suffix in (".png", ".gif"):
        stem = stem.with_suffix("")
    check_writable("out", stem)
    return stem


def with_ending(stem: Path, ending: str) -> Path:
    """``a/b`` and ``.png`` -> ``a/b.png``; unlike with_suffix it keeps the dots of a name."""
    return stem.with_name(stem.name + ending)
