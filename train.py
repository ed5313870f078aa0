"""Retrain a pruned StyleGAN2 generator, or train one from scratch."""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from Compression import recipes
from Compression.distillation import TERMS
from Compression.run import TrainResult, check, option_kinds, train
from train_hyperparams import TrainConfig
from Util import distributed
from Util.cli import OneLineParser, listed, run_script
from Util.progress import show
from Util.run_log import CONFIG, TIMING, read_config
from Util.settings import (
    SettingError,
    add_flags,
    blame,
    check_files,
    from_flags,
    known_settings,
)

BEGINNING = (
    "ckpt",
    "channels",
    "channel_multiplier",
    "style_dim",
    "n_mlp",
    "discriminator",
    "load_train_state",
)
"""Settings that only the beginning of a run reads."""
AUTO = "auto"

EPILOG = """distillation terms (--kd):
{terms}

recipes (--recipe):
{recipes}

examples:
  retrain a pruned model, distilling from the full-size one inside the face:
    python3 train.py --path FFHQ_LMDB --size 256 --ckpt Model/pruned_model/PRUNED.pt \\
        --teacher_ckpt Model/full_size_model/256px_full_size.pt --iter 450001 --batch_size 16
  train a small full-size model from scratch:
    python3 train.py --path Dataset/toon_faces_64px/images --size 64 --style_dim 128 --n_mlp 4 \\
        --channels 64,64,64,64,64,64,32,32,16,16 --batch_size 32 --r1 0.1 --iter 10000
Every default and its reason: train_hyperparams.py"""


def build_parser() -> OneLineParser:
    """All flags of the script."""
    parser = OneLineParser(
        prog="train.py",
        description=__doc__,
        epilog=EPILOG.format(terms=listed(TERMS), recipes=listed(recipes.RECIPES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, TrainConfig, *option_kinds())
    return parser


def parse_config(argv: Sequence[str] | None) -> TrainConfig:
    """Read the flags into a `TrainConfig`; --resume and --recipe say what is not given.

    Raises:
        SettingError: names the setting, the value and what to do.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    resume = run_to_resume(args)
    if resume:
        if args.recipe and args.resume != AUTO:
            raise SettingError("recipe", "is for a new run; a resumed one keeps its settings")
        folder = run_folder(resume)
        with blame("resume"):
            # Runs from before this setting had that filter.
            stored = {"resample": "lanczos"} | read_config(folder)
            defaults = known_settings(stored, TrainConfig, *option_kinds())
        defaults["out"] = str(folder)
    else:
        check_files(TrainConfig, "resume", values=args)
        defaults = recipes.train_values(args.recipe, args.ckpt)
    parser.set_defaults(**defaults)
    values = vars(parser.parse_args(argv)) | {"recipe": defaults.get("recipe", "")}
    if resume:
        _check_beginning(values, vars(parser.parse_args([])))
    return from_flags(TrainConfig, values | {"resume": resume}, option_kinds())


def _check_beginning(values: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse other values of what a resumed run began with, which would change nothing.

    Raises:
        SettingError: names the setting and both values.
    """
    for name in BEGINNING:
        now, then = values[name], stored[name]
        if name == "ckpt":
            now, then = (str(text and Path(text).resolve()) for text in (now, then))
        if now != then:
            raise SettingError(
                name,
                f"{values[name]}: the run to resume began with {stored[name]}; leave it out, or"
                " start a new run",
            )


def run_to_resume(args: argparse.Namespace) -> str:
    """Run folder or checkpoint to go on with, empty for a new run; --resume auto finds out which.

    Raises:
        SettingError: auto without a folder to look into.
    """
    if args.resume != AUTO:
        return str(args.resume)
    if not args.out:
        raise SettingError("resume", f"{AUTO} looks into the run's folder; name it with out")
    return args.out if (Path(args.out) / CONFIG).exists() else ""


def run_folder(resume: str) -> Path:
    """Folder of the run that --resume names, by itself or by one of its checkpoints."""
    path = Path(resume)
    if not path.is_file():
        return path
    # best.pt and the state before a failure lie beside the settings, the others one level below.
    return path.parent if (path.parent / CONFIG).is_file() else path.parent.parent


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train as the flags say, maybe in other processes; returns the exit code."""
    if args.recipe == recipes.LIST:
        print(recipes.table())
        return 0
    config = parse_config(argv)
    check(config)
    several = len(config.gpu_device_ids) > 1 and config.device == "auto"
    if several and not distributed.launched() and torch.cuda.is_available():
        flags = sys.argv[1:] if argv is None else argv
        distributed.relaunch(__file__, flags, len(config.gpu_device_ids))
    if config.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            result = train(replace(config, out=folder, wandb=""), show)
            if not result.signal:
                print_dry_run(result, config)
        return 128 + result.signal if result.signal else 0
    result = train(config, show)
    if result.signal:
        return 128 + result.signal
    if distributed.rank() > 0:
        return 0
    if result.trained:
        print(f"done: {result.folder}")
    else:
        print(
            f"{config.resume or config.ckpt}: already at iteration {result.iteration}, and --iter"
            f" is {config.iter}: nothing to train, nothing changed; a larger --iter trains on"
        )
    return 0


def print_dry_run(result: TrainResult, config: TrainConfig) -> None:
    """Print what two iterations tell; the first one also warms up."""
    if not result.rows:
        return
    rows = result.rows[-2:]
    losses = {k: round(v, 4) for k, v in rows[0].items() if k not in ("iteration", *TIMING)}
    speed, memory = TIMING[:2]
    print(f"dry run: all is well; losses of the first iteration: {losses}")
    for which, row in zip(("first", "second"), rows, strict=True):
        parts = regularisers(config, int(row["iteration"]) - 1)
        print(f"{row[speed]:.3g} images/s in the {which} iteration, {parts}")
    print(f"peak memory {rows[-1][memory]:.2f} GiB")


def regularisers(config: TrainConfig, iteration: int) -> str:
    """Which lazy regularisers an iteration has, counted from 0, in words."""
    found = [
        name
        for name, weight, every in (
            ("R1", config.r1, config.d_reg_every),
            ("path length", config.path_regularize, config.g_reg_every),
        )
        if weight and iteration % every == 0
    ]
    return f"with {' and '.join(found)}" if found else "without R1 and path length"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), lambda args: run(args, argv), argv)


if __name__ == "__main__":
    sys.exit(main())
