"""What a channel does, as a picture: where images change when it is removed.

Liu et al., "Content-Aware GAN Compression", CVPR 2021, compare channels of high and of low score by
their activations. Here the whole network answers: a channel that matters changes the content.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from Evaluation import sampling
from Evaluation.settings import PICTURE_SIDE
from Model.generator import Generator
from Model.layers import StyledConv, ToRGB
from Util.pictures import captioned, grid, rescale, save_png

WHITE = 0.99
"""The share of the pixels that are darker than the brightest colour of a heat map."""


def group_readers(generator: Generator, group: int) -> list[StyledConv | ToRGB]:
    """All layers that read a channel group: the next convolution, ToRGB where a resolution ends."""
    convs: list[StyledConv | ToRGB] = generator.styled_convs[group : group + 1]  # type: ignore[assignment]
    return convs + (generator.rgb_layers[group // 2 : group // 2 + 1] if group % 2 else [])


@torch.no_grad()
def without_channel(generator: Generator, group: int, channel: int) -> Generator:
    """Copy a generator whose layers see nothing of a channel: its style is 0 in all readers."""
    copied = copy.deepcopy(generator)
    for layer in group_readers(copied, group):
        layer.conv.modulation.weight[channel] = 0
        layer.conv.modulation.bias[channel] = 0
    return copied


def heat(values: Tensor) -> Tensor:
    """Colour values (N, 1, H, W): 0 black, then red and yellow, 1 and above white; in [-1, 1]."""
    thirds = torch.arange(3, device=values.device).view(1, 3, 1, 1)
    return (3 * values - thirds).clamp(0, 1) * 2 - 1


def channel_pictures(
    generator: Generator, scores: Sequence[Tensor], seed: int = 0, n: int = 6
) -> np.ndarray:
    """Show what the highest- and the lowest-scored channel of every resolution do.

    The groups are those that end a resolution. The heat maps show the change of every pixel, the
    mean over the three colours of |image without the channel - image|; both channels of a group
    share their scale.

    Args:
        generator: before pruning.
        scores: one 1-D tensor per channel group.
        seed: of the latents, >= 0.
        n: images.

    Returns:
        (H, W, 3) bytes: a row of images, then two rows of heat maps for each resolution.
    """
    scale = max(1, PICTURE_SIDE / generator.size)
    latents = sampling.from_z(generator, sampling.draw_z(generator, range(n), seed))
    images = sampling.render(generator, latents)

    def row(pictures: Tensor) -> np.ndarray:
        return grid(rescale(pictures, scale), columns=n, gap=4)

    blocks = {"images": row(images)}
    for group in range(1, len(scores), 2):
        order = scores[group].argsort()
        changes = {}
        for name, channel in (("highest", int(order[-1])), ("lowest", int(order[0]))):
            removed = sampling.render(without_channel(generator, group, channel), latents)
            changes[name, channel] = (removed - images).abs().mean(dim=1, keepdim=True)
        values = torch.cat(list(changes.values())).cpu().numpy()
        white = float(np.quantile(values, WHITE)) or 1.0
        for (name, channel), change in changes.items():
            caption = (
                f"{2 ** (group // 2 + 2)} px, {name} score {scores[group][channel]:.3g}\n"
                f"channel {channel}, mean change {change.mean():.3g}\nwhite: from {white:.3g} on"
            )
            blocks[caption] = row(heat(change / white))
    return captioned(blocks, gap=4)


def save_channel_pictures(
    checkpoint: Path, generator: Generator, scores: Sequence[Tensor], seed: int
) -> Path:
    """Write `channel_pictures` beside a checkpoint as NAME_channels.png."""
    file = checkpoint.with_name(f"{checkpoint.stem}_channels.png")
    save_png(file, channel_pictures(generator, scores, seed))
    return file
