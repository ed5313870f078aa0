"""Edit faces in the latent space of several generators: style mixing, morphing, or walks."""

import sys
from collections.abc import Sequence

from Compression.content import load_content_parser
from Evaluation.edited import EditedSettings, show_edited
from Util.cli import run_settings

EXAMPLES = """Every face of A is edited towards faces of B. Mixing shows A in the first column, B in
the first row, and between them A with the styles of B in some layers. Morphing shows one row from
each A to the B of the same place, and an animation that goes there and back. Directions moves A
both ways along principal components of w or along eigenvectors of the modulations.

The figures are perceptual distances of unedited to edited pictures, each multiplied by its own
content mask. Mixing: a_to_mixed is small where identity survives, a_to_b is what different faces
of the model are apart. Morphing: nearer_end, from the pictures between the ends to the end that is
closer, is small where they still show one of the two; step is between neighbours. Directions:
to_ends, from the unedited picture to both ends of a walk.

examples:
  python3 get_edited_image.py
      style_mixing.png of the bundled models, with how much of each face survives
  python3 get_edited_image.py --layers fine --a 0,1 --b 5,6,7
  python3 get_edited_image.py --mode morphing --a 0,1 --b 2,3 --space z
      morphing.png and morphing.gif
  python3 get_edited_image.py --mode directions --direction 0,1,2 --strength 2
      directions.png and directions.gif; --directions modulation walks along the other kind
  python3 get_edited_image.py --ckpt FULL.pt SMALL.pt --projection_a full.npz small.npz
      mixes projected portraits, one file of get_projected_image.py for each checkpoint
"""


def run(settings: EditedSettings) -> None:
    """Edit and print."""
    show_edited(settings, load_content_parser).show()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_settings(
        EditedSettings,
        run,
        argv,
        prog="get_edited_image.py",
        description=__doc__,
        epilog=EXAMPLES,
    )


if __name__ == "__main__":
    sys.exit(main())
