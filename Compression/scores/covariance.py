"""What channels tell the convolution that reads them, and which of them tell most of it.

Covariance of a group, over pictures and positions weighted by the content:

    K = sum m (s x - mean)(s x - mean)^T / sum m

with the group's activations x and its reader's styles s. **subset** chooses channels from which the
others can be reconstructed linearly: greedily, the one that lowers the trace of what is left most
(column subset selection; Farahat et al., "An efficient greedy method for unsupervised feature
selection", ICDM 2011),

    j = argmax |R e_j|^2 / R_jj,     R <- R - R e_j e_j^T R / R_jj,     R = K at first
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from Compression.scores.positions import content_weight
from Compression.scores.sampling import Sampling, Scores, chunks, readers
from Model.generator import Generator

OUTSIDE = 0.1
"""Weight of positions outside the content, as in `Compression.initialisation.reconstruction`."""


@torch.no_grad()
def input_covariances(generator: Generator, sampling: Sampling) -> list[Tensor]:
    """Compute K of every channel group, (C, C) each, in double precision.

    Args:
        generator: any.
        sampling: its latents are looked at; without a parser all positions weigh the same.
    """
    weights = [0.0] * len(generator.channels)
    device = generator.device
    sums = [torch.zeros(c, dtype=torch.double, device=device) for c in generator.channels]
    products = [torch.outer(total, total) for total in sums]
    for inputs, weight in _read(generator, sampling):
        for i, x in enumerate(inputs):
            m = F.adaptive_avg_pool2d(weight, x.shape[-1]).flatten().double()
            rows = x.transpose(0, 1).flatten(1).double()
            weights[i] += m.sum().item()
            sums[i] += rows @ m
            products[i] += (rows * m) @ rows.T
    means = [total / weight for total, weight in zip(sums, weights, strict=True)]
    return [
        product / weight - torch.outer(mean, mean)
        for product, weight, mean in zip(products, weights, means, strict=True)
    ]


def _read(generator: Generator, sampling: Sampling) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What the readers of all groups get, (n, C, h, w) each, and the weight (n, 1, H, W)."""
    for z, noise, _ in chunks(generator, sampling):
        w = generator.mapping(z)
        w_plus = generator.w_plus([w], input_is_latent=True)
        made = generator.synthesis(w_plus, noise, features=True)
        inputs = [generator.input(len(z)), *made.features]
        styles = [layer.conv.style(w)[:, :, None, None] for layer in readers(generator)]
        weight = content_weight(made.image, sampling.parser, OUTSIDE)
        yield [x * style for x, style in zip(inputs, styles, strict=True)], weight


def greedy_order(covariance: Tensor) -> list[int]:
    """Order channels by column subset selection, the first chosen first; see the module."""
    left, order = covariance.clone(), []
    free = torch.ones(len(left), dtype=torch.bool, device=left.device)
    for _ in range(len(left)):
        diagonal = left.diagonal().clamp(min=1e-12 * covariance.trace().item() + 1e-30)
        gain = left.square().sum(dim=0) / diagonal
        chosen = int(torch.where(free, gain, -1.0).argmax())
        order.append(chosen)
        free[chosen] = False
        column = left[:, chosen]
        left = left - torch.outer(column, column) / diagonal[chosen]
    return order


def subset(generator: Generator, sampling: Sampling) -> Scores:
    """Score channels by their place in `greedy_order`: C for the first chosen, 1 for the last."""
    scores = []
    for covariance in input_covariances(generator, sampling):
        order = torch.tensor(greedy_order(covariance))
        score = torch.empty(len(order))
        score[order] = torch.arange(len(order), 0, -1).float()
        scores.append(score)
    return scores
