"""Surgery: from keep masks to a smaller generator.

A channel group is the constant input's or one styled convolution's output (`Generator.channels`).
Who reads a group is fixed by the architecture: the next convolution, and a ToRGB where the
resolution ends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from Model.generator import Generator
from Model.layers import ModulatedConv2d, StyledConv, ToRGB


def _check_keep(generator: Generator, keep: Sequence[Tensor]) -> None:
    """Refuse masks that do not fit the generator."""
    widths = generator.channels
    if len(keep) != len(widths):
        raise ValueError(f"keep has {len(keep)} masks; the generator has {len(widths)} groups")
    for group, (mask, width) in enumerate(zip(keep, widths, strict=True)):
        if mask.dtype != torch.bool or mask.shape != (width,):
            raise ValueError(
                f"keep mask {group} is {mask.dtype} of shape {tuple(mask.shape)};"
                f" expected torch.bool of shape ({width},)"
            )
        if not mask.any():
            raise ValueError(f"keep mask {group} keeps no channel; at least one must stay")


def _copy_conv(
    source: ModulatedConv2d, target: ModulatedConv2d, keep_in: Tensor, keep_out: Tensor | None
) -> None:
    """Copy the kept filters; the modulation has one row per input channel. None keeps all.

    Of filters that become smaller, the middle stays.
    """
    cut = (source.weight.shape[-1] - target.weight.shape[-1]) // 2
    side = slice(cut, source.weight.shape[-1] - cut)
    weight = source.weight[:, :, keep_in, side, side]
    target.weight.copy_(weight if keep_out is None else weight[:, keep_out])
    target.modulation.weight.copy_(source.modulation.weight[keep_in])
    target.modulation.bias.copy_(source.modulation.bias[keep_in])


def _copy_styled_conv(
    source: StyledConv, target: StyledConv, keep_in: Tensor, keep_out: Tensor
) -> None:
    _copy_conv(source.conv, target.conv, keep_in, keep_out)
    if source.conv.upsample:  # the filter is the network's, and need not be the usual one
        target.conv.blur.kernel.copy_(source.conv.blur.kernel)
    target.noise.weight.copy_(source.noise.weight)
    target.activate.bias.copy_(source.activate.bias[keep_out])


def _copy_to_rgb(source: ToRGB, target: ToRGB, keep_in: Tensor) -> None:
    _copy_conv(source.conv, target.conv, keep_in, None)
    if hasattr(source, "upsample"):
        target.upsample.kernel.copy_(source.upsample.kernel)
    target.bias.copy_(source.bias)


@torch.no_grad()
def prune_generator(
    generator: Generator, keep: Sequence[Tensor], second_kernel: int | None = None
) -> Generator:
    """Build the generator that has only the kept channels, with their weights.

    It computes what the full one computes with the styles of the removed channels set to zero, with
    one difference: every ToRGB's convolution comes out sqrt(full / kept) times larger, because its
    weight scale follows its own fan-in (see `Model.layers.ToRGB`). The styled convolutions have no
    such gain: demodulation cancels it.

    Args:
        generator: the full network; left as it is.
        keep: one bool tensor (C,) per channel group, True where the channel stays.
        second_kernel: see `Generator`; 1 leaves the middle of 3x3 filters, and what is computed is
            another thing then. None leaves the filters as large as they are.

    Returns:
        A new generator on the same device, all of its parameters trainable. Mapping network and
        noise maps are copies.

    Raises:
        ValueError: the masks do not fit the generator or keep nothing of a group, or filters would
            become larger.
    """
    _check_keep(generator, keep)
    if (second_kernel or 1) > generator.second_kernel:
        raise ValueError(f"filters of {generator.second_kernel} px cannot become {second_kernel}")
    keep = [mask.to(generator.device) for mask in keep]
    with torch.random.fork_rng(devices=[]):  # the initial values are all overwritten
        widths = [int(mask.sum()) for mask in keep]
        pruned = generator.like(widths, second_kernel)
    pruned.to(generator.input.input).train(generator.training)

    pruned.style.load_state_dict(generator.style.state_dict())
    pruned.noises.load_state_dict(generator.noises.state_dict())
    pruned.input.input.copy_(generator.input.input[:, keep[0]])
    pairs = zip(generator.styled_convs, pruned.styled_convs, strict=True)
    for i, (conv, small_conv) in enumerate(pairs):
        _copy_styled_conv(conv, small_conv, keep[i], keep[i + 1])
    rgb_pairs = zip(generator.rgb_layers, pruned.rgb_layers, strict=True)
    for (to_rgb, small_rgb), mask in zip(rgb_pairs, keep[1::2], strict=True):
        _copy_to_rgb(to_rgb, small_rgb, mask)
    return pruned
