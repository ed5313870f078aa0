"""Find the latents and layer noise from which a generator makes given pictures, and how close."""

import argparse
import sys
from collections.abc import Sequence

from Compression.content import load_content_parser
from Evaluation.projecting import PICTURE, TABLE, ProjectionSettings, project_pictures
from Evaluation.settings import evaluation_parser
from Util.cli import OneLineParser, run_script
from Util.settings import from_flags

EXAMPLES = f"""writes into --out: {PICTURE}, {TABLE}, and for every
picture NAME.npz (w_plus, noise_0, noise_1, ...), which get_edited_image.py takes

examples:
  python3 get_projected_image.py
      the bundled model, on four pictures that it made itself and has to find again
  python3 get_projected_image.py --image_file Dataset/toon_faces_128px_val/images --n_sample 8
      the bundled model, on pictures that it has not seen
  python3 get_projected_image.py --generated_img_size 256 --ckpt FILE --image_file Helen-Set55
      a folder of portraits, with LPIPS-VGG (downloaded on first use)
"""


def build_parser() -> OneLineParser:
    """Declare the command line."""
    return evaluation_parser("get_projected_image.py", __doc__, EXAMPLES, ProjectionSettings)


def run(args: argparse.Namespace) -> None:
    """Project and print."""
    print(project_pictures(from_flags(ProjectionSettings, vars(args)), load_content_parser).output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
