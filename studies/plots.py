"""Plots and pictures of a study's results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from PIL import Image

from Evaluation import sampling
from Model.checkpoint import load_generator
from studies.measuring import HIGHER_IS_BETTER, SEED_OFFSET
from studies.statistics import interval
from studies.tables import TITLES, Table, against_control, families, label, points_of
from Util.files import atomic_path
from Util.pictures import grid, save_png, side_by_side

COLOURS = ("#c0392b", "#2c6fbb", "#2e8b57", "#8e44ad", "#d98e04", "#17808e", "#7f7f7f", "#b5547a")
BETTER, WORSE, UNDECIDED = "#2c6fbb", "#d95f02", "#9a9a9a"
SHOWN = 8
Pairs = Sequence[tuple[str, float]]


def _save(figure: Figure, out: Path) -> None:
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def _interval_lines(axis: Axes, table: Table, pairs: Pairs, figure: str) -> None:
    """Draw means with 95 % t intervals, a line for each arm, the values beside them."""
    for i, pair in enumerate(pairs):
        values = list(table.values(*pair, figure).values())
        found = interval(values)
        error = found.half if found.n > 1 else 0
        axis.errorbar(found.mean, i, xerr=error, color="#1f3a5f", fmt="o", markersize=5, capsize=3)
        axis.plot(values, [i + 0.22] * len(values), ".", color="#c0392b", markersize=5)
    names = [label(table, *pair) for pair in pairs]
    axis.set_yticks(range(len(pairs)), names)
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    axis.set_title(TITLES[figure], fontsize=10)
    axis.grid(axis="x", alpha=0.3)


def _ends(table: Table, pairs: Pairs, figure: str) -> list[float]:
    """Give what a plot must have room for: values, and intervals but those of two, far too wide."""
    values = [list(table.values(*pair, figure).values()) for pair in pairs]
    found = [interval(v) for v in values if len(v) > 2]
    return [*(x for v in values for x in v), *(end for f in found for end in (f.low, f.high))]


def intervals(table: Table, pairs: Pairs, figures: Sequence[str], out: Path) -> None:
    """Draw arms one below the other: mean, 95 % interval and the seeds' values."""
    drawing = Figure(
        figsize=(3.1 * len(figures) + 1, 0.34 * len(pairs) + 1.1), layout="constrained"
    )
    axes = drawing.subplots(1, len(figures), squeeze=False, sharey=True)[0]
    for axis, figure in zip(axes, figures, strict=True):
        _interval_lines(axis, table, pairs, figure)
        ends = _ends(table, pairs, figure)
        if group := {"agreement_inside": "inside", "agreement_outside": "outside"}.get(figure):
            ends.append(table.floor(group))
            axis.axvline(ends[-1], color="#7f7f7f", linestyle="--", linewidth=1)
        margin = 0.05 * (max(ends) - min(ends)) + 1e-9
        axis.set_xlim(min(ends) - margin, max(ends) + margin)
    _save(drawing, out)


def differences_to_control(
    table: Table, arms: Sequence[str], figures: Sequence[str], out: Path
) -> None:
    """Draw arms one below the other: paired difference to the control with its 95 % interval.

    Blue: better, orange: worse, grey: the interval holds 0.

    Args:
        table: of the results.
        arms: complete ones, as the plan's control must be.
        figures: one plot each.
        out: PNG file.
    """
    drawing = Figure(figsize=(3.1 * len(figures) + 1, 0.24 * len(arms) + 1.1), layout="constrained")
    axes = drawing.subplots(1, len(figures), squeeze=False, sharey=True)[0]
    for axis, figure in zip(axes, figures, strict=True):
        higher = HIGHER_IS_BETTER[figure]
        for i, arm in enumerate(arms):
            found = against_control(table, arm, figure)
            decided = BETTER if (found.mean > 0) == higher else WORSE
            axis.errorbar(
                found.mean,
                i,
                xerr=found.half if found.n > 1 else 0,
                color=decided if found.leaves_out_zero else UNDECIDED,
                fmt="o",
                markersize=4,
                capsize=2,
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{TITLES[figure]} ({'higher' if higher else 'lower'} is better)", size=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    _save(drawing, out)


def curves(table: Table, pairs: Pairs, figures: Sequence[str], out: Path) -> None:
    """Draw figures against images shown: the mean over seeds, and their range."""
    drawing = Figure(figsize=(3.6 * len(figures) + 1, 3.2), layout="constrained")
    axes = drawing.subplots(1, len(figures), squeeze=False)[0]
    for axis, figure in zip(axes, figures, strict=True):
        for i, pair in enumerate(pairs):
            found = [points_of(row, figure) for row in table.of(*pair)]
            shown = sorted(set.intersection(*(set(points) for points in found)))
            columns = [[points[x] for points in found] for x in shown]
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(
                shown,
                [sum(c) / len(c) for c in columns],
                color=colour,
                marker=".",
                linestyle="-" if i < len(COLOURS) else "--",
                label=label(table, *pair),
            )
            axis.fill_between(
                shown, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15
            )
        axis.set_title(TITLES[figure], fontsize=10)
        axis.set_xlabel("images shown")
        axis.grid(alpha=0.3)
        if figure.startswith("frechet"):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_locator(NullLocator())
    axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    _save(drawing, out)


def against_macs(table: Table, figures: Sequence[str], out: Path) -> None:
    """Draw figures against multiply-accumulates.

    Settings that were run at several ratios are a line each, with 95 % intervals, side by side; the
    means of the other arms are grey points.
    """
    drawing = Figure(figsize=(4.2 * len(figures) + 1, 3.6), layout="constrained")
    axes = drawing.subplots(1, len(figures), squeeze=False)[0]
    lines = {name: pairs for name, pairs in families(table).items() if len(pairs) > 1}
    drawn = {pair for pairs in lines.values() for pair in pairs}
    others = [pair for pair in table.measured if pair not in drawn]

    def cost(pair: tuple[str, float]) -> float:
        return table.cost(*pair, "macs") / 1e6

    for axis, figure in zip(axes, figures, strict=True):
        means = [interval(list(table.values(*pair, figure).values())).mean for pair in others]
        axis.plot([cost(pair) for pair in others], means, ".", color="#b0b0b0", label="other arms")
        for i, (name, pairs) in enumerate(lines.items()):
            found = [interval(list(table.values(*pair, figure).values())) for pair in pairs]
            axis.errorbar(
                [cost(pair) * (1 + 0.02 * i) for pair in pairs],
                [f.mean for f in found],
                yerr=[f.half if f.n > 1 else 0 for f in found],
                fmt="o-",
                color=COLOURS[i % len(COLOURS)],
                markersize=4,
                capsize=2,
                linewidth=1,
                label=name,
            )
        axis.set_xscale("log")
        ticks = sorted({round(cost(pair), 1) for pairs in lines.values() for pair in pairs})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="million multiply-accumulates", title=TITLES[figure])
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    _save(drawing, out)


def scores_before(table: Table, figures: Sequence[str], out: Path) -> None:
    """Draw figures against the ratio, a curve with its 95 % intervals for each arm."""
    drawing = Figure(figsize=(3.8 * len(figures), 3.4), layout="constrained")
    axes = drawing.subplots(1, len(figures), squeeze=False)[0]
    for axis, figure in zip(axes, figures, strict=True):
        for i, arm in enumerate(table.plan.arms):
            ratios = [ratio for ratio in sorted(arm.ratios) if table.of(arm.name, ratio)]
            found = [interval(list(table.values(arm.name, r, figure).values())) for r in ratios]
            if not ratios:
                continue
            axis.errorbar(
                [ratio + 0.004 * (i - 5) for ratio in ratios],
                [f.mean for f in found],
                yerr=[f.half if f.n > 1 else 0 for f in found],
                color=COLOURS[i % len(COLOURS)],
                linestyle="-" if i < len(COLOURS) else "--",
                marker=".",
                capsize=2,
                linewidth=1,
                label=arm.name,
            )
        axis.set(xlabel="ratio removed", title=TITLES[figure])
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    _save(drawing, out)


def row_picture(checkpoint: Path, seed: int, out: Path, shown: int = SHOWN) -> None:
    """Draw a model's images of the latents that all are shown by, side by side.

    Args:
        checkpoint: the model.
        seed: of the study's jobs; the latents are the first of those that were measured.
        out: PNG file, for `students_picture`.
        shown: latents.
    """
    generator = load_generator(checkpoint).eval().requires_grad_(False)
    with torch.no_grad():
        made = sampling.images(generator, range(shown), seed + SEED_OFFSET, fixed_noise=True)
    save_png(out, grid(made, columns=shown, gap=0))


def students_picture(rows: Mapping[str, Path], out: Path) -> None:
    """Stack the pictures of `row_picture`, by their captions."""
    save_png(out, side_by_side({name: _read_row(file) for name, file in rows.items()}, 1, 130))


def _read_row(file: Path) -> torch.Tensor:
    """Images (N, 3, side, side) in [-1, 1] of a picture (side, N side)."""
    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    side = len(pixels)
    return pixels.unflatten(1, (-1, side)).permute(1, 3, 0, 2) / 127.5 - 1
