"""Retrain a pruned StyleGAN2 generator, or train one from scratch."""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from Compression.content import ContentParser, load_content_parser
from Compression.training import NonFiniteError, Teacher, Trainer, train
from Dataset.images import DatasetError, EndlessBatches, Images, load_batches
from Evaluation import feature_statistics, sampling
from Evaluation.distances import Distance, ParserDistance, load_lpips
from Evaluation.feature_sets import real_statistics, sampled_features
from Evaluation.features import make_extractor
from Evaluation.metrics import evaluate as evaluate_metrics
from Model import checkpoint
from Model.bundled import default_parser
from Model.discriminator import Discriminator
from Model.generator import Generator, resolution_log2
from train_hyperparams import TrainConfig, add_flags, check_ranges, known_settings
from Util import distributed, pictures
from Util.cli import OneLineParser, check_writable, run_script
from Util.device import peak_memory_gib, pick_device, set_tf32
from Util.run_log import TIMING, RunLog, newest_checkpoint, read_config, read_metrics
from Util.settings import blame
from Util.stopping import StopRequest

EXAMPLES = """examples:
  retrain a pruned model, distilling from the full-size one inside the face:
    python3 train.py --path FFHQ_LMDB --size 256 --ckpt Model/pruned_model/PRUNED.pt \\
        --teacher_ckpt Model/full_size_model/256px_full_size.pt --iter 450001 --batch_size 16
  train a small full-size model from scratch:
    python3 train.py --path Dataset/toon_faces_64px/images --size 64 --style_dim 128 --n_mlp 4 \\
        --channels 64,64,64,64,64,64,32,32,16,16 --batch_size 32 --r1 0.1 --iter 10000
Every default and its reason: train_hyperparams.py"""

Evaluate = Callable[[], dict[str, float]]
"""Measures the moving average: name of a figure -> value."""


def build_parser() -> OneLineParser:
    """All flags of the script."""
    parser = OneLineParser(
        prog="train.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    return parser


def parse_config(argv: Sequence[str] | None) -> TrainConfig:
    """Read the flags into a `TrainConfig`; --resume takes the settings of its run as defaults.

    Raises:
        ValueError: names the flag, the value and what to do.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        folder = run_folder(args.resume)
        with blame("resume"):
            saved = known_settings(read_config(folder))
        parser.set_defaults(**saved)
        parser.set_defaults(out=str(folder))
        args = parser.parse_args(argv)
    config = TrainConfig(**{item.name: getattr(args, item.name) for item in fields(TrainConfig)})
    check_config(config)
    return config


def run_folder(resume: str) -> Path:
    """Folder of the run that --resume names, by itself or by one of its checkpoints."""
    path = Path(resume)
    return path.parent.parent if path.is_file() else path


def check_config(config: TrainConfig) -> None:
    """Refuse settings that cannot work.

    Raises:
        ValueError: names the flag, the value and what to do.
    """
    check_ranges(config)
    if not config.path:
        raise ValueError("--path is missing; give a folder of training images or an LMDB")
    if config.size:
        resolution_log2(config.size)
    if config.fid_stats and Path(config.fid_stats).is_dir():
        raise ValueError(f"--fid_stats {config.fid_stats} is a folder; name a file")
    check_writable("out", Path(config.out or "runs") / "config.json")
    if config.load_train_state and not config.ckpt:
        raise ValueError("--load_train_state goes with --ckpt; name the checkpoint to go on from")
    processes = distributed.launched_processes()
    if config.batch_size % processes:
        raise ValueError(
            f"--batch_size {config.batch_size} is the global one; it must be divisible by the"
            f" {processes} processes"
        )


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
) -> Distance | None:
    """The perceptual distance that --perceptual names, or None when its weight is 0."""
    if not config.kd_lpips_lambda:
        return None
    if config.perceptual == "parser":
        assert parser is not None
        return ParserDistance(parser.network)
    return load_lpips(config.perceptual, config.perceptual_ckpt or None).to(device)


def make_teacher(config: TrainConfig, size: int, device: torch.device) -> Teacher | None:
    """The full-size generator with its mask and perceptual distance, or None without --teacher."""
    if not config.teacher_ckpt:
        return None
    with blame("teacher_ckpt"):
        generator = checkpoint.load_generator(config.teacher_ckpt, device=device, size=size)
    parser = None
    if config.content_aware_KD or config.perceptual == "parser":
        file = config.parser_ckpt or default_parser(config.teacher_ckpt)
        with blame("parser_ckpt"):
            parser = load_content_parser(file, device)
    return Teacher(
        generator.eval().requires_grad_(False),
        parser if config.content_aware_KD else None,
        make_perceptual(config, parser, device),
    )


def make_trainer(config: TrainConfig, device: torch.device) -> Trainer:
    """Build networks, teacher and optimisers, and take up a saved state if asked."""
    source, resume = config.ckpt, config.load_train_state
    if config.resume:
        file = Path(config.resume)
        newest = file if file.is_file() else newest_checkpoint(file)
        # A run that was ended before its first checkpoint starts again as it did.
        source, resume = (str(newest), True) if newest else (source, resume)
    torch.manual_seed(config.seed)
    with blame("ckpt" if source else "--size and --channels:"):
        content = checkpoint.read(source) if source else {}
        if content and "d" not in content and config.teacher_ckpt:
            content["d"] = checkpoint.read(config.teacher_ckpt).get("d")
        generator, g_ema, discriminator = make_networks(config, content)
    teacher = make_teacher(config, generator.size, device)
    trainer = Trainer(generator, discriminator, config, device, teacher, g_ema)
    if distributed.world_size() > 1:
        torch.manual_seed(config.seed * distributed.world_size() + distributed.rank() + 1)
    if resume:
        with blame(f"ckpt {source}:"):
            trainer.load_state(content)
    return trainer


def make_evaluation(config: TrainConfig, trainer: Trainer, images: Images) -> Evaluate | None:
    """What measures the Frechet distance of g_ema, or None without --fid_n_sample.

    Raises:
        ValueError: names the flag and what to do.
    """
    if not config.fid_n_sample:
        return None
    parser_file = None
    if config.fid_features == "parser":
        parser_file = Path(config.parser_ckpt or default_parser(config.teacher_ckpt))
    inception = Path(config.inception_ckpt) if config.inception_ckpt else None
    extractor = make_extractor(config.fid_features, inception, parser_file, None, trainer.device)
    with blame("fid_n_sample"):
        width = extractor.dimensions(trainer.generator.size, trainer.device)
        feature_statistics.check_enough(config.fid_n_sample, width)
    if config.dry_run:
        return None
    stats = Path(config.fid_stats) if config.fid_stats else None
    with blame("fid_stats" if stats and stats.is_file() else "path"):
        real = real_statistics(
            images, stats, extractor, trainer.device, config.fid_batch, config.workers
        )

    def evaluate() -> dict[str, float]:
        features = sampled_features(
            trainer.g_ema, extractor, config.fid_n_sample, config.fid_batch, config.seed
        )
        figures = evaluate_metrics(["fid"], extractor, features, real, config.seed)
        return {name.lower().replace(" ", "_"): value for name, value in figures.items()}

    return evaluate


def open_stream(config: TrainConfig, trainer: Trainer, images: Images) -> Iterator[torch.Tensor]:
    """This process's share of the endless stream of batches, from where the run is."""
    stream = EndlessBatches(
        len(images),
        config.batch_size,
        config.seed,
        trainer.images_seen,
        config.mirror,
        distributed.rank(),
        distributed.world_size(),
    )
    return load_batches(images, stream, config.workers, trainer.device.type == "cuda")


class Events:
    """What happens at the events of `train`, one method each; all processes take part, one writes.

    Args:
        config: the run's settings.
        trainer: the run.
        log: where it is written, in the first process.
        bar: shows the progress.
        evaluate: measures g_ema, if anything does.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        log: RunLog | None,
        bar: tqdm,
        evaluate: Evaluate | None,
    ) -> None:
        self.trainer, self.run_log, self.bar, self.measure = trainer, log, bar, evaluate
        stream = torch.Generator().manual_seed(config.seed)
        z = torch.randn(config.n_sample, trainer.generator.style_dim, generator=stream)
        self.z = z.to(trainer.device)

    def __call__(self, name: str) -> None:
        """Do what is due at an event."""
        getattr(self, name)()

    def iteration(self) -> None:
        """Move the bar."""
        self.bar.update()

    def log(self) -> None:
        """Write the means of the metrics since the last time."""
        trainer = self.trainer
        metrics = trainer.averages.flush() | {"peak_memory_gib": peak_memory_gib(trainer.device)}
        if self.run_log:
            self.run_log.metrics(trainer.iteration, metrics)
            shown = ("d_loss", "g_loss", "kd_l1", "kd_lpips")
            self.bar.set_postfix({k: f"{metrics[k]:.3f}" for k in shown if k in metrics})

    def sample(self) -> None:
        """Write a grid of g_ema's images, always of the same latents."""
        if self.run_log:
            g_ema = self.trainer.g_ema
            samples = sampling.render(g_ema, sampling.from_z(g_ema, self.z))
            self.run_log.samples(self.trainer.iteration, pictures.grid(samples))

    def evaluate(self) -> None:
        """Measure g_ema."""
        if self.measure:
            with self.trainer.averages.paused():
                figures = self.measure()
            if self.run_log:
                self.run_log.metrics(self.trainer.iteration, figures)

    def checkpoint(self) -> None:
        """Write a checkpoint."""
        state = self.trainer.state()
        if self.run_log:
            self.run_log.checkpoint(self.trainer.iteration, state)


def default_folder() -> str:
    """A new folder of the current time; runs of the same second get one each. Of rank 0 only."""
    now = time.strftime("runs/%Y%m%d-%H%M%S")
    names = (now if i == 1 else f"{now}-{i}" for i in itertools.count(1))
    while distributed.rank() == 0:
        name = next(names)
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            return name
    return ""


def open_log(config: TrainConfig, trainer: Trainer) -> RunLog | None:
    """The run's folder, in the first process only."""
    if distributed.rank() != 0:
        return None
    resume_at = trainer.iteration if config.resume or config.load_train_state else None
    log = RunLog(config.out, asdict(config), checkpoint.save, resume_at, config.keep_checkpoints)
    print(
        f"{config.path}: {config.size} px; generator {config.channels};"
        f" {distributed.world_size()} x {trainer.device.type}; run folder {config.out}"
    )
    return log


def train_to_the_end(
    config: TrainConfig,
    trainer: Trainer,
    batches: Iterator[torch.Tensor],
    log: RunLog | None,
    evaluate: Evaluate | None,
) -> int:
    """Train under a progress bar until the end or a signal; returns the exit code."""
    bar = tqdm(
        total=config.iter, initial=trainer.iteration, unit="it", dynamic_ncols=True, disable=not log
    )
    on_event = Events(config, trainer, log, bar, evaluate)
    every = {
        "iteration": 1,
        "log": config.log_freq,
        "sample": config.val_sample_freq,
        "evaluate": config.model_save_freq,
        "checkpoint": config.model_save_freq,
    }
    with bar, StopRequest() as stop:
        try:
            train(trainer, batches, config.iter, every, on_event, stop)
        except DatasetError:
            if distributed.world_size() == 1:  # the others would have to take part
                on_event("checkpoint")
            raise
        except NonFiniteError as error:
            kept = Path(config.out) / f"before_non_finite_{trainer.iteration:06d}.pt"
            checkpoint.save(kept, trainer.state(together=False))
            raise NonFiniteError(f"{error} (the state before it: {kept})") from None
        if trainer.iteration >= config.iter:
            return 0
        on_event("checkpoint")
        bar.write(f"stopped at iteration {trainer.iteration}; go on with --resume {config.out}")
    return 128 + stop.signal


def run(config: TrainConfig) -> int:
    """Train as configured; returns the exit code."""
    set_tf32(config.tf32)
    trainer = make_trainer(config, distributed.join(training_device(config)))
    if config.dry_run:
        config = replace(config, iter=trainer.iteration + 2, log_freq=1)
    config = replace(
        config,
        size=trainer.generator.size,
        channels=trainer.generator.channels,
    )
    # What can be refused is, before a folder is made.
    images = Images(config.path, config.size, config.max_bad)
    with torch.random.fork_rng(devices=()):  # new networks draw weights before they are loaded
        evaluate = make_evaluation(config, trainer, images)
    config = replace(config, out=config.out or distributed.gather(default_folder())[0])
    log = open_log(config, trainer)
    try:
        stream = open_stream(config, trainer, images)
        code = train_to_the_end(config, trainer, stream, log, evaluate)
    finally:
        if log:
            log.close()
    if log:
        if config.dry_run:
            print_dry_run(log.folder)
        elif code == 0:
            print(f"done: {config.out}")
    return code


def print_dry_run(folder: Path) -> None:
    """Print what two iterations tell; from scratch, the first has all regularisers."""
    first, second = read_metrics(folder)[-2:]
    losses = {k: round(v, 4) for k, v in first.items() if k not in ("iteration", *TIMING)}
    speed, memory = TIMING
    print(f"dry run: all is well; losses of the first iteration: {losses}")
    print(f"{first[speed]:.1f}, then {second[speed]:.1f} images/s; peak {second[memory]:.2f} GiB")


def training_device(config: TrainConfig) -> torch.device:
    """The device of --device; auto means primary_device where there is CUDA."""
    if config.device == "auto" and torch.cuda.is_available():
        return pick_device(config.primary_device)
    return pick_device(config.device)


def start(argv: Sequence[str] | None) -> int:
    """Train as the flags say, maybe in other processes; returns the exit code."""
    config = parse_config(argv)
    several = len(config.gpu_device_ids) > 1 and config.device == "auto"
    if several and not distributed.launched() and torch.cuda.is_available():
        flags = sys.argv[1:] if argv is None else argv
        distributed.relaunch(__file__, flags, config.gpu_device_ids)
    if config.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return run(replace(config, out=folder))
    return run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    try:
        return run_script(build_parser(), lambda _: start(argv), argv)
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
