"""All settings of a run, its terms' among them, and those that its checkpoints remember."""

from pathlib import Path
from typing import Any

from Compression import distillation
from Compression.content import ContentParser
from train_hyperparams import TrainConfig
from Util.settings import Settings, plain

NOT_REMEMBERED = (
    *("resume", "out", "dry_run", "workers", "threads"),
    *("device", "gpu_device_ids", "primary_device", "dist_timeout"),
    *("log_freq", "n_sample", "val_sample_freq", "model_save_freq", "keep_checkpoints"),
    "wandb",
)
"""Where a run computes and what it writes: no part of how its weights were made."""


def option_kinds() -> list[type[Settings]]:
    """Give the settings of all distillation terms that have any."""
    return [kind.options for kind in distillation.TERMS.values() if kind.options is not None]


def plain_settings(config: Any) -> dict[str, Any]:
    """Give all settings, those of its options among them, as values that JSON holds."""
    settings = plain(config)
    for options in settings.pop("options"):
        settings |= plain(options)
    return settings


def remembered(config: TrainConfig, parser: ContentParser | None) -> dict[str, Any]:
    """Give what made the weights of a checkpoint, files by their names alone."""
    values = {k: v for k, v in plain_settings(config).items() if k not in NOT_REMEMBERED}
    settings = {k: Path(v).name if isinstance(v, str) else v for k, v in values.items()}
    if parser:
        settings |= {"parser_ckpt": parser.name, "content": parser.content}
    return {"training": settings} | ({"recipe": config.recipe} if config.recipe else {})
