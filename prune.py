"""Prunes a generator: scores its channels, removes the lowest of every layer, saves the rest."""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from Compression.content import ContentParser, load_content_parser
from Compression.report import details, score_table, summary
from Compression.scores import SCORES, EmptyContentError, Scores, channel_scores
from Compression.selection import select_channels
from Compression.surgery import prune_generator
from Model import bundled, checkpoint
from Model.generator import Generator
from Util.cli import OneLineParser, check_writable, run_script
from Util.device import pick_device
from Util.files import folder_lock
from Util.settings import at_least, blame, file_path, fraction

EPILOG = """metrics (higher scores stay):
{metrics}

examples:
  python3 prune.py
      prunes the bundled 64 px model
  python3 prune.py --generated_img_size 256 --ckpt FILE --remove_ratio 0.7 --info_print
      prunes a 256 px generator of human faces, prints the details of every layer
  python3 prune.py --ckpt FILE --metric l1_out --out small.pt
      prunes by weights alone, without a face parser
"""


def build_parser() -> OneLineParser:
    """Declare the command line."""
    width = max(map(len, SCORES))
    metrics = "\n".join(f"  {name:<{width}}  {m.description}" for name, m in SCORES.items())
    parser = OneLineParser(
        prog="prune.py",
        description="Score the channels of a StyleGAN2 generator, remove the lowest of every layer"
        " and save what remains to Model/pruned_model/. Retrain it with train.py.",
        epilog=EPILOG.format(metrics=metrics),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_published_flags(parser)
    _add_further_flags(parser)
    return parser


def _add_published_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--generated_img_size",
        type=at_least(8),
        metavar="PX",
        help="side of the images in pixels; only checked against the checkpoint, which knows it",
    )
    add(
        "--ckpt",
        type=file_path,
        default=bundled.MODEL,
        metavar="FILE",
        help="full-size checkpoint (default: Model/full_size_model/toon_faces_64px.pt)",
    )
    add(
        "--remove_ratio",
        type=fraction(high_open=True),
        default=0.7,
        metavar="R",
        help="fraction of every layer's channels to remove, in [0, 1) (default: %(default)s)",
    )
    add("--info_print", action="store_true", help="print the details of every layer")
    add(
        "--n_sample",
        type=at_least(1),
        default=400,
        metavar="N",
        help="images to score by, at least 1 (default: %(default)s)",
    )
    add(
        "--batch_size",
        type=at_least(1),
        default=10,
        metavar="N",
        help="images whose gradients are summed before their absolute value is taken, at least 1;"
        " part of the metric content_aware (default: %(default)s)",
    )
    add(
        "--noise_prob",
        type=fraction(low_open=True),
        default=0.05,
        metavar="P",
        help="fraction of the content's pixels that are noised, in (0, 1] (default: %(default)s)",
    )


def _add_further_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--metric",
        choices=SCORES,
        default="content_aware",
        metavar="NAME",
        help="how channels are scored, see below (default: %(default)s)",
    )
    add(
        "--parser_ckpt",
        type=file_path,
        metavar="FILE",
        help="face parser that finds the content, for content_aware alone (default: for the"
        " bundled model Model/parser_model/toon_faces_128px.pt, for any other"
        " Model/parser_model/79999_iter.pth)",
    )
    add(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="seed of latents and noise, at least 0 (default: %(default)s)",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N; auto takes the GPU if there is one (default: %(default)s)",
    )
    add(
        "--out",
        type=file_path,
        metavar="FILE",
        help="checkpoint to write, or a folder for it"
        " (default: Model/pruned_model/METRIC_RATIO_SIZEpx_DATE-TIME.pt)",
    )


def load_full_size(args: argparse.Namespace) -> tuple[Generator, Mapping[str, Any]]:
    """Load the generator to prune, and the networks that the file holds besides.

    Raises:
        ValueError: naming the flag.
    """
    with blame("ckpt"):
        content = checkpoint.read(args.ckpt)
        generator = checkpoint.load_generator(args.ckpt, device=args.device)
    if args.generated_img_size not in (None, generator.size):
        raise ValueError(
            f"--generated_img_size {args.generated_img_size} contradicts {args.ckpt}, whose"
            f" images are {generator.size} px; leave the flag out or give {generator.size}"
        )
    return generator, {"d": content["d"]} if "d" in content else {}


def parser_of(args: argparse.Namespace) -> ContentParser | None:
    """Load the face parser, if the metric needs one.

    Raises:
        ValueError: naming the flag.
    """
    if not SCORES[args.metric].needs_parser:
        return None
    if args.parser_ckpt is None:
        args.parser_ckpt = bundled.default_parser(args.ckpt)
    with blame("parser_ckpt"):
        return load_content_parser(args.parser_ckpt, args.device)


def target_path(args: argparse.Namespace, size: int) -> Path:
    """Decide where the result goes, and find out early that it cannot.

    Raises:
        ValueError: naming the flag.
    """
    name = f"{args.metric}_{args.remove_ratio:g}_{size}px_{time.strftime('%Y%m%d-%H%M%S')}.pt"
    target = bundled.PRUNED_FOLDER / name if args.out is None else args.out
    if target.is_dir():
        target = target / name
    if target.resolve() == args.ckpt.resolve():
        raise ValueError(f"--out {target} is the checkpoint to prune; name another file")
    check_writable("out", target)
    return target


def score(args: argparse.Namespace, generator: Generator, parser: ContentParser | None) -> Scores:
    """Score the channels under a progress bar.

    Raises:
        ValueError: naming the flag.
    """
    with tqdm(total=args.n_sample, desc=f"scoring ({args.metric})", unit="img") as bar:
        try:
            return channel_scores(
                generator,
                args.metric,
                parser=parser,
                n_sample=args.n_sample,
                batch_size=args.batch_size,
                noise_prob=args.noise_prob,
                seed=args.seed,
                progress=bar.update,
            )
        except EmptyContentError as error:
            bar.leave = False
            raise ValueError(f"--parser_ckpt {args.parser_ckpt}: {error}") from None


def save(target: Path, content: Mapping[str, Any], overwrite: bool) -> Path:
    """Write the checkpoint; a name of our making that is taken gets a number.

    Raises:
        OSError: it could not be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(target.parent):  # another run may have chosen the same second
        numbered = (target.with_name(f"{target.stem}-{i}.pt") for i in itertools.count(2))
        names = itertools.chain([target], numbered)
        free = next(name for name in names if overwrite or not name.exists())
        checkpoint.save(free, content)
    return free


def config_of(args: argparse.Namespace, before: Generator, after: Generator) -> dict[str, Any]:
    """What the checkpoint remembers of its making, in plain values."""
    return {
        "metric": args.metric,
        "remove_ratio": args.remove_ratio,
        "seed": args.seed,
        "n_sample": args.n_sample,
        "batch_size": args.batch_size,
        "noise_prob": args.noise_prob,
        "source": args.ckpt.name,
        "parser": args.parser_ckpt.name if SCORES[args.metric].needs_parser else "",
        "channels_before": list(before.channels),
        "channels_after": list(after.channels),
    }


def run(args: argparse.Namespace) -> None:
    """Prune and save.

    Raises:
        ValueError: naming the flag or file.
    """
    args.device = pick_device(args.device)
    generator, others = load_full_size(args)
    target = target_path(args, generator.size)
    parser = parser_of(args)
    scores = score(args, generator, parser)
    keep = select_channels(scores, args.remove_ratio)
    pruned = prune_generator(generator, keep)
    if args.info_print:
        print(f"{details(generator, pruned)}\n\n{score_table(scores, keep)}\n")
    print(summary(generator, pruned))
    config = config_of(args, generator, pruned)
    content = {"g": pruned, "g_ema": pruned, **others, "config": config}
    print(f"saved {save(target, content, overwrite=target == args.out)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
