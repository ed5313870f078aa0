"""Walks along directions of w, as rows of pictures, and how far they lead."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from Evaluation.directions import modulation_directions, principal_components, walk
from Evaluation.distances import Distance
from Evaluation.sampling import Latents
from Model.generator import Generator

KINDS = ("principal", "modulation")


@dataclass(frozen=True)
class Walk:
    """A direction to walk along.

    Attributes:
        name: for captions.
        direction: (style_dim,), of unit length.
        deviation: standard deviation of w along it.
        layers: the rows of w+ that move.
    """

    name: str
    direction: Tensor
    deviation: float
    layers: Sequence[int]

    def to(self, latents: Latents, strength: float) -> Latents:
        """Move latents by ``strength`` standard deviations."""
        distance = strength * self.deviation
        return Latents(walk(latents.w_plus, self.direction, distance, self.layers), latents.noise)


def find_walks(
    generator: Generator, kind: str, numbers: Sequence[int], layers: Sequence[int], seed: int
) -> list[Walk]:
    """Find directions of a generator by their numbers.

    Args:
        generator: any.
        kind: principal (components of w) or modulation (eigenvectors of the modulations).
        numbers: from 0 on, by falling variance or block by block.
        layers: the rows of w+ that move.
        seed: of the w that deviations and components are of.

    Raises:
        ValueError: there is no direction of such a number.
    """
    components = principal_components(generator, seed)
    found = components.components
    if kind == "modulation":
        found = modulation_directions(generator)
    if not numbers or not 0 <= min(numbers) <= max(numbers) < len(found):
        text = ",".join(map(str, numbers))
        raise ValueError(f"{text}: {kind} directions have the numbers 0 to {len(found) - 1}")
    walks = []
    for i in numbers:
        # Of w = mean + sum_k x_k v_k with independent x_k, along a unit vector d.
        along = (components.components @ found[i]) * components.deviations
        share = along.square().sum() / components.deviations.square().sum()
        title = "component" if kind == "principal" else "eigenvector"
        name = f"{title} {i}\n{100 * share.item():.1f} % of var(w)"
        walks.append(Walk(name, found[i], along.norm().item(), layers))
    return walks


def walking_distances(
    unedited: Tensor, frames: Sequence[Tensor], distance: Distance
) -> dict[str, float]:
    """Measure how far a walk leads.

    Args:
        unedited: (N, 3, H, W) pictures, already multiplied by their content masks.
        frames: at least 2 times the same, edited, in the order of the walk.
        distance: perceptual.

    Returns:
        Means over the N: to_ends, from the unedited pictures to both ends; step, of consecutive
        frames; largest_step. What rests on a distance that is not a number is left out.
    """
    steps = torch.stack([distance(a, b) for a, b in itertools.pairwise(frames)])
    ends = [distance(unedited, end) for end in (frames[0], frames[-1])]
    return {
        "to_ends": torch.stack(ends).nanmean().item(),
        "step": steps.nanmean().item(),
        "largest_step": steps.amax(dim=0).nanmean().item(),
    }
