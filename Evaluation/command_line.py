"""What the evaluation scripts' command lines share: the flags of the model, and the output."""

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from Evaluation.distances import LPIPS_TRUNKS, Distance, ParserDistance, at_most, load_lpips
from Model import bundled
from Model.checkpoint import load_face_parser, load_generator
from Model.face_parser import fold_batch_norm
from Model.generator import Generator
from Util.cli import OneLineParser
from Util.settings import at_least, blame, file_path


def evaluation_parser(
    prog: str, description: str | None, examples: str, several: bool = False
) -> OneLineParser:
    """A parser with the flags that every evaluation script has.

    Args:
        prog: the script's name.
        description: what it does.
        examples: shown below the flags.
        several: --ckpt takes several checkpoints, shown side by side.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--generated_img_size",
        type=at_least(0),
        default=0,
        help="image side of the model in px; 0: as the checkpoint has it (default)",
    )
    models = [bundled.MODEL, *([bundled.COMPRESSED] if bundled.COMPRESSED.is_file() else [])]
    add(
        "--ckpt",
        type=file_path,
        nargs="+" if several else None,
        default=models if several else bundled.MODEL,
        metavar="FILE",
        help="generator checkpoint; its g_ema is taken (default: bundled)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="of all random draws (default: %(default)s)")
    add("--info_print", action="store_true", help="print what is done, with which settings")
    add("--json", action="store_true", help="end with one JSON line: figures, protocol, settings")
    return parser


def add_perceptual_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `perceptual_for` and `parser_for`."""
    add = parser.add_argument
    add(
        "--perceptual",
        choices=(*LPIPS_TRUNKS, "parser"),
        help="perceptual distance: LPIPS with that network (weights are downloaded on first use),"
        " or the content parser's features (default: parser for the bundled models, else vgg)",
    )
    add(
        "--perceptual_ckpt",
        type=file_path,
        metavar="FILE",
        help="torchvision weights of the LPIPS network (vgg16, alexnet or squeezenet1_1)",
    )
    add(
        "--parser_ckpt",
        type=file_path,
        metavar="FILE",
        help="face parser that finds the content (default: the bundled one for the bundled models,"
        " else Model/parser_model/79999_iter.pth)",
    )


def load_evaluated(path: Path, size: int, device: torch.device) -> Generator:
    """The frozen generator of --ckpt.

    Raises:
        ValueError: names the flag and what is wrong with the file or the size.
    """
    with blame("ckpt"):
        generator = load_generator(path, device=device, size=size or None)
    return generator.eval().requires_grad_(False)


def perceptual_for(args: argparse.Namespace, model: Path, device: torch.device) -> Distance:
    """The perceptual distance of --perceptual, whose default it fills in.

    Returns:
        See `Distance`; images larger than 256 px are reduced to it, as LPIPS is meant to be used.

    Raises:
        ValueError: names the flag and what to do.
    """
    args.perceptual = args.perceptual or ("parser" if bundled.is_bundled(model) else "vgg")
    if args.perceptual == "parser":
        file = args.parser_ckpt or bundled.default_parser(model)
        with blame("parser_ckpt"):
            network: Distance = ParserDistance(fold_batch_norm(load_face_parser(file, device)))
    else:
        with blame("perceptual_ckpt") if args.perceptual_ckpt else nullcontext():
            network = load_lpips(args.perceptual, args.perceptual_ckpt).to(device)
    return lambda a, b: network(at_most(a, 256), at_most(b, 256)).flatten()


def distance_name(perceptual: str) -> str:
    """What a distance by --perceptual is called."""
    return "parser distance" if perceptual == "parser" else f"LPIPS-{perceptual.upper()}"


def print_json(args: argparse.Namespace, figures: Mapping[str, Any], protocol: Any) -> None:
    """Print the line that --json asks for."""
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "info_print", "debug")}
        line = {"figures": dict(figures), "protocol": protocol, "settings": settings}
        print(json.dumps(line, default=lambda v: str(v) if isinstance(v, Path) else repr(v)))
