"""Write a checkpoint's networks without its optimisers, as they are published."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from Model import checkpoint
from Model.errors import CheckpointError
from Util.cli import OneLineParser, run_script
from Util.settings import SettingError, Settings, add_flags, file_path, from_flags, setting

EPILOG = """examples:
  python -m Model.slim runs/NAME student.pt                        # of a run's newest checkpoint
  python -m Model.slim runs/NAME/best.pt student.pt --keep g_ema   # for making images alone

What is left goes wherever a checkpoint does, train.py --ckpt among them; only --resume needs the
optimisers."""

NETWORKS = ("g", "g_ema", "d")
ALONGSIDE = ("latent_avg", "config")
"""Small, and part of what the networks are: mean w, and how they were made."""


@dataclass(frozen=True, kw_only=True)
class SlimSettings(Settings):
    """What is kept."""

    keep: tuple[str, ...] = setting(
        NETWORKS,
        "networks to keep, of those that there are: generator, its moving average (which makes the"
        " images), discriminator",
        choices=NETWORKS,
    )


def build_parser() -> OneLineParser:
    """Declare the command line."""
    parser = OneLineParser(
        prog="python -m Model.slim",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=file_path, metavar="IN", help="checkpoint or run folder")
    parser.add_argument("target", type=file_path, metavar="OUT.pt", help="checkpoint to write")
    add_flags(parser, SlimSettings)
    return parser


def slim(source: Path, target: Path, settings: SlimSettings) -> list[str]:
    """Write the networks to keep; each has been loaded once.

    Returns:
        One line for each network and the file, with its size and the source's in MB.

    Raises:
        SettingError: no network is to be kept.
        CheckpointError: the source is no checkpoint, or has none of the networks.
        ValueError: the target is a folder or the source itself.
    """
    if not settings.keep:
        raise SettingError("keep", f"names no network; take some of {', '.join(NETWORKS)}")
    file = checkpoint.file_of(source)
    content = checkpoint.read(file)
    if target.is_dir() or target.resolve() == file.resolve():
        raise ValueError(f"{target}: cannot be the result; name another file")
    kept = [key for key in settings.keep if key in content]
    if not kept:
        wanted, found = ", ".join(settings.keep), ", ".join(map(str, content)) or "nothing"
        raise CheckpointError(f"{file}: no network {wanted} in it; it holds {found}")
    left = {key: content[key] for key in (*kept, *ALONGSIDE) if key in content}
    lines = checkpoint.summary(left, str(file))
    checkpoint.save(target, left)
    before, after = (path.stat().st_size / 1e6 for path in (file, target))
    return [*lines, f"saved {target}, {after:.1f} MB of {before:.1f} MB ({file})"]


def run(args: argparse.Namespace) -> None:
    """Write the file and report."""
    print("\n".join(slim(args.source, args.target, from_flags(SlimSettings, vars(args)))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
