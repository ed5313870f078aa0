"""StyleKD's relation loss: how the pictures of a batch relate to moved ones.

    C[i, j] = cos( f(w_i), f(w_j + o_j) )                          (N, N) per layer
    loss    = sum over layers of  1/N sum over i of  KL( softmax C_T[i] || softmax C_S[i] )

of N pictures, those of a batch or of each of its groups, whose losses are averaged (Xu et al.,
"Mind the Gap in Distilling StyleGANs", ECCV 2022). f are the activations after the second
convolution of the 16, 32, 64 and 128 px blocks; o = 5 n v with n normal and v one of the teacher's
`modulation_directions`, the same for student and teacher, each of which adds it to its own w. The
offsets serve this term alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from Compression.distillation.terms import Call, Pass, Sources
from Evaluation.directions import modulation_directions
from Model.generator import Generator
from Util import distributed
from Util.settings import SettingError, Settings, setting

SIDES = (16, 32, 64, 128)
"""Resolutions whose activations are compared."""

Offsets = Callable[[int], Tensor]
"""Number of latents -> what is added to each, (N, 1, style_dim)."""


@dataclass(frozen=True, kw_only=True)
class RelationSettings(Settings):
    """Settings of the term relation; the defaults are those of StyleKD's figures."""

    relation_step: float = setting(
        5.0, "relation: standard deviation of an offset's length", above=0
    )
    # The published command's is the divergence, the published code's default the squared error.
    relation_loss: str = setting(
        "kl", "relation: divergence of the rows, or squared error", choices=("kl", "mse")
    )
    # The size of a row decides how much of the loss is a picture's own moved neighbour.
    relation_group: int = setting(
        0, "relation: relate so many pictures of a batch to each other; 0: all", low=0
    )
    relation_gather: bool = setting(
        False,
        "relation: relate the pictures of all processes; as published, each relates its own",
    )


def layers_of(generator: Generator) -> list[int]:
    """List the styled convolutions whose activations are compared, those that exist."""
    layers = (2 * (side.bit_length() - 3) for side in SIDES)
    return [layer for layer in layers if layer < len(generator.styled_convs)]


Compare = Callable[[Tensor, Tensor], Tensor]


def similarities(features: Tensor, moved: Tensor, everywhere: bool = False) -> Tensor:
    """Compute the cosines of all pairs.

    Args:
        features: (N, C, h, w) of the latents.
        moved: the same of the moved latents.
        everywhere: take the moved ones of all processes.

    Returns:
        (N, N), or (N, N * processes), in float32 or better.
    """
    a, b = (F.normalize(x.flatten(1).to(_wide(x)), dim=1) for x in (features, moved))
    return a @ (distributed.gather_rows(b) if everywhere else b).T


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Average KL(softmax teacher || softmax student) over the rows of (N, M) similarities."""
    return F.kl_div(
        student.log_softmax(dim=1),
        teacher.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )


LOSSES: dict[str, Compare] = {"kl": divergence, "mse": F.mse_loss}


def grouped(compare: Compare, student: Tensor, teacher: Tensor, size: int) -> Tensor:
    """Average a loss of (N, M) similarities over groups of pictures that know each other alone.

    Args:
        compare: loss of a group's similarities, a mean over its rows.
        student: similarities of all pictures.
        teacher: the same.
        size: pictures of a group, the last of which may have fewer; 0: all are one.
    """
    if not 0 < size < len(student):
        return compare(student, teacher)
    starts = range(0, len(student), size)
    groups = [[c[i : i + size, i : i + size] for c in (student, teacher)] for i in starts]
    parts = [compare(*group) * (len(group[0]) / len(student)) for group in groups]
    return torch.stack(parts).sum()


def make(sources: Sources) -> Call:
    """Make the term, with the teacher's directions.

    Raises:
        SettingError: the networks have no block that is compared, or a batch nothing to compare.
    """
    options, config = sources.options, sources.config
    assert isinstance(options, RelationSettings)
    if options.relation_gather and options.relation_group:
        raise SettingError(
            "relation_gather",
            f"relates all pictures, and relation_group {options.relation_group} fewer; make it 0",
        )
    if options.relation_group == 1:
        raise SettingError(
            "relation_group", "1: a picture alone relates to nothing; take 2 or more"
        )
    together = 1 if options.relation_gather else distributed.world_size()
    if options.relation_loss == "kl" and config.batch_size // together < 2:
        raise SettingError(
            "batch_size",
            f"{config.batch_size}: relation compares the pictures of a process with each other, and"
            " one alone tells nothing; take two a process or more",
        )
    layers = layers_of(sources.teacher)
    if not layers:
        raise SettingError(
            "kd",
            f"relation compares blocks from {SIDES[0]} px on; {sources.teacher.size} px has none",
        )
    directions = modulation_directions(sources.teacher)
    return term(layers, offsets(directions, options.relation_step), options)


def offsets(directions: Tensor, step: float) -> Offsets:
    """Make a function that draws offsets: a direction each, times a normal number and a step."""

    def draw(n: int) -> Tensor:
        chosen = torch.randint(len(directions), (n,), device=directions.device)
        length = step * torch.randn(n, 1, device=directions.device)
        return (length * directions[chosen])[:, None]

    return draw


def term(layers: Sequence[int], draw: Offsets, options: RelationSettings) -> Call:
    """Make the term of given layers and offsets.

    Args:
        layers: styled convolutions whose activations are compared.
        draw: makes the offsets.
        options: of the term.
    """
    compare, everywhere = LOSSES[options.relation_loss], options.relation_gather
    size = options.relation_group

    def relation(student: Pass, teacher: Pass, mask: Tensor | None) -> Tensor:
        offset = draw(len(student.w_plus))
        shared = student.noise is not None and student.noise is teacher.noise
        noise = student.generator.make_noise(len(student.w_plus)) if shared else None
        found = []
        for one in (student, teacher):
            moved = one.again(offset, features=True, noise=noise).features
            found.append([similarities(one.made.features[i], moved[i], everywhere) for i in layers])
        losses = [grouped(compare, s, t.detach(), size) for s, t in zip(*found, strict=True)]
        return torch.stack(losses).sum()

    return relation
