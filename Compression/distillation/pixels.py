"""L1 distance of the student's pictures to the teacher's (Liu et al., CVPR 2021, eq. 4 and 5).

    output only:       mean | m * (S - T) |
    every resolution:  sum over r of  mean | m_r * (S_r - T_r) |

with the running RGB sums S_r, T_r, and the content mask m averaged down to m_r.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from Compression.distillation.terms import Call, Pass, Sources


def masked_l1(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Sum over resolutions of the mean absolute difference, masked values included in the mean.

    Args:
        student: (N, 3, r, r) pictures of each resolution.
        teacher: the same of the teacher; no gradient flows into it.
        mask: (N, 1, H, W) in [0, 1], applied to both sides; None keeps all.
    """
    means = []
    for s, t in zip(student, teacher, strict=True):
        difference = (s - (t.detach() if t.requires_grad else t)).abs()
        means.append((difference if mask is None else difference * _at_size(mask, s)).mean())
    return sum(means[1:], means[0])


def _at_size(mask: Tensor, images: Tensor) -> Tensor:
    """Average a mask down to the images' resolution."""
    if mask.shape[2:] == images.shape[2:]:
        return mask
    return F.adaptive_avg_pool2d(mask, (images.shape[2], images.shape[3]))


def make(sources: Sources) -> Call:
    """The term, of the resolutions that the setting kd_mode names."""
    return term(every_resolution=sources.config.kd_mode == "Intermediate")


def term(every_resolution: bool = False) -> Call:
    """The term, of the output only or of every resolution's running RGB sum."""
    first = 0 if every_resolution else -1

    def l1(student: Pass, teacher: Pass, mask: Tensor | None) -> Tensor:
        return masked_l1(student.made.rgbs[first:], teacher.made.rgbs[first:], mask)

    return l1
