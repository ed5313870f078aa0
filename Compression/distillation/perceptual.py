"""Perceptual distance of the student's pictures to the teacher's (Liu et al., CVPR 2021, eq. 4).

    mean over the batch of  d(m * S, m * T)

with the content mask m and d LPIPS or its like on a face parser's features, at no more than 256 px.
"""

from torch import Tensor

from Compression.distillation.terms import Call, Pass, Sources
from Evaluation.distances import Distance, at_most, load_distance
from Model.precision import HALVES
from train_hyperparams import TrainConfig


def masked_distance(
    student: Tensor, teacher: Tensor, mask: Tensor | None, distance: Distance
) -> Tensor:
    """Mean distance of image pairs, both sides masked.

    Args:
        student: (N, 3, H, W) in [-1, 1].
        teacher: the same of the teacher; no gradient flows into it.
        mask: (N, 1, H, W) in [0, 1]; None keeps all.
        distance: of image pairs.
    """
    pair = [student, teacher.detach() if teacher.requires_grad else teacher]
    if mask is not None:
        pair = [image * mask for image in pair]
    return distance(*(at_most(image, 256) for image in pair)).mean()


def label(config: TrainConfig) -> str:
    """What the log calls it: by what is compared."""
    return "parser" if config.perceptual == "parser" else "lpips"


def make(sources: Sources) -> Call:
    """The term, by the network that the setting perceptual names."""
    config = sources.config
    distance = load_distance(
        config.perceptual,
        config.perceptual_ckpt or None,
        sources.parser,
        sources.device,
        HALVES.get(config.amp),
        config.compile_mode,
    )
    return term(distance)


def term(distance: Distance) -> Call:
    """The term, of a distance of image pairs."""

    def perceptual(student: Pass, teacher: Pass, mask: Tensor | None) -> Tensor:
        return masked_distance(student.made.image, teacher.made.image, mask, distance)

    return perceptual
