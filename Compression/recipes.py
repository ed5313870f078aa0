"""Recipes: every published way to compress a StyleGAN2, as named settings of prune.py and train.py.

    python3 prune.py --recipe dcp --ckpt FILE
    python3 train.py --ckpt PRUNED --teacher_ckpt FILE --path FOLDER

A flag beside --recipe wins over it; a pruned checkpoint remembers its recipe, and train.py takes it
from there. Equations, figures, and where papers and their code disagree: doc/recipes.md.
"""

import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from Model import checkpoint
from Util.settings import SettingError

Values = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a paper used.

    Attributes:
        description: method and source, one line.
        prune: settings of prune.py, by name.
        train: settings of train.py, by name.
    """

    description: str
    prune: Values
    train: Values


# Liu et al., sections 3.2 and 4.1, and the authors' flags.
_CONTENT_AWARE: Values = {
    "metric": "content_aware",
    "n_sample": 400,
    "batch_size": 10,
    "noise_prob": 0.05,  # 5 % of the content
    "init": "pruned",
}
_CAGC: Values = {
    "discriminator": "teacher",  # the authors' checkpoints carry it over
    "batch_size": 16,
    "iter": 450_001,  # 7.2 M images
    "mirror": True,  # no other augmentation
    "lr": 0.002,  # StyleGAN2's, as all of the following up to the terms
    "mixing": 0.9,
    "ema_decay": 0.5 ** (32 / 10_000),
    "r1": 10.0,
    "d_reg_every": 16,
    "path_regularize": 2.0,
    "path_batch_shrink": 2,
    "g_reg_every": 4,
    "gan_ramp": 0,
    "kd_l1_lambda": 3.0,  # section 4.1
    "kd_lpips_lambda": 3.0,
    "kd": (),
    "kd_mode": "Output_Only",
    "perceptual": "vgg",
    "content_aware_KD": True,  # faces; other content: False
}
_FITTED: Values = {"init": "reconstruction", "init_n_sample": 256, "init_outside": 0.1}
# Xu et al.; what they do not change is CAGC's.
_STYLEKD: Values = _CAGC | {
    "discriminator": "scratch",  # its code loads the checkpoint's only with a flag that is not set
    "kd": ("relation=30",),  # the published command: the divergence, weight 30
    "relation_loss": "kl",
    "relation_step": 5.0,  # the code's offset_weight
    "relation_group": 4,  # a process's pictures in the published command; SVS's rounds
    "relation_gather": False,
}
# Kim and Yoon: their port of DCP, and StyleKD's training for twice as many images.
_SVS_SCORES: Values = {
    "metric": "diversity_aware",
    "n_sample": 5000,
    "batch_size": 5,
    "dcp_alpha": 10.0,
    "dcp_directions": 10,
    "dcp_latents": 10_000,
    "dcp_stop_gradient": True,
}
_SVS: Values = _STYLEKD | {
    "batch_size": 32,
    "iter": 468_750,  # 15 M images
    "ema_decay": 0.5 ** (32 / 10_000),  # half-life of 10,000 images, in batches of 32
    "r1": 10.0,
}

RECIPES = {
    "cagc": Recipe('Liu et al., "Content-Aware GAN Compression", CVPR 2021', _CONTENT_AWARE, _CAGC),
    "stylekd": Recipe(
        'Xu et al., "Mind the Gap in Distilling StyleGANs", ECCV 2022',
        {
            "metric": "random",  # the synthesis starts anew, so only the widths matter
            "init": "mapping_only",
        },
        _STYLEKD,
    ),
    "dcp": Recipe(
        'Chung et al., "Diversity-aware Channel Pruning for StyleGAN Compression", CVPR 2024',
        {
            "metric": "diversity_aware",
            "n_sample": 5000,  # the README: 1,000 suffice
            "batch_size": 5,
            "dcp_alpha": 5.0,  # the code's edit_strength
            "dcp_directions": 10,
            "dcp_latents": 10_000,
            "dcp_stop_gradient": False,  # meant, but without effect in the code
            "init": "pruned",  # the figures; the README's command discards the weights
        },
        _STYLEKD,
    ),
    "svs": Recipe(
        'Kim and Yoon, "Singular Value Scaling", AAAI 2025',
        _SVS_SCORES | {"init": "svs"},
        _SVS,
    ),
    "nickel_dime": Recipe(
        'Yeo et al., "Nickel and Diming Your GAN", ECCV 2024',
        _CONTENT_AWARE | {"batch_size": 8},  # the authors' pruning configuration
        _CAGC
        | {
            "discriminator": "scratch",
            # The authors' configuration: StyleGAN2-ADA's paper256, for 40 M images.
            "batch_size": 64,
            "iter": 625_000,
            "lr": 0.0025,
            "r1": 1.0,
            "ema_decay": 0.5 ** (64 / 20_000),  # half-life of 20,000 images
            # No pixel losses, and so no mask.
            "kd_l1_lambda": 0.0,
            "kd_lpips_lambda": 0.0,
            "content_aware_KD": False,
            "kd": ("moments=1", "teacher_discriminator=1", "high_band=10"),
            "moments_networks": ("dino=20", "clip=15"),
            "high_band_side": 64,
        },
    ),
    "ours": Recipe(
        "this project's choice: cagc with widths chosen for the budget, reconstructed",
        # By `python -m benchmarks.widths`, without GAN losses.
        _CONTENT_AWARE
        | {
            "allocation": "greedy",
            "allocation_tie": True,
            "allocation_rounds": 1,
            "min_channels": 4,
        }
        | _FITTED,
        _CAGC,
    ),
    "combined": Recipe(
        "this project's choice by doc/Study.md: svs with filters fitted, distilled everywhere",
        _SVS_SCORES | _FITTED,
        # As studied: there, all 16 pictures of a batch were related.
        _SVS | {"content_aware_KD": False, "relation_group": 16},
    ),
}
NONE, LIST = "none", "list"


def named(name: str) -> Recipe:
    """Find a recipe by its name.

    Raises:
        SettingError: there is none of that name.
    """
    if name not in RECIPES:
        raise SettingError("recipe", f"{name}: unknown; take {', '.join([*RECIPES, LIST])}")
    return RECIPES[name]


def prune_values(name: str) -> dict[str, Any]:
    """Give the settings of prune.py and the name of a recipe; none for no name and list."""
    return {} if name in ("", LIST) else {**named(name).prune, "recipe": name}


def train_values(name: str, ckpt: str = "") -> dict[str, Any]:
    """Give the settings of train.py that a recipe stands for, with its name.

    Args:
        name: of the recipe; ``none`` means none, empty the one that the checkpoint remembers.
        ckpt: the checkpoint to start from, if there is one.
    """
    name = name or remembered(ckpt)
    if name in ("", NONE, LIST):
        return {"recipe": ""} if name == NONE else {}
    return {**named(name).train, "recipe": name}


def remembered(ckpt: str) -> str:
    """Read a checkpoint's recipe; empty where it knows of none or cannot be read."""
    config: Any = None
    if ckpt:
        with contextlib.suppress(checkpoint.CheckpointError):  # reported by what needs the networks
            config = checkpoint.read(ckpt).get("config")
    name = config.get("recipe") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) and name in RECIPES else ""


def table() -> str:
    """List all recipes with their sources, as the flags that they stand for."""
    lines = []
    for name, recipe in RECIPES.items():
        lines.append(f"{name}: {recipe.description}")
        for script, values in (("prune.py", recipe.prune), ("train.py", recipe.train)):
            flags = " ".join(f"--{key} {_text(value)}" for key, value in values.items())
            lines.append(f"  {script} {flags}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return shlex.quote(words)
