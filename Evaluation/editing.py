"""Edit latents (walks, style mixing, morphing) and measure how much of a face survives it."""

import itertools
import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from Evaluation.distances import Distance
from Evaluation.sampling import Latents

STYLE_LAYERS = {"coarse": range(0, 4), "middle": range(4, 8), "fine": range(8, 18)}
"""Layers of w+ by what they govern: pose and shape, features, colours (StyleGAN, section 3.1), by
its numbers; StyleGAN2's 4 px block has one layer less, so that layer 3 is of 16 px."""


def circle(a: Tensor, b: Tensor, turn: float) -> Tensor:
    """Walk from z ``a`` in a loop through ``b``, ``-a`` and ``-b``.

    The same distance at every step, without a kink, and where a and b are standard normal so is
    every point between: the walk never leaves what the generator was trained on.

    Args:
        a: (N, style_dim).
        b: (N, style_dim), independent of a.
        turn: how far, in turns; 1 is back at a.
    """
    angle = 2 * math.pi * turn
    return math.cos(angle) * a + math.sin(angle) * b


def spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate along the arc between vectors (slerp; Shoemake, 1985).

    Args:
        a: (N or 1, ...), every further dimension part of the vector.
        b: likewise.
        t: in [0, 1]; 0 is a, 1 is b.
    """
    x, y = a.flatten(1), b.flatten(1)
    angle = F.cosine_similarity(x, y).clamp(-1, 1).acos()[:, None]
    sine = angle.sin()
    arc = ((1 - t) * angle).sin() / sine * x + (t * angle).sin() / sine * y
    # Between parallel vectors there is no arc, between opposite ones no single one.
    return torch.where(sine > 1e-4, arc, torch.lerp(x, y, t)).view(
        torch.broadcast_shapes(a.shape, b.shape)
    )


def morph(a: Latents, b: Latents, t: float) -> Latents:
    """Go from ``a`` to ``b``, linearly in w+.

    The layer noise goes along the arc, which keeps its strength; equal maps stay as they are.

    Args:
        a: N pictures.
        b: N pictures.
        t: in [0, 1]; 0 is a, 1 is b.
    """
    noise = [spherical(x, y, t) for x, y in zip(a.noise, b.noise, strict=True)]
    return Latents(torch.lerp(a.w_plus, b.w_plus, t), noise)


def style_layers(text: str, n_latent: int) -> range:
    """Find the layers of w+ of a text: coarse, middle, fine, all, ``3``, or ``0-3`` with both ends.

    Raises:
        ValueError: it names none of the ``n_latent`` layers, or one that does not exist.
    """
    layers = range(n_latent if text == "all" else 0)
    if text in STYLE_LAYERS:
        named = STYLE_LAYERS[text]
        layers = range(named.start, min(named.stop, n_latent))
    elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        first, last = match.groups()
        layers = range(int(first), int(last or first) + 1)
    if not layers or layers.stop > n_latent:
        raise ValueError(
            f"{text}: expected coarse, middle, fine, all or a range such as 0-3 within this model's"
            f" layers 0-{n_latent - 1}"
        )
    return layers


def mix(a: Latents, b: Latents, layers: Sequence[int], noise: bool = False) -> Latents:
    """Mix every a with every b: a's styles and noise, with b's styles in some layers.

    Args:
        a: A pictures.
        b: B pictures.
        layers: those of w+ that come from b.
        noise: the layer noise of these layers comes from b too, not from a.

    Returns:
        A * B pictures, all of the first a first.
    """
    mixed = a[[i for i in range(len(a)) for _ in range(len(b))]]
    from_b = b[[i for _ in range(len(a)) for i in range(len(b))]]
    mixed.w_plus[:, list(layers)] = from_b.w_plus[:, list(layers)]
    # The last w+ belongs to a ToRGB, which has no noise.
    maps = list(enumerate(zip(mixed.noise, from_b.noise, strict=True)))
    return Latents(mixed.w_plus, [y if noise and i in layers else x for i, (x, y) in maps])


def mixing_distances(a: Tensor, b: Tensor, mixed: Tensor, distance: Distance) -> dict[str, float]:
    """Measure how much of both faces a style mix keeps.

    Args:
        a: (A, 3, H, W) unedited pictures, already multiplied by their content masks.
        b: (B, 3, H, W), likewise.
        mixed: (A * B, 3, H, W), likewise, in the order of `mix`.
        distance: perceptual.

    Returns:
        Means over the grid, without pairs whose distance is not a number: a_to_mixed (small:
        identity survives), b_to_mixed, and a_to_b, what different faces are apart.
    """
    pairs_a, pairs_b = a.repeat_interleave(len(b), dim=0), b.repeat(len(a), 1, 1, 1)
    return {
        "a_to_mixed": distance(pairs_a, mixed).nanmean().item(),
        "b_to_mixed": distance(pairs_b, mixed).nanmean().item(),
        "a_to_b": distance(pairs_a, pairs_b).nanmean().item(),
    }


def morphing_distances(frames: Sequence[Tensor], distance: Distance) -> dict[str, float]:
    """Measure how much of its ends a morph keeps, and how even its steps are.

    Args:
        frames: at least 3 times (N, 3, H, W), from the first end to the second, already multiplied
            by their content masks.
        distance: perceptual.

    Returns:
        nearer_end: distance of a frame between the ends to the end that it is closer to, mean
        (small: faces in between are still one of the two); step: of consecutive frames, mean;
        largest_step: mean over the N of their largest; a_to_b: of the ends. What rests on a
        distance that is not a number is left out.
    """
    first, *between, last = frames
    nearer = [torch.minimum(distance(first, x), distance(x, last)) for x in between]
    steps = torch.stack([distance(x, y) for x, y in itertools.pairwise(frames)])
    return {
        "nearer_end": torch.stack(nearer).nanmean().item(),
        "step": steps.nanmean().item(),
        "largest_step": steps.amax(dim=0).nanmean().item(),
        "a_to_b": distance(first, last).nanmean().item(),
    }
