"""What a network of NVIDIA was built with, and which of it this project's networks can be.

Names are those of the constructors in stylegan2-ada-pytorch (``training/networks.py``), stylegan3
(``training/networks_stylegan2.py``) and the TensorFlow StyleGAN2 and StyleGAN2-ADA
(``training/networks_stylegan2.py``, ``training/networks.py``).
"""

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["generator", "discriminator"]
Setting = tuple[str, Any]
"""Name and value."""


class UnsupportedError(ValueError):
    """A network that this project's format cannot hold; says why."""


LABELS = "networks conditioned on class labels have no counterpart here"
COLOURS = "the networks here make three colours"
FILTER = "the networks here resample by the filter [1, 3, 3, 1]"
ACTIVATION = "the networks here have leaky ReLUs"
NOISE = "every layer here has noise"
STDDEV = "the discriminator here has one map of the minibatch standard deviation"

REQUIRED: Mapping[str, tuple[Any, str]] = {
    "c_dim": (0, LABELS),
    "cmap_dim": (0, LABELS),
    "label_size": (0, LABELS),
    "img_channels": (3, COLOURS),
    "num_channels": (3, COLOURS),
    "resample_filter": ([1, 3, 3, 1], FILTER),
    "resample_kernel": ([1, 3, 3, 1], FILTER),
    "activation": ("lrelu", ACTIVATION),
    "nonlinearity": ("lrelu", ACTIVATION),
    "mapping_nonlinearity": ("lrelu", ACTIVATION),
    "use_noise": (True, NOISE),
    "kernel_size": (3, "the networks here have 3x3 convolutions"),
    "mbstd_num_channels": (1, STDDEV),
    "mbstd_num_features": (1, STDDEV),
    "normalize_latents": (True, "the mapping network here normalises z"),
    "synthesis_func": ("G_synthesis_stylegan2", "only configurations E and F are supported"),
    "mapping_func": ("G_mapping", "only StyleGAN2's mapping network is supported"),
}
"""Setting -> the value that it must have, and why."""

ARCHITECTURES = {"generator": "skip", "discriminator": "resnet"}

_FREE = (
    "z_dim w_dim img_resolution num_layers embed_features layer_features lr_multiplier w_avg_beta"
    " channel_base channel_max num_fp16_res conv_clamp fp16_channels_last fused_modconv_default"
    " freeze_layers freeze_embed mbstd_group_size"
    " latent_size dlatent_size resolution mapping_layers label_fmaps mapping_fmaps mapping_lrmul"
    " dlatent_avg_beta fmap_base fmap_decay fmap_min fmap_max truncation_psi truncation_cutoff"
    " truncation_psi_val truncation_cutoff_val style_mixing_prob structure randomize_noise"
    " fused_modconv dtype dlatent_broadcast"
)
FREE = frozenset(_FREE.split())
"""Settings that the shapes of the tensors repeat, that only training uses, or that are read."""


@dataclass(frozen=True)
class Facts:
    """What conversion needs to know of a network beyond its tensors.

    Attributes:
        lr_mul: learning rate multiplier of the mapping network.
        clamp: magnitude at which activations are cut off in training in half precision, or None.
        group: images that the minibatch standard deviation compares; None: the whole batch.
    """

    lr_mul: float = 0.01
    clamp: float | None = None
    group: int | None = 4


def flat_settings(settings: Mapping[str, Any], nested: bool = False) -> Iterator[Setting]:
    """Constructor arguments; those in ``synthesis_kwargs`` and the like come without their group.

    Raises:
        UnsupportedError: one is unknown.
    """
    for name, value in settings.items():
        if str(name).endswith("_kwargs") and isinstance(value, Mapping) and not nested:
            yield from flat_settings(value, nested=True)
        elif name in REQUIRED or name in FREE or name == "architecture":
            yield str(name), value
        else:
            raise UnsupportedError(
                f"built with {name}={reprlib.repr(value)}, a setting of no published StyleGAN2"
            )


def check(settings: list[Setting], kind: Kind) -> Facts:
    """Refuse a network that cannot be converted exactly.

    Raises:
        UnsupportedError: names the setting, its value and the reason.
    """
    for name, value in settings:
        required, reason = REQUIRED.get(name, (None, ""))
        if name == "architecture":
            required, reason = ARCHITECTURES[kind], f"a {kind} here is {ARCHITECTURES[kind]!r} only"
        if name == "cmap_dim" and value is None:
            continue
        if required is not None and _plain(value) != required:
            raise UnsupportedError(f"{name} is {reprlib.repr(value)}, not {required!r}: {reason}")
    return _facts(settings)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _facts(settings: list[Setting]) -> Facts:
    rates = [v for name, v in settings if name in ("lr_multiplier", "mapping_lrmul")] or [0.01]
    clamps = [v for name, v in settings if name == "conv_clamp" and v is not None]
    for value in rates + clamps:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UnsupportedError(
                f"lr_multiplier or conv_clamp is {reprlib.repr(value)}, no positive number"
            )
    group = dict(settings).get("mbstd_group_size", 4)
    if group is not None and (type(group) is not int or group < 2):
        raise UnsupportedError(f"mbstd_group_size is {reprlib.repr(group)}, not at least 2")
    return Facts(rates[-1], min(clamps, default=None), group)
