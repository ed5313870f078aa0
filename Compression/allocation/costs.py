"""What a generator of any widths costs, exactly, without making it.

Every layer's cost is a product of the widths that it reads and makes, so both the
multiply-accumulates and the parameters of a generator with widths c are

    cost(c) = constant + sum_i own_i c_i + sum_i shared_i c_i c_{i+1}

The coefficients are read off a few generators without values, by `Model.complexity`, which
stays the one place that knows how to count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from Model import complexity
from Model.generator import Generator


@dataclass(frozen=True)
class Cost:
    """One cost as a function of the widths; see the module."""

    constant: int
    own: tuple[int, ...]
    shared: tuple[int, ...]

    def __call__(self, widths: Sequence[int]) -> int:
        """Give the cost of a generator of these widths, one per channel group."""
        own = sum(a * c for a, c in zip(self.own, widths, strict=True))
        pairs = zip(self.shared, widths[:-1], widths[1:], strict=True)
        return self.constant + own + sum(b * c * d for b, c, d in pairs)


def costs_like(generator: Generator) -> tuple[Cost, Cost]:
    """Read off the multiply-accumulates and the parameters of generators of other widths.

    Args:
        generator: tells image size, style_dim and n_mlp.
    """
    groups = len(generator.channels)

    def made(*twice: int) -> Generator:
        widths = [2 if i in twice else 1 for i in range(groups)]
        with torch.device("meta"):
            return Generator(generator.size, generator.style_dim, generator.n_mlp, widths)

    ones = made()
    single = [made(i) for i in range(groups)]
    pairs = [made(i, i + 1) for i in range(groups - 1)]

    def cost(count: Callable[[Generator], int]) -> Cost:
        base, first = count(ones), [count(g) for g in single]
        shared = [
            count(g) - first[i] - first[i + 1] + base  # 4 - 2 - 2 + 1 = 1 of the product
            for i, g in enumerate(pairs)
        ]
        around = [a + b for a, b in zip([0, *shared], [*shared, 0], strict=True)]
        own = [f - base - b for f, b in zip(first, around, strict=True)]
        return Cost(base - sum(own) - sum(shared), tuple(own), tuple(shared))

    return cost(complexity.macs), cost(complexity.parameters)
