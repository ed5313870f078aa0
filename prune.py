"""Prunes a generator: scores its channels, removes the lowest of every layer, saves the rest."""

import sys
from collections.abc import Sequence

from Compression import recipes
from Compression.allocation import ALLOCATIONS
from Compression.channel_pictures import save_channel_pictures
from Compression.initialisation import INITIALISATIONS
from Compression.parsers import PARSERS
from Compression.pruning import PruneSettings, option_kinds, prune
from Compression.report import details, score_table, summary
from Compression.scores import SCORES
from Util.cli import listed, run_settings
from Util.progress import warn

EPILOG = """metrics (--metric; higher scores stay):
{metrics}

allocations (--allocation; widths for --macs):
{allocations}

initialisations (--init):
{initialisations}

recipes (--recipe):
{recipes}

parsers (--parser KIND:..., or a file):
{parsers}

examples:
  python3 prune.py
      prunes the bundled 64 px model
  python3 prune.py --generated_img_size 256 --ckpt FILE --remove_ratio 0.7 --info_print
      prunes a 256 px generator of human faces, prints the details of every layer
  python3 prune.py --ckpt FILE --macs 4.12e9 --round_to 8
      chooses every layer's width for this many multiply-accumulates
  python3 prune.py --ckpt FILE --recipe dcp --n_sample 1000
      prunes as a paper did, but scores by fewer images
  python3 prune.py --ckpt FILE --content skin,hair,eyes
      keeps these classes of the parser; python3 -m Compression.content shows what they are
  python3 prune.py --ckpt FILE --metric l1_out --out small.pt
      prunes by weights alone, without a face parser
"""


def run(settings: PruneSettings) -> None:
    """Prune and report."""
    if settings.recipe == recipes.LIST:
        print(recipes.table())
        return
    result = prune(settings)
    saved = [result.path]
    if settings.info_pictures:
        saved.append(save_channel_pictures(result.path, result.full, result.scores, settings.seed))
    if settings.info_print:
        print(f"widths: {result.rule}\n")
        print(f"{details(result.full, result.pruned)}\n")
        print(f"{score_table(result.scores, result.keep)}\n")
        if result.initialised:
            print("\n".join([*result.initialised, ""]))
    print(summary(result.full, result.pruned))
    for file in saved:
        print(f"saved {file}")
    for warning in result.warnings:
        warn(f"prune.py: warning: {warning}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_settings(
        PruneSettings,
        run,
        argv,
        prog="prune.py",
        description="Score the channels of a StyleGAN2 generator, remove the lowest of every layer"
        " and save what remains to Model/pruned_model/. Retrain it with train.py.",
        epilog=EPILOG.format(
            metrics=listed(SCORES),
            allocations=listed(ALLOCATIONS),
            initialisations=listed(INITIALISATIONS),
            recipes=listed(recipes.RECIPES),
            parsers=listed(PARSERS),
        ),
        options=option_kinds(),
        defaults=lambda args: recipes.prune_values(args.recipe),
    )


if __name__ == "__main__":
    sys.exit(main())
