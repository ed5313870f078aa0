"""Shows what several generators make of the same latents: a picture, and an animated walk."""

import argparse
import sys
from collections.abc import Sequence

from Evaluation.generated import GeneratedSettings, show_generated
from Evaluation.settings import evaluation_parser
from Util.cli import OneLineParser, run_script
from Util.settings import from_flags

EXAMPLES = """examples:
  python3 get_generated_image.py
      the bundled models: generated.png and the walk generated.gif
  python3 get_generated_image.py --ckpt FULL.pt PRUNED.pt --names full pruned \\
      --n_sample 16 --columns 8 --frames 0 --out faces.png
      two rows of 8 pictures from each of two checkpoints, without a walk
"""


def build_parser() -> OneLineParser:
    """Declare the command line."""
    return evaluation_parser("get_generated_image.py", __doc__, EXAMPLES, GeneratedSettings)


def run(args: argparse.Namespace) -> None:
    """Make the pictures and print."""
    print(show_generated(from_flags(GeneratedSettings, vars(args))).output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
