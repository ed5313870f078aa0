"""Retrain a pruned StyleGAN2 generator, or train one from scratch."""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from Dataset.images import EndlessBatches, Images, endless_loader
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator, resolution_log2
from train_hyperparams import TrainConfig, add_flags
from Util import pictures
from Util.cli import OneLineParser, blame
from Util.content import ContentParser
from Util.device import pick_device
from Util.losses import Perceptual
from Util.perceptual import ParserDistance, load_lpips
from Util.run_log import RunLog
from Util.training import NonFiniteError, Teacher, Trainer, train

EXAMPLES = """examples:
  retrain a pruned model, distilling from the full-size one inside the face:
    python3 train.py --path FFHQ_LMDB --size 256 --ckpt Model/pruned_model/PRUNED.pt \\
        --teacher_ckpt Model/full_size_model/256px_full_size.pt --iter 450001 --batch_size 16
  train a small full-size model from scratch:
    python3 train.py --path Dataset/toon_faces_64px/images --size 64 --style_dim 128 --n_mlp 4 \\
        --channels 64,64,64,64,64,64,32,32,16,16 --batch_size 32 --r1 0.1 --iter 10000
Every default and its reason: train_hyperparams.py"""


def parse_config(argv: list[str] | None) -> TrainConfig:
    """Read the flags into a `TrainConfig`."""
    parser = OneLineParser(
        prog="train.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    config = TrainConfig(**vars(parser.parse_args(argv)))
    check_config(config)
    return config


def check_config(config: TrainConfig) -> None:
    """Refuse settings that cannot work.

    Raises:
        ValueError: names the flag, the value and what to do.
    """
    if not config.path:
        raise ValueError("--path is missing; give a folder of training images or an LMDB")
    positive = (
        "iter",
        "batch_size",
        "lr",
        "path_batch_shrink",
        "d_reg_every",
        "g_reg_every",
        "n_sample",
        "log_freq",
        "style_dim",
        "n_mlp",
    )
    for name in positive:
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} must be positive, not {getattr(config, name)}")
    not_negative = (
        "r1",
        "path_regularize",
        "kd_l1_lambda",
        "kd_lpips_lambda",
        "workers",
        "val_sample_freq",
        "model_save_freq",
        "size",
    )
    for name in not_negative:
        if getattr(config, name) < 0:
            raise ValueError(f"--{name} must not be negative, not {getattr(config, name)}")
    if not 0 <= config.mixing <= 1:
        raise ValueError(f"--mixing is a probability in [0, 1], not {config.mixing}")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"--ema_decay must be in [0, 1), not {config.ema_decay}")
    if config.size:
        resolution_log2(config.size)
    if config.load_train_state and not config.ckpt:
        raise ValueError("--load_train_state goes with --ckpt; name the checkpoint to go on from")


def make_networks(
    config: TrainConfig, content: Mapping[str, Any]
) -> tuple[Generator, Generator | None, Discriminator]:
    """Generator, its moving average if there is one, and discriminator, from --ckpt or new."""
    if not content:
        new = Generator(config.size or 64, config.style_dim, config.n_mlp, config.channels)
        # The discriminator is as wide as the generator's last convolution at each resolution.
        return new, None, Discriminator(new.size, channels=new.channels[1::2])
    size = config.size or None
    g_ema = checkpoint.load_generator(content, size=size) if "g_ema" in content else None
    generator = checkpoint.load_generator(content, "g" if "g" in content else "g_ema", size=size)
    return generator, g_ema, checkpoint.load_discriminator(content)


def make_perceptual(
    config: TrainConfig, parser: ContentParser | None, device: torch.device
) -> Perceptual | None:
    """The perceptual distance that --perceptual names, or None when its weight is 0."""
    if not config.kd_lpips_lambda:
        return None
    if config.perceptual == "parser":
        assert parser is not None
        return ParserDistance(parser)
    return load_lpips(config.perceptual, config.perceptual_ckpt or None).to(device)


def make_teacher(config: TrainConfig, size: int, device: torch.device) -> Teacher | None:
    """The full-size generator with its mask and perceptual distance, or None without --teacher."""
    if not config.teacher_ckpt:
        return None
    with blame("--teacher_ckpt"):
        generator = checkpoint.load_generator(config.teacher_ckpt, device=device, size=size)
    parser = None
    if config.content_aware_KD or config.perceptual == "parser":
        with blame("--parser_ckpt"):
            parser = ContentParser(checkpoint.load_face_parser(config.parser_ckpt, device))
    return Teacher(
        generator.eval().requires_grad_(False),
        parser if config.content_aware_KD else None,
        make_perceptual(config, parser, device),
    )


def make_trainer(config: TrainConfig, device: torch.device) -> Trainer:
    """Build networks, teacher and optimisers, and take up a saved state if asked."""
    with blame("--ckpt" if config.ckpt else "--size and --channels:"):
        content = checkpoint.read(config.ckpt) if config.ckpt else {}
        if content and "d" not in content and config.teacher_ckpt:
            content["d"] = checkpoint.read(config.teacher_ckpt).get("d")
        generator, g_ema, discriminator = make_networks(config, content)
    teacher = make_teacher(config, generator.size, device)
    trainer = Trainer(generator, discriminator, config, device, teacher, g_ema)
    if config.load_train_state:
        with blame(f"--ckpt {config.ckpt}:"):
            trainer.load_state(content)
    return trainer


def run(config: TrainConfig) -> Path:
    """Train as configured; returns the run's folder."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    trainer = make_trainer(config, device)
    size = trainer.generator.size
    images = Images(config.path, size)
    config = replace(
        config,
        size=size,
        channels=trainer.generator.channels,
        out=config.out or time.strftime("runs/%Y%m%d-%H%M%S"),
    )
    log = RunLog(config.out, asdict(config), config.load_train_state)
    sample_z = torch.randn(
        config.n_sample,
        trainer.generator.style_dim,
        generator=torch.Generator().manual_seed(config.seed),
    ).to(device)
    start = trainer.iteration * config.batch_size
    stream = EndlessBatches(len(images), config.batch_size, config.seed, start, config.mirror)
    batches = endless_loader(images, stream, config.workers, device.type == "cuda")
    print(
        f"{len(images)} images, {size} px; generator {trainer.generator.channels}; {device};"
        f" run folder {log.folder}"
    )

    bar = tqdm(total=config.iter, initial=trainer.iteration, unit="it", dynamic_ncols=True)

    def on_event(name: str, metrics: dict[str, float]) -> None:
        iteration = trainer.iteration
        if name == "log":
            log.metrics({"iteration": iteration, **metrics})
            shown = ("d_loss", "g_loss", "kd_l1", "kd_lpips")
            bar.set_postfix({k: f"{metrics[k]:.3f}" for k in shown if k in metrics})
        elif name == "sample":
            with torch.no_grad():
                samples = trainer.g_ema([sample_z], randomize_noise=False)
            pictures.save_png(log.sample_path(iteration), pictures.grid(samples))
        else:
            checkpoint.save(log.checkpoint_path(iteration), trainer.state())

    every = {
        "log": config.log_freq,
        "sample": config.val_sample_freq,
        "checkpoint": config.model_save_freq,
    }
    with bar:
        train(trainer, batches, config.iter, every, on_event, lambda: bar.update())
    return log.folder


def main(argv: list[str] | None = None) -> int:
    """Command line entry."""
    try:
        folder = run(parse_config(argv))
    except (ValueError, NonFiniteError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    print(f"done: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
