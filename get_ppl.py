"""Perceptual path length of a generator, by the paper's protocol and by StyleGAN's."""

import sys
from collections.abc import Sequence

from Evaluation.ppl import PathSettings, measure
from Util import distributed
from Util.cli import run_settings

EXAMPLES = """examples:
  the bundled model, with parser features, no download:
    python3 get_ppl.py --n_sample 1000
  the paper's figure; LPIPS-VGG's weights are downloaded on first use:
    python3 get_ppl.py --generated_img_size 256 --ckpt MODEL.pt
  what StyleGAN2's authors publish:
    python3 get_ppl.py --ckpt MODEL.pt --protocols ends --n_sample 50000"""


def run(settings: PathSettings) -> None:
    """Measure and print."""
    result = measure(settings)
    if distributed.rank() == 0:
        result.show()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_settings(
        PathSettings, run, argv, prog="get_ppl.py", description=__doc__, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
