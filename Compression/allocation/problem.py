"""What an allocation is told: what widths are for, what they cost, and what they may cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from Compression.allocation.costs import Cost
from Compression.scores.sampling import Sampling
from Model.generator import Generator
from Util.settings import SettingError, Settings, setting

Widths = tuple[int, ...]
"""One per channel group, as `Generator.channels`."""


@dataclass(frozen=True, kw_only=True)
class AllocationSettings(Settings):
    """What every allocation is told."""

    max_parameters: int | None = setting(
        None, "most parameters that the result may have, beside its budget", low=1, metavar="N"
    )
    round_to: int = setting(
        1, "narrowed layers get multiples of so many channels", low=1, metavar="N"
    )
    min_channels: int = setting(4, "least channels of a layer", low=1, metavar="N")


@dataclass(frozen=True)
class Budget:
    """Which widths are allowed.

    Attributes:
        full: the widths to start from.
        macs: cost of widths in multiply-accumulates.
        parameters: their cost in parameters.
        most_macs: that they may have.
        limits: further limits.
    """

    full: Widths
    macs: Cost
    parameters: Cost
    most_macs: int
    limits: AllocationSettings

    @property
    def floor(self) -> Widths:
        """The least widths."""
        return tuple(self.ladder(width)[0] for width in self.full)

    def ladder(self, full: int) -> list[int]:
        """The widths that a group of so many channels may have, ascending."""
        step = self.limits.round_to
        least = -(-self.limits.min_channels // step) * step
        return [*range(least, full, step), full]

    def fits(self, widths: Sequence[int]) -> bool:
        """Whether widths keep all limits."""
        cap = self.limits.max_parameters
        cheap = self.macs(widths) <= self.most_macs
        return cheap and (cap is None or self.parameters(widths) <= cap)

    def binding(self, widths: Sequence[int]) -> Cost:
        """The cost that is to be saved: parameters once their cap alone is exceeded."""
        small = self.macs(widths) <= self.most_macs and not self.fits(widths)
        return self.parameters if small else self.macs

    def describe(self) -> str:
        """Say the limits in words."""
        words = [f"at most {self.most_macs:,} multiply-accumulates"]
        if self.limits.max_parameters is not None:
            words.append(f"at most {self.limits.max_parameters:,} parameters")
        if self.limits.round_to > 1:
            words.append(f"multiples of {self.limits.round_to}")
        return ", ".join([*words, f"at least {self.limits.min_channels} channels a layer"])

    def check(self, name: str = "macs") -> None:
        """Refuse limits that cannot be kept, or that hold anyway.

        Args:
            name: the setting that the budget comes from.

        Raises:
            SettingError: names the limit and the range that can be reached.
        """
        for setting_, value, cost, unit in (
            (name, self.most_macs, self.macs, "multiply-accumulates"),
            ("max_parameters", self.limits.max_parameters, self.parameters, "parameters"),
        ):
            low, high = cost(self.floor), cost(self.full)
            if value is not None and not low <= value <= high:
                least = ",".join(map(str, self.floor))
                raise SettingError(
                    setting_,
                    f"means {value:,} {unit}, out of reach: there are {low:,} (widths {least}) to"
                    f" {high:,} (the full model)",
                )


@dataclass(frozen=True)
class Problem:
    """Widths to find.

    Attributes:
        generator: that is to be narrowed.
        scores: of its channels, one tensor per channel group; higher ones stay.
        sampling: what else may be drawn on; its options are the allocation's own.
        budget: which widths are allowed.
    """

    generator: Generator
    scores: Sequence[Tensor]
    sampling: Sampling
    budget: Budget

    def of(self, generator: Generator, scores: Sequence[Tensor]) -> "Problem":
        """The same problem from a generator on that is narrower already."""
        budget = replace(self.budget, full=generator.channels)
        return Problem(generator, scores, self.sampling, budget)
