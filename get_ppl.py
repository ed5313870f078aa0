"""Perceptual path length of a generator, by the paper's and by the standard protocol."""

import argparse
import sys
from collections.abc import Sequence

from Evaluation.ppl import PathSettings, measure
from Evaluation.settings import evaluation_parser
from Util import distributed
from Util.cli import OneLineParser, run_script
from Util.settings import from_flags

EXAMPLES = """examples:
  the bundled model, with parser features, no download:
    python3 get_ppl.py --n_sample 1000
  the paper's figure; LPIPS-VGG's weights are downloaded on first use:
    python3 get_ppl.py --generated_img_size 256 --ckpt MODEL.pt"""


def build_parser() -> OneLineParser:
    """Declare the command line."""
    return evaluation_parser("get_ppl.py", __doc__, EXAMPLES, PathSettings)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    result = measure(from_flags(PathSettings, vars(args)))
    if distributed.rank() == 0:
        print(result.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    try:
        return run_script(build_parser(), run, argv)
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
