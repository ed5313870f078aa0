"""Distances of a generator's images to real ones: Frechet, kernel, precision and recall."""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from Compression.content import parser_for
from Dataset.images import Images
from Evaluation import feature_statistics
from Evaluation.command_line import (
    evaluation_parser,
    load_evaluated,
    print_json,
)
from Evaluation.feature_sets import (
    image_features,
    read_statistics,
    real_statistics,
    sampled_features,
)
from Evaluation.feature_statistics import Statistics, statistics_of
from Evaluation.features import Extractor, make_extractor
from Evaluation.kid import kernel_distance
from Evaluation.precision_recall import precision_recall
from Model import bundled
from Model.generator import Generator
from Util import distributed
from Util.cli import OneLineParser, run_script
from Util.device import pick_device
from Util.settings import at_least, blame, file_path, fraction

METRICS = ("fid", "kid", "pr")
EXAMPLES = """examples:
  the bundled model, with the bundled parser's features and real statistics, no download:
    python3 get_fid.py --n_sample 5000
  the paper's figure; the Inception network is downloaded on first use:
    python3 get_fid.py --generated_img_size 256 --ckpt MODEL.pt --path FFHQ_LMDB
  everything, inside the content of interest only:
    python3 get_fid.py --ckpt MODEL.pt --path FFHQ_LMDB --metrics fid,kid,pr --content_aware
  several processes share the sampling and give the same figure:
    torchrun --nproc_per_node=4 get_fid.py --ckpt MODEL.pt --path FFHQ_LMDB"""


def names(text: str) -> tuple[str, ...]:
    """Argument type: metrics separated by commas."""
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    if not chosen or set(chosen) - set(METRICS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(METRICS)}")
    return chosen


def build_parser() -> OneLineParser:
    """All flags of the script."""
    parser = evaluation_parser("get_fid.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--n_sample", type=at_least(2), default=50_000, help="generated images (%(default)s)")
    add("--batch_size", type=at_least(1), default=64, help="images at a time (%(default)s)")
    add("--images", type=file_path, metavar="DIR", help="score these images in place of --ckpt's")
    add("--path", type=file_path, metavar="DIR", help="real images: a folder or an LMDB")
    add(
        "--stats",
        type=file_path,
        metavar="FILE",
        help="statistics of the real images (.npz, or a .pkl of mean and cov); with --path, made"
        " if missing (default: beside the images)",
    )
    add(
        "--features",
        choices=("inception", "parser"),
        help="network (default: parser for the bundled models, else inception)",
    )
    add(
        "--inception_ckpt",
        type=file_path,
        metavar="FILE",
        help="FID Inception weights, no download",
    )
    add("--parser_ckpt", type=file_path, metavar="FILE", help="face parser of features and masks")
    add("--metrics", type=names, default=("fid",), help="of fid,kid,pr (default: fid)")
    add("--content_aware", action="store_true", help="multiply images by their own content mask")
    add(
        "--truncation",
        type=fraction(low_open=True),
        default=1.0,
        help="psi; the paper's figures have none (default: %(default)s)",
    )
    add("--workers", type=at_least(0), default=2, help="processes that load images (%(default)s)")
    return parser


def reference(
    args: argparse.Namespace, size: int, extractor: Extractor, device: torch.device
) -> Statistics:
    """The real side of the comparison, as the flags say.

    Raises:
        ValueError: names the flag and what to do.
    """
    need_features = args.metrics != ("fid",)
    if args.stats and args.stats.is_dir():
        raise ValueError(f"--stats {args.stats} is a folder; name a file")
    if args.path:
        how = (device, args.batch_size, args.workers, need_features)
        with blame("path"):
            images = Images(args.path, size)
        with blame("stats" if args.stats and args.stats.is_file() else "path"):
            return real_statistics(images, args.stats, extractor, *how)
    file = args.stats
    if file is None and bundled.is_bundled(args.ckpt):
        file = bundled.CONTENT_STATISTICS if args.content_aware else bundled.STATISTICS
    if file is None:
        raise ValueError("--path is missing; give the real images, or their statistics as --stats")
    with blame("stats"):
        return read_statistics(file, extractor, need_features)


def compare(
    metrics: Sequence[str], generated: NDArray[np.float32], real: Statistics, name: str, seed: int
) -> dict[str, float]:
    """The figures of the metrics, by name.

    Raises:
        StatisticsError: too few generated images, or non-finite features.
    """
    figures = {}
    if "fid" in metrics:
        figures[name] = feature_statistics.distance(statistics_of(generated, {}), real)
    if real.features is None:
        return figures
    if "kid" in metrics:
        value, error = kernel_distance(generated, real.features, seed=seed)
        kernel = name.replace("FID", "KID").replace("Frechet", "kernel")
        figures |= {kernel: value, f"{kernel}, standard error": error}
    if "pr" in metrics:
        sets = (torch.from_numpy(generated), torch.from_numpy(real.features))
        figures |= zip(("precision", "recall"), precision_recall(*sets), strict=True)
    return figures


def extractor_of(args: argparse.Namespace, device: torch.device) -> Extractor:
    """The features that the flags mean.

    Raises:
        ValueError: names the flag and what to do.
    """
    parser = None
    if args.features == "parser" or args.content_aware:
        args.parser_ckpt = args.parser_ckpt or bundled.default_parser(args.ckpt)
        parser = parser_for(args.parser_ckpt, args.ckpt, device)
    return make_extractor(
        args.features,
        args.inception_ckpt,
        parser.network if parser else None,
        args.parser_ckpt,
        parser if args.content_aware else None,
        device,
    )


def generated_features(
    args: argparse.Namespace,
    extractor: Extractor,
    generated: Generator | Images,
    device: torch.device,
) -> NDArray[np.float32]:
    """Features of --ckpt's samples, or of the pictures of --images."""
    if isinstance(generated, Images):
        with blame("images"):
            return image_features(generated, extractor, args.batch_size, args.workers, device)
    return sampled_features(
        generated, extractor, args.n_sample, args.batch_size, args.seed, args.truncation
    )


def run(args: argparse.Namespace) -> None:
    """Compare and print.

    Raises:
        ValueError: names the flag and what to do.
    """
    device = distributed.join(pick_device(args.device))
    is_bundled = bundled.is_bundled(args.ckpt) and not args.images
    args.features = args.features or ("parser" if is_bundled else "inception")
    if args.images and not args.generated_img_size:
        raise ValueError("--generated_img_size is missing; --images goes with it")
    generated: Generator | Images
    if args.images:
        with blame("images"):
            generated = Images(args.images, args.generated_img_size)
    else:
        generated = load_evaluated(args.ckpt, args.generated_img_size, device)
    size = generated.size
    extractor = extractor_of(args, device)
    if isinstance(generated, Generator):
        with blame("n_sample"):
            feature_statistics.check_enough(args.n_sample, extractor.dimensions(size, device))
    real = reference(args, size, extractor, device)
    features = generated_features(args, extractor, generated, device)
    if distributed.rank() != 0:
        return
    figures = compare(args.metrics, features, real, extractor.name, args.seed)
    for name, value in figures.items():
        print(f"{name}: {value:.6g}")
    if args.info_print:
        made_from = dict(real.record) or f"unknown, from {args.stats}"
        print(f"generated: {len(features)} images of {size} px from {args.images or args.ckpt}")
        print(f"real: {made_from}\nprotocol: {extractor.protocol}")
    else:
        print(f"({len(features)} images; {extractor.protocol})")
    print_json(args, figures, extractor.protocol)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    try:
        return run_script(build_parser(), run, argv)
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
