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

import torch
from torch import Tensor

from Compression.scores.content_aware import content_gradients
from Compression.scores.covariance import input_covariances
from Compression.scores.sampling import Sampling, readers
from Model.generator import Generator


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
    losses = []
    for covariance in input_covariances(generator, sampling):
        values = torch.linalg.eigvalsh(covariance).clamp(min=0)
        losses.append(_left_out(values / values.sum().clamp(min=1e-30)))
    return losses


def _left_out(values: Tensor) -> Tensor:
    """Sum the values that are left out when the highest 0, 1, ... C stay, (C + 1,)."""
    rising = values.cpu().double().sort().values
    return torch.cat([rising.new_zeros(1), rising.cumsum(dim=0)]).flip(0)
