"""Distances of a generator's images to real ones: Frechet, kernel, precision and recall."""

import sys
from collections.abc import Sequence

from Compression.content import load_content_parser
from Evaluation.measure import MeasureSettings, measure
from Util import distributed
from Util.cli import run_settings

EXAMPLES = """examples:
  the bundled model, with the bundled parser's features and real statistics, no download:
    python3 get_fid.py --n_sample 5000
  the paper's figure; the Inception network is downloaded on first use:
    python3 get_fid.py --generated_img_size 256 --ckpt MODEL.pt --path FFHQ_LMDB
  everything, inside the content of interest only:
    python3 get_fid.py --ckpt MODEL.pt --path FFHQ_LMDB --metrics fid,kid,pr --content_aware
  several processes share the sampling and give the same figure:
    torchrun --nproc_per_node=4 get_fid.py --ckpt MODEL.pt --path FFHQ_LMDB"""


def run(settings: MeasureSettings) -> None:
    """Measure and print."""
    result = measure(settings, load_content_parser)
    if distributed.rank() == 0:
        result.show()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_settings(
        MeasureSettings, run, argv, prog="get_fid.py", description=__doc__, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
