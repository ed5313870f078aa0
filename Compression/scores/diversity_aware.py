"""DCP's score: which channels answer differently to different directions of w.

For a batch b of latents and directions d_1 ... d_J, the same for the whole batch,

    L_bj     = sum | G(w) - G(w + alpha d_j) |
    g_bj[c]  = mean over (o, k, k) of | d L_bj / d W[o, c, k, k] |
    score_c  = sum over b, j of  (g_bj[c] - mean over j of g_bj[c])^2

(Chung et al., "Diversity-aware Channel Pruning for StyleGAN Compression", CVPR 2024).
The d_j are principal components of w, drawn with replacement by their share of the variance. Every
picture has layer noise of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from Compression.scores import sampling as draws
from Compression.scores.content_aware import mean_magnitude, only_reader_gradients
from Compression.scores.sampling import Sampling, Scores, layer_noise, readers
from Evaluation.directions import principal_components
from Model.generator import Generator
from Util import memory
from Util.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class DiversitySettings(Settings):
    """Settings of the score diversity_aware; the defaults made DCP's figures."""

    dcp_alpha: float = setting(
        5.0, "diversity_aware: length of the step along a direction of w (SVS: 10)", above=0
    )
    dcp_directions: int = setting(
        10, "diversity_aware: directions drawn for each batch, at least 2", low=2
    )
    dcp_latents: int = setting(
        10_000, "diversity_aware: number of w whose principal components they are", low=2
    )
    # DCP means to stop the gradient and does not: it sets an attribute that has no effect.
    dcp_stop_gradient: bool = setting(
        False,
        "diversity_aware: no gradient through the moved pictures, as in SVS; DCP's flows through"
        " both",
    )


def diversity_aware(generator: Generator, sampling: Sampling) -> Scores:
    """Score the channels; the batch size is part of the metric (DCP: 5,000 latents in fives)."""
    options: DiversitySettings = sampling.options
    found = principal_components(generator, sampling.seed, options.dcp_latents)
    choice, noise = sampling.stream(draws.DIRECTIONS), sampling.stream(draws.LAYER_NOISE)
    scores = [torch.zeros(width, device=generator.device) for width in generator.channels]
    with only_reader_gradients(generator):
        for z in sampling.latents.split(sampling.batch_size):
            drawn = torch.multinomial(
                found.shares.cpu(), options.dcp_directions, replacement=True, generator=choice
            )
            steps = options.dcp_alpha * found.components[drawn]
            w = generator.mapping(z.to(generator.device))
            answers = [
                _answer(generator, w, step, noise, options.dcp_stop_gradient) for step in steps
            ]
            for score, values in zip(scores, zip(*answers, strict=True), strict=True):
                score += torch.stack(values).var(dim=0, unbiased=False) * len(steps)
            sampling.progress(len(z))
    return scores


def _answer(
    generator: Generator, w: Tensor, step: Tensor, noise: torch.Generator, stop_gradient: bool
) -> Scores:
    """Compute g_bj of all channel groups, a batch's answer to one step, few images at a time.

    Args:
        generator: gradients flow to the weights of its `readers`.
        w: (n, style_dim).
        step: alpha d_j, (style_dim,).
        noise: stream of the layer noise.
        stop_gradient: the moved pictures are constants.
    """
    weights = [layer.conv.weight for layer in readers(generator)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    pictures = 2  # of each latent, both in memory
    for part in w.split(memory.at_once(generator.size, memory.SCORING // pictures)):
        maps = layer_noise(generator, pictures * len(part), noise)
        still = generator([part], input_is_latent=True, noise=[m[::2] for m in maps])
        with torch.set_grad_enabled(not stop_gradient):
            moved = generator([part + step], input_is_latent=True, noise=[m[1::2] for m in maps])
        distance = (still - moved).abs().sum()
        for total, gradient in zip(gradients, torch.autograd.grad(distance, weights), strict=True):
            total += gradient
    return mean_magnitude(gradients)
