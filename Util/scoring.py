"""Channel scores: how much each channel of a generator matters, by one of several metrics.

A metric turns a generator into one 1-D tensor per channel group (`Generator.channels`); higher
means more important. `METRICS` lists them all. Choosing channels by the scores and building the
smaller generator is the work of `Util.pruning`.

All random numbers are drawn on the CPU from one seed, so that a seed means the same images on
every device. Latents, layer noise and pixel noise come from streams of their own: the images do not
depend on the batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from Model.generator import Generator
from Model.layers import StyledConv, ToRGB

Scores = list[Tensor]
Parser = Callable[[Tensor], Tensor]

LATENTS, LAYER_NOISE, PIXEL_NOISE, CHANCE = range(4)
PIXELS_AT_ONCE = 2**18  # four images of 256 px: about 2 GB for scoring the full-size generator


class EmptyContentError(ValueError):
    """The content masks of all images are empty: there is nothing to score channels by."""


@dataclass(frozen=True)
class Sampling:
    """What a metric may draw on besides the generator.

    Attributes:
        latents: z of all images, (n, style_dim), on the CPU.
        batch_size: images whose gradients are summed before their absolute value is taken.
        noise_prob: probability that a pixel inside the content mask is noised.
        seed: seed of the random streams.
        parser: images (N, 3, H, W) in [-1, 1] -> content mask (N, 1, H, W) of 0 and 1.
        progress: called with the number of images done since the last call.
    """

    latents: Tensor
    batch_size: int
    noise_prob: float
    seed: int
    parser: Parser | None
    progress: Callable[[int], None]

    def stream(self, purpose: int) -> torch.Generator:
        """Return the random stream for a purpose (LATENTS, ...), from its start."""
        return random_stream(self.seed, purpose)


def random_stream(seed: int, purpose: int) -> torch.Generator:
    """Make a CPU generator; different purposes of one seed are independent."""
    state = int(np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)


def readers(generator: Generator) -> list[StyledConv | ToRGB]:
    """The layer per channel group whose weights stand for the group.

    A group of channels enters the next styled convolution; the last one enters only the last ToRGB.
    The other ToRGBs also read channels, but do not take part in scores.
    """
    return [*generator.styled_convs, generator.to_rgbs[-1]]  # type: ignore[list-item]


def salt_and_pepper(
    images: Tensor, mask: Tensor, prob: float, generator: torch.Generator
) -> Tensor:
    """Turn random pixels inside a mask black or white (Liu et al., CVPR 2021, section 3.2).

    One draw for all pixels of all images decides both whether and how.

    Args:
        images: (N, 3, H, W).
        mask: (N, 1, H, W), 1 where pixels may change.
        prob: probability that such a pixel changes, all three channels together, to -1 or 1 with
            equal chance.
        generator: a CPU generator, whatever the images' device.

    Returns:
        (N, 3, H, W), without gradients.
    """
    images = images.detach()
    draw = torch.rand(len(images), 1, *images.shape[2:], generator=generator).to(images.device)
    inside = mask > 0.5
    noisy = images.masked_fill(inside & (draw < prob), 1.0)
    return noisy.masked_fill_(inside & (draw < prob / 2), -1.0)


def weight_gradients(generator: Generator, images: Tensor, noisy_images: Tensor) -> list[Tensor]:
    """Gradients of the L1 distance of noisy to clean images in the weights of the `readers`.

    Args:
        generator: the network that made the images.
        images: (N, 3, H, W), with the graph that leads back to the generator's weights.
        noisy_images: (N, 3, H, W).

    Returns:
        (1, O, I, k, k) per channel group: gradient of the distance, summed over everything.

    Raises:
        ValueError: the images have no graph or another shape than the noisy ones.
    """
    if not images.requires_grad:
        raise ValueError("images carry no gradient; generate them outside of torch.no_grad()")
    if images.shape != noisy_images.shape:
        raise ValueError(
            f"images are {tuple(images.shape)}, noisy_images {tuple(noisy_images.shape)}"
        )
    distance = (noisy_images.detach() - images).abs().sum()
    weights = [layer.conv.weight for layer in readers(generator)]
    return list(torch.autograd.grad(distance, weights))


def _mean_magnitude(gradients: Sequence[Tensor]) -> Scores:
    """Mean absolute gradient per input channel: (1, O, I, k, k) -> (I,)."""
    return [gradient.abs().mean(dim=(0, 1, 3, 4)) for gradient in gradients]


def weight_gradient_score(generator: Generator, images: Tensor, noisy_images: Tensor) -> Scores:
    """Content-aware score of one batch (Liu et al., CVPR 2021, section 3.2).

    The channel's mean absolute weight gradient: of the L1 distance between the noisy and the clean
    images, summed (not averaged) over the batch and all values, the gradient in the weights
    that read the channel; its absolute value, averaged over output channels and kernel positions.

    Args:
        generator: the network that made the images.
        images: (N, 3, H, W), with the graph that leads back to the generator's weights.
        noisy_images: (N, 3, H, W), the images with noise inside the content of interest.

    Returns:
        One 1-D tensor per channel group.

    Raises:
        ValueError: the images have no graph or another shape than the noisy ones.
    """
    return _mean_magnitude(weight_gradients(generator, images, noisy_images))


@contextmanager
def _only_reader_gradients(generator: Generator) -> Iterator[None]:
    """Let gradients flow to the `readers`' weights alone; restores every parameter's setting."""
    before = [(parameter, parameter.requires_grad) for parameter in generator.parameters()]
    generator.requires_grad_(False)
    for layer in readers(generator):
        layer.conv.weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _chunks(
    generator: Generator, sampling: Sampling
) -> Iterator[tuple[Tensor, list[Tensor], bool]]:
    """Inputs of the generator, few enough images at a time for the memory.

    Yields:
        z (n, style_dim), layer noise (n, 1, h, w) per layer, and whether a batch ends here.
    """
    stream = sampling.stream(LAYER_NOISE)
    device = generator.input.input.device
    sides = [noise.shape[-1] for noise in generator.fixed_noise]
    at_once = max(1, PIXELS_AT_ONCE // generator.size**2)
    for batch in sampling.latents.split(sampling.batch_size):
        parts = batch.split(at_once)
        for i, z in enumerate(parts):
            # One row per image holds its noise for all layers, so the batch size changes nothing.
            rows = torch.randn(len(z), sum(side**2 for side in sides), generator=stream).to(device)
            maps = rows.split([side**2 for side in sides], dim=1)
            noise = [m.view(-1, 1, s, s) for m, s in zip(maps, sides, strict=True)]
            yield z.to(device), noise, i == len(parts) - 1
            sampling.progress(len(z))


def content_aware(generator: Generator, sampling: Sampling) -> Scores:
    """`weight_gradient_score`, summed over the batches.

    Gradients of different images of a batch may cancel, so the batch size is part of the metric.

    Raises:
        ValueError: there is no parser, or chance left every content pixel as it was.
        EmptyContentError: no content in any image.
    """
    if sampling.parser is None:
        raise ValueError("the metric content_aware needs a parser for the content mask")
    stream = sampling.stream(PIXEL_NOISE)
    zeros = [torch.zeros_like(layer.conv.weight) for layer in readers(generator)]
    scores, gradients = _mean_magnitude(zeros), zeros
    inside = changed = 0.0
    with _only_reader_gradients(generator):
        for z, noise, batch_ends in _chunks(generator, sampling):
            images = generator([z], noise=noise)
            assert isinstance(images, Tensor)
            mask = sampling.parser(images.detach())
            noisy = salt_and_pepper(images, mask, sampling.noise_prob, stream)
            inside += float(mask.sum())
            changed += float((noisy != images).sum())
            found = weight_gradients(generator, images, noisy)
            gradients = [a + b for a, b in zip(gradients, found, strict=True)]
            if batch_ends:
                batch_scores = _mean_magnitude(gradients)
                scores = [a + b for a, b in zip(scores, batch_scores, strict=True)]
                gradients = zeros
    _check_content(len(sampling.latents), inside, changed)
    return scores


def _check_content(images: int, inside: float, changed: float) -> None:
    if not inside:
        raise EmptyContentError(
            f"the content masks of all {images} images are empty, so there is nothing to score by;"
            " does the parser fit these images?"
        )
    if not changed:
        raise ValueError(
            f"noise_prob is so low that none of the {inside:.0f} content pixels of {images} images"
            " was noised; raise noise_prob or n_sample"
        )


def _mean_filter_norms(generator: Generator, sampling: Sampling) -> list[Tensor]:
    """L1 norms of the filters after modulation and demodulation, averaged over the latents.

    The mean is that of the signed weights. A latent only scales a filter, so it is enough to
    average the scale: sum |mean(W * gain * style)| = sum |W| * |mean(gain * style)|.

    Returns:
        (O, I) per channel group, sums over the k * k kernel positions.
    """
    layers = readers(generator)
    factors: list[Tensor | float] = [0.0] * len(layers)
    for z in sampling.latents.split(sampling.batch_size):
        w = generator.mapping(z.to(generator.input.input.device))
        for i, layer in enumerate(layers):
            style, conv = layer.conv.style(w), layer.conv
            gain = conv.demodulation(style) if conv.demodulate else style.new_ones(len(z), 3)
            factors[i] = factors[i] + gain.T @ style / len(sampling.latents)
        sampling.progress(len(z))
    return [
        layer.conv.weight[0].abs().sum(dim=(2, 3)) * torch.as_tensor(factor).abs()
        for layer, factor in zip(layers, factors, strict=True)
    ]


@torch.no_grad()
def l1_out(generator: Generator, sampling: Sampling) -> Scores:
    """L1 norm of the mean modulated weights that read the channel."""
    return [norms.sum(dim=0) for norms in _mean_filter_norms(generator, sampling)]


@torch.no_grad()
def l1_in(generator: Generator, sampling: Sampling) -> Scores:
    """L1 norm of the mean modulated weights that make the channel.

    The constant input is made by no weights; its channels are scored by their own L1 norm.
    """
    makers = _mean_filter_norms(generator, sampling)[:-1]
    constant = generator.input.input.abs().sum(dim=(0, 2, 3))
    return [constant, *(norms.sum(dim=1) for norms in makers)]


@torch.no_grad()
def l1_style(generator: Generator, sampling: Sampling) -> Scores:
    """Absolute value of the channel's mean style (the modulation, without the weight scale)."""
    layers = readers(generator)
    sums = [torch.zeros_like(layer.conv.modulation.bias) for layer in layers]
    for z in sampling.latents.split(sampling.batch_size):
        w = generator.mapping(z.to(sums[0].device))
        for total, layer in zip(sums, layers, strict=True):
            total += layer.conv.modulation(w).sum(dim=0)
        sampling.progress(len(z))
    return [total.abs() / len(sampling.latents) for total in sums]


def _activations(generator: Generator, sampling: Sampling) -> Iterator[list[Tensor]]:
    """The activations (n, C, h, w) of every channel group, few images at a time."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        for layer in readers(generator)
    ]
    try:
        for z, noise, _ in _chunks(generator, sampling):
            found.clear()
            with torch.no_grad():
                generator([z], noise=noise)
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def l1_map(generator: Generator, sampling: Sampling) -> Scores:
    """Mean absolute activation over images and pixels."""
    sums = [torch.zeros_like(layer.conv.modulation.bias) for layer in readers(generator)]
    for activations in _activations(generator, sampling):
        for total, x in zip(sums, activations, strict=True):
            total += x.abs().mean(dim=(2, 3)).sum(dim=0)
    return [total / len(sampling.latents) for total in sums]


class _Spread:
    """Variation of activations over images, from one pass over them.

    Sums are taken of the differences to the first image, which keeps them small, and exactly zero
    where nothing varies (the constant input).
    """

    def __init__(self, first: Tensor) -> None:
        self.origin = first[:1].clone()
        self.count = 0
        self.differences = torch.zeros_like(self.origin[0])
        self.squares = torch.zeros_like(self.origin[0])
        self.l1 = self.origin.new_zeros(self.origin.shape[1])
        self.power = torch.zeros_like(self.l1)

    def add(self, x: Tensor) -> None:
        """Take in activations (n, C, h, w)."""
        difference = x - self.origin
        self.count += len(x)
        self.differences += difference.sum(dim=0)
        self.squares += difference.square_().sum(dim=0)
        self.l1 += x.abs().sum(dim=(0, 2, 3))
        self.power += x.square().sum(dim=(0, 2, 3))

    def asv(self) -> Tensor:
        """Standard deviation over the images, averaged over the pixels, (C,)."""
        mean = self.differences / self.count
        variance = self.squares / self.count - mean.square()
        return variance.clamp(min=0).sqrt().mean(dim=(1, 2))

    def l1_norm_asv(self) -> Tensor:
        """`asv` divided by the mean absolute activation; 0 for a map that is zero."""
        values = self.count * self.squares[0].numel()
        return (self.asv() / (self.l1 / values)).nan_to_num(0.0)

    def l2_norm_asv(self) -> Tensor:
        """`asv` divided by the L2 norm over all images and pixels; 0 for a map that is zero."""
        return (self.asv() / self.power.sqrt()).nan_to_num(0.0)


def _spreads(generator: Generator, sampling: Sampling) -> list[_Spread]:
    spreads: list[_Spread] = []
    for activations in _activations(generator, sampling):
        if not spreads:
            spreads = [_Spread(x) for x in activations]
        for spread, x in zip(spreads, activations, strict=True):
            spread.add(x)
    return spreads


def asv(generator: Generator, sampling: Sampling) -> Scores:
    """Standard deviation of the activation over the images, averaged over the pixels."""
    return [spread.asv() for spread in _spreads(generator, sampling)]


def l1_norm_asv(generator: Generator, sampling: Sampling) -> Scores:
    """`asv` relative to the mean absolute activation."""
    return [spread.l1_norm_asv() for spread in _spreads(generator, sampling)]


def l2_norm_asv(generator: Generator, sampling: Sampling) -> Scores:
    """`asv` relative to the L2 norm of the activation.

    The norm is a sum over images and pixels; as all channels of a group share their number, it
    ranks as a mean would.
    """
    return [spread.l2_norm_asv() for spread in _spreads(generator, sampling)]


def chance(generator: Generator, sampling: Sampling) -> Scores:
    """Random numbers: the baseline that any other metric should beat."""
    stream = sampling.stream(CHANCE)
    sampling.progress(len(sampling.latents))
    return [torch.rand(width, generator=stream) for width in generator.channels]


@dataclass(frozen=True)
class Metric:
    """A way to score channels.

    Attributes:
        function: computes the scores.
        description: one line for the command line's help.
        needs_parser: the content mask takes part.
    """

    function: Callable[[Generator, Sampling], Scores]
    description: str
    needs_parser: bool = False


METRICS = {
    "content_aware": Metric(
        content_aware, "weight gradient of a distance inside the content mask", needs_parser=True
    ),
    "l1_out": Metric(l1_out, "L1 norm of the mean modulated weights that read the channel"),
    "l1_in": Metric(l1_in, "L1 norm of the mean modulated weights that make the channel"),
    "l1_style": Metric(l1_style, "absolute value of the channel's mean style"),
    "asv": Metric(asv, "standard deviation of the activation over images, mean over pixels"),
    "l1_norm_asv": Metric(l1_norm_asv, "asv divided by the mean absolute activation"),
    "l2_norm_asv": Metric(l2_norm_asv, "asv divided by the L2 norm of the activation"),
    "l1_map": Metric(l1_map, "mean absolute activation"),
    "random": Metric(chance, "random numbers, the baseline"),
}


def channel_scores(
    generator: Generator,
    metric: str = "content_aware",
    *,
    parser: Parser | None = None,
    n_sample: int = 400,
    batch_size: int = 10,
    noise_prob: float = 0.05,
    seed: int = 0,
    latents: Tensor | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Score every channel of a generator.

    Exactly ``n_sample`` images (or latents) take part; the last batch may be smaller. The generator
    comes back as it was, gradients included. Only `content_aware` depends on ``batch_size``.

    Args:
        generator: the full network; scored on its device.
        metric: a key of `METRICS`.
        parser: images (N, 3, H, W) in [-1, 1] -> content mask (N, 1, H, W), such as a
            `Util.content.ContentParser`; needed by `content_aware` alone.
        n_sample: images, >= 1.
        batch_size: images per batch, >= 1. How many are in memory at a time follows from their
            size and not from this.
        noise_prob: probability that a content pixel is noised, in (0, 1].
        seed: seed of latents, layer noise and pixel noise, >= 0.
        latents: z to use instead of ``n_sample`` drawn ones, (n, style_dim).
        progress: called with the number of images done since the last call.

    Returns:
        One 1-D CPU tensor per channel group, higher is more important.

    Raises:
        ValueError: unknown metric, a number out of range, or no parser for `content_aware`.
        EmptyContentError: no content in any image.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    for name, value, low in (
        ("n_sample", n_sample, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < low:
            raise ValueError(f"{name} is {value}; it must be at least {low}")
    if not 0 < noise_prob <= 1:
        raise ValueError(f"noise_prob is {noise_prob}; it must be above 0 and at most 1")
    if latents is None:
        stream = random_stream(seed, LATENTS)
        latents = torch.randn(n_sample, generator.style_dim, generator=stream)
    sampling = Sampling(latents.cpu(), batch_size, noise_prob, seed, parser, progress)
    return [score.detach().cpu() for score in METRICS[metric].function(generator, sampling)]
