"""Channel selection: from scores to keep masks (paper, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_count(channels: int, remove_ratio: float) -> int:
    """Channels that stay of a group, at least one for a ratio in [0, 1)."""
    return channels - int(channels * remove_ratio)


def select_channels(scores: Sequence[Tensor], remove_ratio: float) -> list[Tensor]:
    """Choose the channels that stay: in every group the lowest scores go.

    All groups lose the same fraction. Of equal scores the lower index goes first (stable sorting).

    Args:
        scores: one 1-D tensor per channel group.
        remove_ratio: fraction of every group that goes, in [0, 1).

    Returns:
        One bool tensor per group, on the scores' device, True where the channel stays.

    Raises:
        ValueError: the ratio is out of range, or scores are not 1-D or not finite.
    """
    if not 0 <= remove_ratio < 1:
        raise ValueError(f"remove_ratio is {remove_ratio}; it must be at least 0 and below 1")
    return select_widths(scores, [kept_count(score.numel(), remove_ratio) for score in scores])


def select_widths(scores: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Choose as many channels of every group as a width says: the highest scores stay.

    Args:
        scores: one 1-D tensor per channel group.
        widths: channels that stay of each, from 0 to all.

    Returns:
        As `select_channels`, which tells what happens to equal scores.

    Raises:
        ValueError: scores are not 1-D or not finite.
    """
    _check(scores)
    keep = []
    for score, width in zip(scores, widths, strict=True):
        mask = torch.ones_like(score, dtype=torch.bool)
        mask[score.argsort(stable=True)[: score.numel() - width]] = False
        keep.append(mask)
    return keep


def _check(scores: Sequence[Tensor]) -> None:
    for group, score in enumerate(scores):
        if score.ndim != 1 or score.numel() == 0:
            raise ValueError(f"scores of group {group} have shape {tuple(score.shape)}, not (C,)")
        if not score.isfinite().all():
            raise ValueError(f"scores of group {group} are not all finite; nothing can be ranked")
