"""Convert a StyleGAN2 file of NVIDIA's to a checkpoint; none of its code is run."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Model import checkpoint, nvidia
from Model.checkpoint import CheckpointError
from Util.cli import OneLineParser, run_script
from Util.settings import Settings, add_flags, file_path, from_flags, setting

EPILOG = """example:
  python -m Model.nvidia ffhq.pkl Model/full_size_model/ffhq.pt

Pickles of stylegan2-ada-pytorch, of stylegan3's StyleGAN2 configurations and of the TensorFlow
StyleGAN2 (configurations E and F). There is no way back (--to nvidia): NVIDIA's loaders build a
network by running Python source from the file, so a file without code would be of no use to them.
doc/nvidia.md says what is supported."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """How a file is converted."""

    n_sample: int = setting(
        2,
        "images on which it is checked that the clamped activations of training in half precision"
        " are never clamped; 0: no check",
        low=0,
        metavar="N",
    )
    discriminator: bool = setting(
        True, "convert the discriminator too; False for a file where it alone is unsupported"
    )


def build_parser() -> OneLineParser:
    """Declare the command line."""
    parser = OneLineParser(
        prog="python -m Model.nvidia",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=file_path, metavar="IN.pkl", help="file of NVIDIA's")
    parser.add_argument("target", type=file_path, metavar="OUT.pt", help="checkpoint to write")
    add_flags(parser, ConvertSettings)
    return parser


def convert(source: Path, target: Path, settings: ConvertSettings) -> list[str]:
    """Convert a file; what is written has been loaded once.

    Returns:
        One line for each network, each remark and the file.

    Raises:
        ValueError: names the file and what is wrong.
    """
    if not source.is_file():
        raise ValueError(f"{source}: no such file; name a .pkl of NVIDIA's")
    if not nvidia.is_pickle(source):
        raise ValueError(f"{source}: no pickle of NVIDIA's; a .pt needs no conversion")
    if target.is_dir() or target.resolve() == source.resolve():
        raise ValueError(f"{target}: cannot be the result; name another file")
    content, notes = nvidia.import_networks(source, settings.n_sample, settings.discriminator)
    try:
        lines = summary(content)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    checkpoint.save(target, content)
    return [*lines, *(f"note: {note}" for note in notes), f"saved {target}"]


def summary(content: Mapping[str, Any]) -> list[str]:
    """Load every network of a checkpoint and say what it is, one line each.

    Raises:
        CheckpointError: one does not load.
    """
    lines = []
    for key in (key for key in ("g", "g_ema") if key in content):
        network = checkpoint.load_generator(content, key)
        widths = ", ".join(map(str, network.channels))
        lines.append(
            f"{key}: generator, {network.size} px, latents of {network.style_dim}, {network.n_mlp}"
            f" mapping layers, channels {widths}"
        )
    if "d" in content:
        lines.append(f"d: discriminator, {checkpoint.load_discriminator(content).size} px")
    return lines + (["latent_avg: mean w"] if "latent_avg" in content else [])


def run(args: argparse.Namespace) -> None:
    """Convert and report."""
    print("\n".join(convert(args.source, args.target, from_flags(ConvertSettings, vars(args)))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
