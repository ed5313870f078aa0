"""One training run: networks, teacher, data, log, and the loop until the end or a signal.

pruned checkpoint + teacher -> g, g_ema, d -> four phases an iteration -> compressed checkpoint
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from Compression.batch_memory import check_batch
from Compression.run.checks import PRIMARY, check
from Compression.run.evaluation import Evaluation, make_evaluation
from Compression.run.loop import run_loop
from Compression.run.networks import make_trainer, reached
from Compression.run.settings import option_kinds, plain_settings, remembered
from Compression.training import Trainer
from Dataset.batches import EndlessBatches
from Dataset.images import Images
from Dataset.loading import load_batches
from Model import checkpoint
from train_hyperparams import TrainConfig
from Util import distributed
from Util.cli import if_interrupted
from Util.device import pick_device, tune_convolutions
from Util.run_log import RunLog, newest_checkpoint
from Util.settings import SettingError, blame

__all__ = ["TrainResult", "check", "option_kinds", "train"]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: of the run.
        iteration: that it reached.
        signal: number of the signal that ended it early, or 0.
        rows: of metrics.jsonl; empty in all processes but the first.
        trained: something was left to do.
    """

    folder: Path
    iteration: int
    signal: int
    rows: list[dict[str, float]]
    trained: bool = True

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.folder / "checkpoints" / f"{self.iteration:06d}.pt"


def train(config: TrainConfig, announce: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Train as configured; in one of several processes, this one's share.

    Args:
        config: the settings.
        announce: called in the first process with a line that tells what begins.

    Raises:
        SettingError: names the setting or file; path, after a checkpoint has been written, where
            the images gave out in one process at least.
        OutOfStepError: the processes' weights differ; no checkpoint has been written.
        NonFiniteError: a loss became NaN or infinite; the state before it has been written.
    """
    check(config)
    tune_convolutions()
    device = distributed.join(_device(config), config.dist_timeout)
    if distributed.rank():
        announce = _nowhere
    config = _of_first_process(config)
    if iteration := distributed.from_first(reached(config)):
        return TrainResult(Path(config.out), iteration, 0, [], trained=False)
    if device.type == "cpu":
        config = replace(config, threads=torch.get_num_threads())
    trainer, origin, parser = make_trainer(config, device, announce)
    if config.dry_run:
        config = replace(config, iter=trainer.iteration + 2, log_freq=1)
    config = replace(config, size=trainer.generator.size, channels=trainer.generator.channels)
    # What can be refused is, before a folder is made.
    with blame("path"):
        images = Images(config.path, config.size, config.max_bad, config.resample)
    with torch.random.fork_rng(devices=()):  # new networks draw weights before they are loaded
        evaluation = make_evaluation(config, trainer, images)
    check_batch(trainer, announce, always=config.dry_run)
    config = replace(config, out=config.out or distributed.from_first(_new_folder()))
    log = _open_log(config, trainer, evaluation)
    try:
        for term in trainer.teacher.terms if trainer.teacher else ():
            term.parts.prepare()
        if log:
            announce(
                f"{config.path}: {config.size} px; generator {config.channels};"
                f" {distributed.world_size()} x {device.type}; threads {config.threads};"
                f" run folder {config.out}" + (f"; recipe {config.recipe}" if config.recipe else "")
            )
            if evaluation:
                announce(f"{', '.join(config.fid_metrics)} by {evaluation.about}")
        batches = _stream(config, trainer, images)
        with if_interrupted(lambda: _way_on(config)):  # by a second Ctrl-C
            making = origin | remembered(config, parser)
            signal = run_loop(config, trainer, batches, log, evaluation, making)
    finally:
        if log:
            log.close()
    distributed.meet()  # a launcher would end the first process in the middle of it
    rows = log.rows() if log else []
    return TrainResult(Path(config.out), trainer.iteration, signal, rows)


def _way_on(config: TrainConfig) -> str:
    """What an interrupted run has kept, and how it goes on, in words."""
    kept = newest_checkpoint(config.out)
    return f"{kept or 'no checkpoint'} is kept; --resume {config.out} goes on from there"


def _device(config: TrainConfig) -> torch.device:
    """The device of the settings; auto means the first of the GPUs where there is CUDA.

    Raises:
        SettingError: it cannot do what another setting asks for.
    """
    name, gpus = config.device, config.gpu_device_ids
    if name == "auto" and torch.cuda.is_available():
        name = f"cuda:{gpus[0]}" if config.primary_device == PRIMARY else config.primary_device
    device = pick_device(name, config.tf32, gpus, config.threads)
    if config.cuda_graphs and device.type != "cuda":
        raise SettingError("cuda_graphs", f"is for GPUs, and this run is on {device}; leave it out")
    return device


def _of_first_process(config: TrainConfig) -> TrainConfig:
    """The settings of process 0 for all; where each one runs is its own."""
    first: TrainConfig = distributed.from_first(config)
    return replace(first, device=config.device, workers=config.workers)


def _nowhere(text: str) -> None:
    """Announce nothing."""


def _stream(config: TrainConfig, trainer: Trainer, images: Images) -> Iterator[torch.Tensor]:
    """This process's share of the endless stream of batches, from where the run is."""
    share = EndlessBatches(
        len(images),
        config.batch_size,
        config.seed,
        trainer.images_seen,
        config.mirror,
        distributed.rank(),
        distributed.world_size(),
    )
    return load_batches(images, share, config.workers, trainer.device)


def _new_folder() -> str:
    """A new folder of the current time; runs of the same second get one each. Of rank 0 only."""
    now = time.strftime("runs/%Y%m%d-%H%M%S")
    names = (now if i == 1 else f"{now}-{i}" for i in itertools.count(1))
    while distributed.rank() == 0:
        name = next(names)
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            return name
    return ""


def _open_log(
    config: TrainConfig, trainer: Trainer, evaluation: Evaluation | None
) -> RunLog | None:
    """The run's folder, in the first process only."""
    if distributed.rank() != 0:
        return None
    with blame("out"):
        return RunLog(
            config.out,
            plain_settings(config),
            checkpoint.save,
            trainer.iteration if config.resume else None,
            config.keep_checkpoints,
            evaluation.best_by if evaluation else None,
            config.wandb,
        )
