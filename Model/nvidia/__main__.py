"""Convert a StyleGAN2 file of NVIDIA's to a checkpoint; none of its code is run."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Model import checkpoint, nvidia
from Model.discriminator import ResBlock
from Model.layers import FusedLeakyReLU, StyledConv, ToRGB
from Util.cli import check_target, run_conversion
from Util.settings import Settings, setting

EPILOG = """example:
  python -m Model.nvidia ffhq.pkl Model/full_size_model/ffhq.pt

Pickles of stylegan2-ada-pytorch, of stylegan3's StyleGAN2 configurations and of the TensorFlow
StyleGAN2 (configurations E and F). There is no way back (--to nvidia): NVIDIA's loaders build a
network by running Python source from the file, so a file without code would be of no use to them.
doc/nvidia.md says what is supported."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """How a file is converted."""

    n_sample: int = setting(
        2,
        "images on which it is checked that the clamped activations of training in half precision"
        " are never clamped; 0: no check",
        low=0,
        metavar="N",
    )
    discriminator: bool = setting(
        True, "convert the discriminator too; False for a file where it alone is unsupported"
    )


def convert(source: Path, target: Path, settings: ConvertSettings) -> list[str]:
    """Convert a file; what is written has been loaded once.

    Returns:
        One line for each network, each remark and the file.

    Raises:
        ValueError: names the file and what is wrong.
    """
    if not source.is_file():
        raise ValueError(f"{source}: no such file; name a .pkl of NVIDIA's")
    if not nvidia.is_pickle(source):
        raise ValueError(f"{source}: no pickle of NVIDIA's; a .pt needs no conversion")
    check_target(source, target)
    content, notes, clamp = nvidia.import_networks(source, settings.discriminator)
    lines = checkpoint.summary(content, str(source))
    if clamp is not None and settings.n_sample:
        notes += clamp_notes(content, clamp, settings.n_sample)
    checkpoint.save(target, content)
    return [*lines, *(f"note: {note}" for note in notes), f"saved {target}"]


def clamp_notes(content: Mapping[str, Any], clamp: float, n: int) -> list[str]:
    """What to say if activations reach the magnitude at which NVIDIA's networks cut them off."""
    peak = largest_activation(content, "g_ema" if "g_ema" in content else "g", n)
    if peak < clamp:
        return []
    return [
        f"it was trained with activations clamped to {clamp:g} and they reach {peak:.0f} on {n}"
        " samples; nothing is clamped here, so images may differ from NVIDIA's"
    ]


@torch.no_grad()
def largest_activation(content: Mapping[str, Any], key: str, n: int) -> float:
    """Largest magnitude behind the layers that NVIDIA's networks may clamp, on n random images.

    Args:
        content: checkpoint with a generator and, if there, a discriminator that looks at them.
        key: of the generator.
        n: images, made one at a time from seeds 0, 1, ...

    Raises:
        CheckpointError: a network does not load.
    """
    generator = checkpoint.load_generator(content, key)
    judge = checkpoint.load_discriminator(content) if "d" in content else None
    peaks = [0.0]
    for network in (generator, judge):
        for module in network.modules() if network else ():
            watch(module, peaks)
    for seed in range(n):
        random = torch.Generator().manual_seed(seed)
        image = generator.forward(
            [torch.randn(1, generator.style_dim, generator=random)], randomize_noise=False
        )
        if judge:
            judge(image)
    return max(peaks)


def watch(module: nn.Module, peaks: list[float]) -> None:
    """Note the largest magnitude that a layer puts out, before RGB images are added up.

    A layer with another gain is clamped at as much of it: the two paths of a `ResBlock`.
    """
    if isinstance(module, ResBlock):
        for path in (module.conv2, module.skip):
            path.register_forward_hook(
                lambda _, __, y: peaks.append(y.abs().max().item() / math.sqrt(0.5))
            )
    elif isinstance(module, StyledConv | FusedLeakyReLU):
        module.register_forward_hook(lambda _, __, y: peaks.append(y.abs().max().item()))
    elif isinstance(module, ToRGB):

        def note(layer: ToRGB, inputs: tuple[Any, ...], y: Tensor) -> None:
            rgb = inputs[2]
            own = y if rgb is None else y - layer.upsample(rgb)
            peaks.append(own.abs().max().item())

        module.register_forward_hook(note)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_conversion(
        ConvertSettings,
        convert,
        argv,
        prog="python -m Model.nvidia",
        description=__doc__,
        epilog=EPILOG,
        source=("IN.pkl", "file of NVIDIA's"),
    )


if __name__ == "__main__":
    sys.exit(main())
