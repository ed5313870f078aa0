"""Perceptual path length of a generator, by the paper's and by the standard protocol."""

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from Evaluation.command_line import (
    add_perceptual_flags,
    distance_name,
    evaluation_parser,
    load_evaluated,
    perceptual_for,
    print_json,
)
from Evaluation.ppl import PROTOCOLS, PathPairs, pair_distances, perceptual_path_length
from Evaluation.sampling import shares
from Util import distributed
from Util.cli import OneLineParser, run_script
from Util.device import pick_device
from Util.settings import at_least

EXAMPLES = """examples:
  the bundled model, with parser features, no download:
    python3 get_ppl.py --n_sample 1000
  the paper's figure; LPIPS-VGG's weights are downloaded on first use:
    python3 get_ppl.py --generated_img_size 256 --ckpt MODEL.pt"""


def build_parser() -> OneLineParser:
    """All flags of the script."""
    parser = evaluation_parser("get_ppl.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--n_sample", type=at_least(1), default=5000, help="pairs of images (%(default)s)")
    add("--batch_size", type=at_least(1), default=50, help="pairs at a time (%(default)s)")
    add("--eps", type=float, default=1e-4, help="step along a line between two w (%(default)s)")
    add_perceptual_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError: names the flag and what to do.
    """
    if not 0 < args.eps < 1:
        raise ValueError(f"--eps must be in (0, 1), not {args.eps}")
    device = distributed.join(pick_device(args.device))
    generator = load_evaluated(args.ckpt, args.generated_img_size, device)
    perceptual = perceptual_for(args, args.ckpt, device)
    name = distance_name(args.perceptual)
    rank, world = distributed.rank(), distributed.world_size()
    batches = list(shares(args.n_sample, args.batch_size, rank, world))
    figures: dict[str, float] = {}
    for protocol, description in PROTOCOLS.items():
        pairs = PathPairs(generator, args.eps, args.seed, shared_noise=protocol == "standard")
        total = sum(map(len, batches))
        with tqdm(total=total, desc=protocol, unit="pair", leave=False, disable=rank > 0) as bar:
            own = pair_distances(pairs, perceptual, batches, bar.update)
        distances = torch.cat(distributed.gather_in_turn(own)).numpy()
        figures[protocol] = perceptual_path_length(distances, args.eps, protocol)
        if rank == 0:
            print(f"PPL ({protocol} protocol, {name}): {figures[protocol]:.6g}")
            if args.info_print:
                print(f"  {args.n_sample} pairs, eps {args.eps:g}; {description}; 1 % trimmed")
    if rank == 0:
        print_json(args, figures, {"distance": name, "trimmed": "1 % at each end", **PROTOCOLS})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    try:
        return run_script(build_parser(), run, argv)
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
