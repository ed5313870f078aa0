"""What narrowing a channel group loses, as curves over its width, for `cheapest_first`.

**importance**, of channel c of a group, by first order (the score's L inside the content):

    I_c = sum over (o, k, k) of | W[o, c] dL / dW[o, c] |,   L(c) = sum of the lowest C - c of the I

**spectrum**: the share of what the group tells its reader that its c leading directions cannot:

    L(c) = sum_{j > c} lambda_j / sum_j lambda_j

with the eigenvalues lambda of the covariance, over pictures and positions, of the modulated
activations s_c x_c that the next convolution reads, weighted by the content. This is the error
of the best linear reconstruction of the group's channels from c of their combinations (principal
component analysis), so it asks what cannot be reconstructed, and not what changes pictures today.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from Compression.scores.content_aware import content_gradients
from Compression.scores.positions import content_weight
from Compression.scores.sampling import Sampling, chunks, readers
from Model.generator import Generator

OUTSIDE = 0.1
"""Weight of positions outside the content, as in `Compression.initialisation.reconstruction`."""


def importance_losses(generator: Generator, sampling: Sampling) -> list[Tensor]:
    """Give the loss of every channel group by importance, (C + 1,) each, in double precision."""
    weights = [layer.conv.weight.detach() for layer in readers(generator)]
    found = [weight.new_zeros(weight.shape[2]) for weight in weights]
    for gradients in content_gradients(generator, sampling):
        for total, gradient, weight in zip(found, gradients, weights, strict=True):
            total += (gradient * weight).abs().sum(dim=(0, 1, 3, 4))
    return [_left_out(values) for values in found]


def spectrum_losses(generator: Generator, sampling: Sampling) -> list[Tensor]:
    """Give the loss of every channel group by spectrum, (C + 1,) each, in double precision."""
    moments = [_Moments(width) for width in generator.channels]
    with torch.no_grad():
        for inputs, weight in _read(generator, sampling):
            for total, x in zip(moments, inputs, strict=True):
                total.add(x, weight)
        losses = []
        for total in moments:
            values = torch.linalg.eigvalsh(total.covariance()).clamp(min=0)
            losses.append(_left_out(values / values.sum().clamp(min=1e-30)))
    return losses


def _left_out(values: Tensor) -> Tensor:
    """Sum the values that are left out when the highest 0, 1, ... C stay, (C + 1,)."""
    rising = values.cpu().double().sort().values
    return torch.cat([rising.new_zeros(1), rising.cumsum(dim=0)]).flip(0)


def _read(generator: Generator, sampling: Sampling) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What the readers of all groups get, (n, C, h, w) each, and the weight (n, 1, H, W)."""
    for z, noise, _ in chunks(generator, sampling):
        w = generator.mapping(z)
        made = generator.synthesis(
            generator.w_plus([w], input_is_latent=True), noise, features=True
        )
        inputs = [generator.input(len(z)), *made.features]
        styles = [layer.conv.style(w)[:, :, None, None] for layer in readers(generator)]
        weight = content_weight(made.image, sampling.parser, OUTSIDE)
        yield [x * style for x, style in zip(inputs, styles, strict=True)], weight


class _Moments:
    """Weighted sums of values and of their products."""

    def __init__(self, width: int) -> None:
        self.weight = 0.0
        self.values: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Take in (n, C, h, w) with weights (n, 1, H, W), averaged down."""
        m = torch.nn.functional.adaptive_avg_pool2d(weight, x.shape[-1]).flatten().double()
        rows = x.transpose(0, 1).flatten(1).double()
        self.weight += m.sum().item()
        self.values = self.values + rows @ m
        self.products = self.products + (rows * m) @ rows.T

    def covariance(self) -> Tensor:
        """Covariance (C, C) of all that was taken in."""
        mean = torch.as_tensor(self.values) / self.weight
        return torch.as_tensor(self.products) / self.weight - torch.outer(mean, mean)
