"""What a training run refuses before anything is loaded."""

from pathlib import Path

import torch

from Compression import distillation, recipes
from Evaluation.metrics import METRICS
from Model import bundled
from Model.discriminator import GROUP
from Model.generator import resolution_log2
from train_hyperparams import TrainConfig
from Util import distributed
from Util.cli import check_writable
from Util.run_log import check_wandb
from Util.settings import SettingError, blame, check_files

PRIMARY = TrainConfig.primary_device


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        SettingError: names the setting, the value and what to do.
    """
    if not config.path:
        raise SettingError("path", "is missing; give a folder of training images or an LMDB")
    if config.size:
        with blame("size:"):
            resolution_log2(config.size)
    if config.fid_stats and not Path(config.fid_stats).is_file():
        check_writable("fid_stats", Path(config.fid_stats))
    _check_inputs(config)
    check_writable("out", Path(config.out or "runs") / "config.json")
    if config.load_train_state and not config.ckpt:
        raise SettingError("load_train_state", "goes with ckpt; name the checkpoint to go on from")
    if config.fid_n_sample == 1:
        raise SettingError("fid_n_sample", "1: one image has no covariance; take more, or 0")
    _check_gpus(config)
    distillation.weights(config)
    unknown = set(config.fid_metrics) - METRICS.keys()
    if unknown or not config.fid_metrics:
        named = ",".join(config.fid_metrics)
        raise SettingError("fid_metrics", f"{named!r}: take some of {', '.join(METRICS)}")
    if config.recipe:
        recipes.named(config.recipe)
    if (config.kd or config.recipe) and not config.has_teacher:
        name = config.recipe or ",".join(config.kd)
        without = " (--recipe none goes without)" if config.recipe else ""
        raise SettingError(
            "teacher_ckpt", f"is missing; {name} distils from a full-size model{without}"
        )
    processes = distributed.launched_processes()
    if config.batch_size % processes:
        raise SettingError(
            "batch_size",
            f"{config.batch_size} is the global one; it must be divisible by the {processes}"
            " processes",
        )
    _check_parts(config, config.batch_size // processes)
    with blame("wandb"):
        check_wandb(config.wandb)


def _check_parts(config: TrainConfig, own: int) -> None:
    """Refuse parts of a process's images that would compute something else than all at once."""
    part = config.batch_gpu
    if not 0 < part < own:
        return
    if part % GROUP or own % GROUP:
        raise SettingError(
            "batch_gpu",
            f"{part} of {own} images: the discriminator compares groups of {GROUP}, so both must"
            f" be multiples of {GROUP}",
        )
    for name in distillation.weights(config):
        if distillation.TERMS[name].whole_batch:
            raise SettingError(
                "batch_gpu", f"{part}: the term {name} compares all {own} images; leave one out"
            )


def _check_inputs(config: TrainConfig) -> None:
    """Refuse files that are not there; a run that goes on needs no ckpt."""
    check_files(config, *(("ckpt",) if config.resume else ()))
    if config.has_teacher and not Path(config.teacher_ckpt).exists():
        raise SettingError("teacher_ckpt", f"{config.teacher_ckpt}: no such file; check the name")
    if config.has_teacher and config.content_aware_KD and not config.parser_ckpt:
        with blame("parser_ckpt"):
            bundled.default_parser(config.teacher_ckpt)


def _check_gpus(config: TrainConfig) -> None:
    """Refuse GPUs that are not there; a launcher's processes have theirs from it."""
    if config.cuda_graphs and not config.compile:
        raise SettingError("cuda_graphs", "replays what --compile compiles; give that too")
    gpus, primary = config.gpu_device_ids, config.primary_device
    if not gpus or len(set(gpus)) < len(gpus):
        raise SettingError("gpu_device_ids", f"{gpus}: name each GPU once, at least one")
    if PRIMARY != primary != f"cuda:{gpus[0]}" and gpus != (0,):
        raise SettingError("primary_device", f"{primary}: not the first of gpu_device_ids, {gpus}")
    if config.device != "auto" or distributed.launched() or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if not 0 <= min(gpus) <= max(gpus) < count:
        raise SettingError(
            "gpu_device_ids", f"{gpus}: there are {count} GPUs, 0 to {count - 1}, to be seen"
        )
