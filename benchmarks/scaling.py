"""How the time of an image grows with batch, size and remove ratio.

``python -m benchmarks.scaling [--out PICTURE]`` draws it beside what the multiply-accumulates alone
would predict from the first point of each curve.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.jobs import frozen, generator
from benchmarks.timing import Timing, interleaved, machine, parser, table, write_json
from Model.complexity import macs
from Util.device import pick_device
from Util.files import atomic_path

Point = tuple[float, Timing, float]
"""Abscissa, seconds per image, multiply-accumulates per image."""


@torch.no_grad()
def seconds(size: int, ratio: float, batch: int, rounds: int) -> tuple[Timing, float]:
    """Time of an image, and its multiply-accumulates."""
    network = frozen(generator(size, ratio))
    w = torch.randn(batch, network.n_latent, 512)
    whole = interleaved({"x": partial(network.synthesis, w, "fixed")}, rounds)["x"]
    return Timing(*(t / batch for t in asdict(whole).values())), macs(network)


def curves(rounds: int) -> dict[str, list[Point]]:
    """The three curves."""
    measure: Callable[[int, float, int], tuple[Timing, float]] = partial(seconds, rounds=rounds)
    return {
        "batch (256 px, full size)": [(n, *measure(256, 0.0, n)) for n in (1, 2, 4, 8)],
        "size in px (full size, batch 1)": [
            (side, *measure(side, 0.0, 1)) for side in (64, 128, 256, 512, 1024)
        ],
        "remove ratio (256 px, batch 1)": [
            (ratio, *measure(256, ratio, 1)) for ratio in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
        ],
    }


def draw(found: dict[str, list[Point]], out: Path) -> None:
    """One panel for each curve."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw, print a table, and write JSON if asked."""
    flags: argparse.ArgumentParser = parser("Growth of the generator's time.")
    flags.add_argument("--out", type=Path, default=Path("scaling.png"), metavar="FILE")
    options = flags.parse_args(argv)
    pick_device("cpu")
    torch.set_num_threads(options.threads)
    print(machine("cpu"))
    found = curves(options.rounds)
    draw(found, options.out)
    rows = [
        [name, x, f"{1e3 * timing.median:.1f}", f"{work:,}", f"{work / timing.median / 1e9:.0f}"]
        for name, points in found.items()
        for x, timing, work in points
    ]
    print(table(("varied", "value", "ms per image", "MACs", "GMAC/s"), rows))
    write_json(
        options.json, "cpu", {k: [(x, asdict(t), m) for x, t, m in v] for k, v in found.items()}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
