"""Reconstruction: the kept filters are fitted to what the full generator computes.

Layer by layer from the constant input on, a styled convolution is fitted to the full generator's
activations of the kept channels, given the pruned generator's own inputs, and a ToRGB to the full
generator's running RGB sum. Errors count by the content mask. `Compression.initialisation.refit`
has the equations of a layer. Both generators see the same latents and layer noise.

Where there are many positions, those fitted to are drawn by their weight, so that the memory and
the time of a layer's fit do not depend on its resolution. Large maps are not kept for all images
but computed again when a layer needs them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from Compression.initialisation.refit import (
    LayerFit,
    filters,
    fit_to_rgb,
    neighbourhoods,
    pre_activation,
    store,
)
from Compression.scores.positions import Positions, content_weight, draw_positions
from Compression.scores.sampling import (
    INITIALISATION,
    Sampling,
    layer_noise,
)
from Model.generator import Generator
from Util import memory
from Util.progress import Progress, track
from Util.settings import Settings, setting

LARGEST_KEPT = 128
"""Side in px of the largest maps that are kept for all images."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings(Settings):
    """Settings of the reconstruction."""

    init_n_sample: int = setting(256, "images to reconstruct, at least 1", low=1, metavar="N")
    init_positions: int = setting(
        512, "positions of an image that every layer is fitted to, at least 16", low=16, metavar="N"
    )
    init_outside: float = setting(
        0.1,
        "weight of pixels outside the content, in (0, 1]; 1 takes no parser",
        above=0,
        high=1,
        metavar="W",
    )
    init_ridge: float = setting(
        1e-3, "ridge in units of the mean squared input, at least 0", low=0, metavar="R"
    )
    init_steps: int = setting(
        8,
        "conjugate gradient steps of a layer after its closed form, at least 0",
        low=0,
        metavar="N",
    )


@dataclass
class _Chunk:
    """Some of the images: what the full generator made of them, and how far the pruned one is.

    Attributes:
        w: (n, style_dim).
        noise: (n, 1, h, w) per styled convolution.
        at: positions of every resolution by the side.
        targets: the full generator's pre-activations (n, P, O) of every styled convolution.
        target_rgbs: its RGB sum (n, P, 3) of every resolution.
        x: the pruned generator's activations (n, C, h, w) after ``done`` convolutions.
        rgb: its RGB sum there, before they join it.
        done: the convolutions whose results are kept.
    """

    w: Tensor
    noise: list[Tensor]
    at: dict[int, Positions]
    targets: list[Tensor]
    target_rgbs: list[Tensor]
    x: Tensor
    rgb: Tensor | None = None
    done: int = 0

    def after(self, pruned: Generator, layers: int) -> tuple[Tensor, Tensor | None]:
        """Return activations after ``layers`` convolutions, and the RGB sum before they join it."""
        x, rgb = self.x, self.rgb
        for i in range(self.done, layers):
            if i % 2:  # a resolution ends here
                rgb = pruned.rgb_layers[i // 2](x, self.w, rgb)
            x = pruned.styled_convs[i](x, self.w, self.noise[i])
        return x, rgb

    def keep(self, pruned: Generator, layers: int) -> None:
        """Keep what ``layers`` convolutions have made, unless it is large."""
        if self.noise[layers - 1].shape[-1] <= LARGEST_KEPT:
            self.x, self.rgb = self.after(pruned, layers)
            self.done = layers


def _chunks(
    full: Generator, pruned: Generator, keep: Sequence[Tensor], sampling: Sampling
) -> Iterator[_Chunk]:
    """Run the full generator on all images, few at a time."""
    options, stream = sampling.options, sampling.stream(INITIALISATION)
    sides = [noise.shape[-1] for noise in full.fixed_noise]
    z = torch.randn(options.init_n_sample, full.style_dim, generator=stream)
    for part in z.split(memory.at_once(full.size, memory.SCORING)):
        w = full.mapping(part.to(full.input.input))
        noise = [noise.to(w) for noise in layer_noise(full, len(w), stream)]
        made = full.synthesis(w[:, None].expand(-1, full.n_latent, -1), noise, features=True)
        weight = content_weight(made.image, sampling.parser, options.init_outside)
        at = {
            side: draw_positions(weight, side, options.init_positions, stream)
            for side in sorted(set(sides))
        }
        targets = [
            pre_activation(at[side].take(x[:, mask.to(x.device)]))
            for x, mask, side in zip(made.features, keep[1:], sides, strict=True)
        ]
        target_rgbs = [at[rgb.shape[-1]].take(rgb) for rgb in made.rgbs]
        yield _Chunk(w, noise, at, targets, target_rgbs, pruned.input(len(w)))


@torch.no_grad()
def reconstruction(
    pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling
) -> list[str]:
    """Fit the pruned generator to the full one.

    If its pictures are not nearer than with the kept weights, it keeps those.

    Returns:
        The share of variance explained (R^2) by layer, as lines.
    """
    bar = Progress(sampling.options.init_n_sample, "reconstruction: images", "img")
    chunks = []
    with bar:
        for chunk in _chunks(full, pruned, keep, sampling):
            chunks.append(chunk)
            bar.update(len(chunk.w))
    kept = {name: value.clone() for name, value in pruned.state_dict().items()}
    before = _pictures_r2(pruned, chunks)
    lines = [f"{'layer':<10} {'px':>5} {'R^2 before':>11} {'R^2 after':>10}"]
    convs = pruned.styled_convs
    for i in track(range(len(convs)), len(convs), "reconstruction: layers", "layer"):
        name = f"convs.{i - 1}" if i else "conv1"
        lines.append(_line(name, chunks, i, *_fit_styled(pruned, chunks, i, sampling.options)))
        for chunk in chunks:
            chunk.keep(pruned, i + 1)
        if i % 2 == 0:
            name = f"to_rgbs.{i // 2 - 1}" if i else "to_rgb1"
            lines.append(
                _line(name, chunks, i, *_fit_rgb(full, pruned, chunks, i, sampling.options))
            )
    after = _pictures_r2(pruned, chunks)
    lines.append(f"{'pictures':<10} {pruned.size:>5} {before:>11.3f} {after:>10.3f}")
    if not after > before:
        pruned.load_state_dict(kept)
        lines.append("the pictures did not come nearer: the kept weights stay")
    return lines


def _line(name: str, chunks: Sequence[_Chunk], i: int, before: float, after: float) -> str:
    return f"{name:<10} {chunks[0].noise[i].shape[-1]:>5} {before:>11.3f} {after:>10.3f}"


def _fit_styled(
    pruned: Generator, chunks: Sequence[_Chunk], i: int, options: ReconstructionSettings
) -> tuple[float, float]:
    """Fit a styled convolution; returns R^2 of its activations before and after."""
    layer = pruned.styled_convs[i]
    side, conv = chunks[0].noise[i].shape[-1], layer.conv
    styles = [conv.style(chunk.w) for chunk in chunks]
    power = torch.cat(styles).square()
    scale = power.mean(dim=0).sqrt().clamp(min=1e-12)
    count = sum(chunk.at[side].index.numel() for chunk in chunks)
    taps = conv.weight[0, 0, 0].numel()
    rows, done = scale.new_empty(count, taps * len(scale)), 0
    for chunk, style in zip(chunks, styles, strict=True):
        x, _ = chunk.after(pruned, i)
        part = neighbourhoods(conv, x, style / scale, chunk.at[side])
        rows[done : done + len(part)] = part
        done += len(part)
    fit = LayerFit(
        rows,
        torch.cat([chunk.targets[i] for chunk in chunks]),
        torch.cat([chunk.at[side].take(chunk.noise[i]) for chunk in chunks]) * layer.noise.weight,
        torch.cat([chunk.at[side].weight for chunk in chunks]),
        power / scale.square(),
        filters(conv) * scale.repeat(taps),
        layer.activate.bias,
        options.init_ridge,
    )
    before = fit.r2
    fit.solve()
    fit.refine(options.init_steps)
    store(layer, fit, scale)
    return before, fit.r2


def _fit_rgb(
    full: Generator,
    pruned: Generator,
    chunks: Sequence[_Chunk],
    i: int,
    options: ReconstructionSettings,
) -> tuple[float, float]:
    """Fit the ToRGB that follows a convolution; returns R^2 of the RGB sum before and after."""
    layer, whole = pruned.rgb_layers[i // 2], full.rgb_layers[i // 2]
    inputs, sums = [], []
    for chunk in chunks:
        at = chunk.at[chunk.noise[i].shape[-1]]
        x, rgb = chunk.after(pruned, i + 1)
        inputs.append(at.take(x) * layer.conv.style(chunk.w)[:, None])
        below = inputs[-1].new_zeros(()) if rgb is None else at.take(layer.upsample(rgb))
        sums.append(below.expand(*inputs[-1].shape[:2], 3))
    rows, below = torch.cat(inputs), torch.cat(sums)
    target = torch.cat([chunk.target_rgbs[i // 2] for chunk in chunks])
    weight = torch.cat([chunk.at[chunk.noise[i].shape[-1]].weight for chunk in chunks])

    def r2() -> float:
        made = F.linear(rows, layer.conv.weight.view(3, -1), layer.bias.flatten())
        return _r2(made + below, target, weight)

    before = r2()
    fit_to_rgb(
        layer,
        # Surgery has raised the gain of what it kept; the full generator's is the start.
        layer.conv.weight[0, :, :, 0, 0] * (whole.conv.scale / layer.conv.scale),
        rows.flatten(0, 1),
        (target - below).flatten(0, 1),
        weight.flatten(),
        options.init_ridge,
    )
    return before, r2()


def _r2(made: Tensor, target: Tensor, weight: Tensor) -> float:
    """Share of the variance of a target (n, P, 3) that is explained, with weights (n, P)."""
    m = (weight / weight.sum())[..., None]
    variance = ((target - (target * m).sum(dim=(0, 1))).square() * m).sum()
    return 1 - (((made - target).square() * m).sum() / variance.clamp(min=1e-30)).item()


def _pictures_r2(generator: Generator, chunks: Sequence[_Chunk]) -> float:
    """R^2 of the pictures at their positions."""
    at = [chunk.at[generator.size] for chunk in chunks]
    made = (
        generator.synthesis(chunk.w[:, None].expand(-1, generator.n_latent, -1), chunk.noise).image
        for chunk in chunks
    )
    pictures = torch.cat([a.take(image) for a, image in zip(at, made, strict=True)])
    target = torch.cat([chunk.target_rgbs[-1] for chunk in chunks])
    return _r2(pictures, target, torch.cat([a.weight for a in at]))
