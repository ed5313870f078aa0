"""Find the latents and layer noise from which a generator makes given pictures, and how close."""

import sys
from collections.abc import Sequence

from Compression.content import load_content_parser
from Evaluation.projecting import PICTURE, TABLE, ProjectionSettings, project_pictures
from Util.cli import run_settings

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


def run(settings: ProjectionSettings) -> None:
    """Project and print."""
    project_pictures(settings, load_content_parser).show()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    prog = "get_projected_image.py"
    return run_settings(
        ProjectionSettings, run, argv, prog=prog, description=__doc__, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
