"""How the time of an image grows with batch, size and remove ratio.

``python -m benchmarks.scaling [--out PICTURE]`` draws it beside what the multiply-accumulates alone
would predict from the first point of each curve.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.jobs import frozen, generator
from benchmarks.timing import Measurement, Timing, interleaved, run_benchmark, table
from Model.complexity import macs
from Util.files import atomic_path
from Util.settings import setting

Point = tuple[float, Timing, float]
"""Abscissa, seconds per image, multiply-accumulates per image."""


@dataclass(frozen=True, kw_only=True)
class ScalingSettings(Measurement):
    """Where the curves are drawn."""

    out: Path = setting(Path("scaling.png"), "picture of the curves", metavar="FILE")


@torch.no_grad()
def seconds(size: int, ratio: float, batch: int, rounds: int) -> tuple[Timing, float]:
    """Time an image; return that and its multiply-accumulates."""
    network = frozen(generator(size, ratio))
    w = torch.randn(batch, network.n_latent, 512)
    whole = interleaved({"x": partial(network.synthesis, w, "fixed")}, rounds)["x"]
    return Timing(*(t / batch for t in asdict(whole).values())), macs(network)


def curves(rounds: int) -> dict[str, list[Point]]:
    """Measure the three curves."""
    cost: Callable[[int, float, int], tuple[Timing, float]] = partial(seconds, rounds=rounds)
    return {
        "batch (256 px, full size)": [(n, *cost(256, 0.0, n)) for n in (1, 2, 4, 8)],
        "size in px (full size, batch 1)": [
            (side, *cost(side, 0.0, 1)) for side in (64, 128, 256, 512, 1024)
        ],
        "remove ratio (256 px, batch 1)": [
            (ratio, *cost(256, ratio, 1)) for ratio in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
        ],
    }


def draw(found: dict[str, list[Point]], out: Path) -> None:
    """Draw one panel for each curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found))
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        x = [point[0] for point in points]
        measured = [1e3 * timing.median for _, timing, _ in points]
        predicted = [measured[0] * work / points[0][2] for _, _, work in points]
        axis.plot(x, measured, "o-", label="measured")
        axis.plot(x, predicted, "--", label="by multiply-accumulates", color="grey")
        if "size" in name.split()[0]:
            axis.set(xscale="log", xticks=x, xticklabels=x)
            axis.minorticks_off()
        axis.set(
            xlabel=name, ylabel="ms per image", ylim=(0 if axis.get_yscale() != "log" else None)
        )
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def measure(settings: ScalingSettings) -> dict[str, list[tuple[float, dict[str, float], float]]]:
    """Draw the curves and print a table; return their points."""
    found = curves(settings.rounds)
    draw(found, settings.out)
    rows = [
        [name, x, f"{1e3 * timing.median:.1f}", f"{work:,}", f"{work / timing.median / 1e9:.0f}"]
        for name, points in found.items()
        for x, timing, work in points
    ]
    print(table(("varied", "value", "ms per image", "MACs", "GMAC/s"), rows))
    return {k: [(x, asdict(timing), work) for x, timing, work in v] for k, v in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Growth of the generator's time."
    return run_benchmark(ScalingSettings, measure, argv, "scaling", what)


if __name__ == "__main__":
    sys.exit(main())
