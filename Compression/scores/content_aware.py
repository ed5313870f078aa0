"""The paper's score: gradients of a distance inside the content of interest (section 3.2).

score_c = sum over batches of  mean over (o, k, k) of | d L / d W[o, c, k, k] |,
L       = || G(z) - (G(z) with salt and pepper on 5 % of the content's pixels) ||_1
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from Compression.scores.sampling import PIXEL_NOISE, Sampling, Scores, chunks, readers
from Evaluation.features import masks_of
from Model.generator import Generator


class EmptyContentError(ValueError):
    """The content masks of all images are empty: there is nothing to score channels by."""


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


def mean_magnitude(gradients: Sequence[Tensor]) -> Scores:
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
    return mean_magnitude(weight_gradients(generator, images, noisy_images))


@contextmanager
def only_reader_gradients(generator: Generator) -> Iterator[None]:
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


def content_gradients(generator: Generator, sampling: Sampling) -> Iterator[list[Tensor]]:
    """`weight_gradients` of the batches of a sampling, with noise on the content.

    Yields:
        (1, O, I, k, k) per channel group: the gradients summed over a batch.

    Raises:
        ValueError: there is no parser, or chance left every content pixel as it was.
        EmptyContentError: no content in any image.
    """
    if sampling.parser is None:
        raise ValueError("the content's gradient needs a parser for the content mask")
    stream = sampling.stream(PIXEL_NOISE)
    zeros = [torch.zeros_like(layer.conv.weight) for layer in readers(generator)]
    gradients = zeros
    inside = changed = 0.0
    with only_reader_gradients(generator):
        for z, noise, batch_ends in chunks(generator, sampling):
            images = generator([z], noise=noise)
            mask = masks_of(sampling.parser, images.detach())
            noisy = salt_and_pepper(images, mask, sampling.noise_prob, stream)
            inside += float(mask.sum())
            changed += float((noisy != images).sum())
            found = weight_gradients(generator, images, noisy)
            gradients = [a + b for a, b in zip(gradients, found, strict=True)]
            if batch_ends:
                yield gradients
                gradients = zeros
    _check_content(len(sampling.latents), inside, changed)


def content_aware(generator: Generator, sampling: Sampling) -> Scores:
    """`weight_gradient_score`, summed over the batches.

    Gradients of different images of a batch may cancel, so the batch size is part of the metric.

    Raises:
        ValueError, EmptyContentError: see `content_gradients`.
    """
    scores = [torch.zeros_like(layer.conv.weight[0, 0, :, 0, 0]) for layer in readers(generator)]
    for gradients in content_gradients(generator, sampling):
        scores = [a + b for a, b in zip(scores, mean_magnitude(gradients), strict=True)]
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
