"""Draw training curves of one or several runs: ``python -m Util.plot_log RUN... [--out FILE]``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from Util.cli import OneLineParser, check_writable, run_script
from Util.files import atomic_path
from Util.run_log import TIMING, read_metrics
from Util.settings import Settings, add_flags, from_flags, setting

NOT_DRAWN = {"iteration", "real_score", "fake_score", "r1", "path_penalty", *TIMING}


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """Where the curves are drawn."""

    out: Path = setting(Path("training_curve.png"), "PNG file to write", metavar="FILE")


def panels_of(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, list[str]]]:
    """What is drawn side by side: title and logged quantities of every panel that has any.

    Every distillation term (``kd_NAME``) belongs to one panel. What a run measured on samples, by
    whatever metric, is all that no other panel claims.
    """
    logged = sorted({key for row in rows for key in row} - NOT_DRAWN)
    losses = [key for key in logged if key.endswith("_loss")]
    terms = [key for key in logged if key.startswith("kd_")]
    lengths = [key for key in logged if key == "path_length"]
    norms = [key for key in logged if key.startswith("grad_norm_")]
    measured = [key for key in logged if key not in (*losses, *terms, *lengths, *norms)]
    panels = {
        "GAN losses": losses,
        "distance to the teacher": terms,
        "measured on samples": measured,
        "path length": lengths,
        "gradient norms": norms,
    }
    return [(title, keys) for title, keys in panels.items() if keys]


def plot(runs: Sequence[str | PathLike[str]], out: str | PathLike[str]) -> None:
    """Draw every quantity that the runs logged against the iteration.

    Args:
        runs: run folders with a ``metrics.jsonl``.
        out: PNG file to write.

    Raises:
        ValueError: a folder has no metrics.
    """
    from matplotlib.figure import Figure

    logs = {str(run): read_metrics(run) for run in runs}
    panels = panels_of([row for rows in logs.values() for row in rows])
    if not panels:
        raise ValueError(f"{', '.join(logs)}: nothing to draw in metrics.jsonl")
    figure = Figure(figsize=(5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for run, rows in logs.items():
            # Matplotlib takes what stands between dollar signs for a formula.
            prefix = Path(run).name.replace("$", r"\$") + " " if len(logs) > 1 else ""
            for key in keys:
                points = [(row["iteration"], row[key]) for row in rows if key in row]
                if points:
                    marker = "" if len(points) > 1 else "o"
                    drawn = tuple(zip(*points, strict=True))
                    axis.plot(*drawn, label=prefix + key, linewidth=1.2, marker=marker)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    prog = "python -m Util.plot_log"
    example = f"example: {prog} runs/first runs/second --out both.png"
    parser = OneLineParser(prog=prog, description=__doc__, epilog=example)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    add_flags(parser, PlotSettings)

    def run(args: argparse.Namespace) -> None:
        out = from_flags(PlotSettings, vars(args)).out
        check_writable("out", out)
        plot(args.runs, out)
        print(f"saved {out}")

    return run_script(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
