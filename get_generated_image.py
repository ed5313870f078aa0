"""Show what several generators make of the same latents: a picture, and an animated walk."""

import sys
from collections.abc import Sequence

from Evaluation.generated import GeneratedSettings, show_generated
from Util.cli import run_settings

EXAMPLES = """examples:
  python3 get_generated_image.py
      the bundled models: generated.png and the walk generated.gif
  python3 get_generated_image.py --ckpt FULL.pt PRUNED.pt --names full pruned \\
      --n_sample 16 --columns 8 --frames 0 --out faces.png
      two rows of 8 pictures from each of two checkpoints, without a walk
"""


def run(settings: GeneratedSettings) -> None:
    """Make the pictures and print."""
    show_generated(settings).show()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    prog = "get_generated_image.py"
    return run_settings(
        GeneratedSettings, run, argv, prog=prog, description=__doc__, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
