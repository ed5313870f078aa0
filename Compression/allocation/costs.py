"""What a generator of any widths costs, exactly, without making it.

Every layer's cost is a product of the widths that it reads and makes, so both the
multiply-accumulates and the parameters of a generator with widths c are

    cost(c) = constant + sum_i own_i c_i + sum_i shared_i c_i c_{i+1}

The coefficients are read off the layers of four generators without values, by `Model.complexity`,
which stays the one place that knows how to count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from Model.complexity import LayerCost, layer_costs
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


def costs_like(generator: Generator, second_kernel: int | None = None) -> tuple[Cost, Cost]:
    """Read off the multiply-accumulates and the parameters of generators of other widths.

    Args:
        generator: tells all but the widths.
        second_kernel: see `Generator.like`.
    """
    groups = len(generator.channels)

    def layers(even: int, odd: int) -> list[LayerCost]:
        widths = [odd if i % 2 else even for i in range(groups)]
        with torch.device("meta"):
            made = generator.like(widths, second_kernel)
        return layer_costs(made)

    # Of two groups that follow one another, one is even and one is odd.
    probes = list(zip(layers(1, 1), layers(2, 1), layers(1, 2), layers(2, 2), strict=True))
    macs, parameters = (
        _cost(groups, [(p[0].name, *(getattr(layer, what) for layer in p)) for p in probes])
        for what in ("macs", "parameters")
    )
    return macs, parameters


def _cost(groups: int, probes: Sequence[tuple[str, int, int, int, int]]) -> Cost:
    """Solve for the coefficients.

    Args:
        groups: channel groups.
        probes: name and costs of every layer in the order of computation, with widths of 1 and 1,
            2 and 1, 1 and 2, and 2 and 2 channels in groups of even and of odd number.
    """
    constant, own, shared, last = 0, [0] * groups, [0] * (groups - 1), 0
    for name, one, even, odd, two in probes:
        both = two - even - odd + one
        if both:  # a convolution from the last group to the next
            shared[last] += both
            last += 1
        by_parity = (even - one - both, odd - one - both)
        own[last] += by_parity[last % 2]
        if last and not name.startswith("to_rgb"):
            own[last - 1] += by_parity[(last - 1) % 2]
        constant += one - both - sum(by_parity)
    return Cost(constant, tuple(own), tuple(shared))
