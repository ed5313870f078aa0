"""Singular value scaling (Kim and Yoon, AAAI 2025), and the control that it needs.

Every weight of the synthesis network's convolutions, ToRGBs and modulations, as (O, I k k):

    svs:       W = U S V^T  ->  U S^(1/2) V^T
    rescaled:  W            ->  W |S^(1/2)| / |S|        (Frobenius norms: svs's norm, W's spectrum)
    both:      b            ->  b / sqrt(|b| + 1e-8)     (the modulations' biases too)

The stored weights take part, without the scale of the equalised learning rate. Mapping network,
constant input and noise strengths stay. `rescaled` tells what the norms alone do: shorter
filters mean a higher learning rate for Adam, and demodulation hides them from the pictures.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from Compression.scores.sampling import Sampling
from Model.generator import Generator


def _parameters(generator: Generator) -> Iterator[tuple[bool, nn.Parameter]]:
    """The synthesis network's weights (True) and biases (False)."""
    for layer in (*generator.styled_convs, *generator.rgb_layers):
        for name, parameter in layer.named_parameters():
            if name != "noise.weight":
                yield name.endswith("weight"), parameter


def _matrix(weight: Tensor) -> Tensor:
    """(1, O, I, k, k) -> (O, I k k); (I, S) as it is."""
    return weight if weight.ndim == 2 else weight[0].flatten(1)


@torch.no_grad()
def _scale(generator: Generator, scaled: Callable[[Tensor], Tensor]) -> None:
    """Change every weight by a function of its matrix, and divide the biases."""
    for is_weight, parameter in _parameters(generator):
        if is_weight:
            parameter.copy_(scaled(_matrix(parameter)).view_as(parameter))
        else:
            parameter.div_((parameter.norm() + 1e-8).sqrt())


def _root_of_spectrum(matrix: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u * s.sqrt()) @ v


def _same_norm(matrix: Tensor) -> Tensor:
    s = torch.linalg.svdvals(matrix)
    return matrix * (s.sqrt().norm() / s.norm().clamp(min=1e-30))


def svs(pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling) -> None:
    """Scale the singular values."""
    _scale(pruned, _root_of_spectrum)


def rescaled(
    pruned: Generator, full: Generator, keep: Sequence[Tensor], sampling: Sampling
) -> None:
    """Scale the whole matrix to the norm that `svs` gives it."""
    _scale(pruned, _same_norm)
