"""Inference in bfloat16 (``--precision bf16``): speed, and grey levels off float32.

``python -m benchmarks.precision``: one image a call, both prepared, taking turns. The bundled
models tell the error; the others have random weights and tell the speed alone.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.jobs import frozen, generator
from benchmarks.timing import OneThread, interleaved, milliseconds, run_benchmark, table
from Evaluation.generated import grey_levels_off
from Evaluation.sampling import draw_z, from_z
from Model import bundled
from Model.checkpoint import load_generator
from Model.generator import Generator
from Model.precision import PRECISIONS

ERROR_IMAGES = 16


def models() -> Iterator[tuple[str, Generator, bool]]:
    """Name, generator, and whether its weights are trained."""
    yield "bundled 64 px full size", load_generator(bundled.MODEL), True
    yield "bundled 64 px compressed", load_generator(bundled.COMPRESSED), True
    for size in (256, 1024):
        for label, ratio in (("full size", 0.0), ("pruned by 0.7", 0.7)):
            yield f"{size} px {label}", generator(size, ratio), False


def synthesise(network: Generator, w: torch.Tensor) -> None:
    """Make an image of w+."""
    with torch.no_grad():
        network.synthesis(w, "fixed")


def measure(settings: OneThread) -> list[dict[str, Any]]:
    """Print a table of the models; return its figures."""
    clock, results, rows = settings.clock, [], []
    for name, network, trained in models():
        prepared = {way: frozen(copy.deepcopy(network)).prepare(way) for way in PRECISIONS}
        w = torch.randn(1, network.n_latent, network.style_dim)
        calls = {way: partial(synthesise, prepared[way], w) for way in PRECISIONS}
        times = interleaved(calls, settings.rounds, clock=clock)
        errors: tuple[float, ...] = ()
        if trained:
            half = prepared["bf16"]
            errors = grey_levels_off(half, from_z(half, draw_z(half, range(ERROR_IMAGES), 0)))
        ratio = times["float32"].median / times["bf16"].median
        off = f"{errors[0]:.2f} mean, {errors[1]:.1f} at most" if errors else ""
        rows.append([name, *map(milliseconds, times.values()), f"{ratio:.2f}", off])
        figures = {key: asdict(timing) for key, timing in times.items()}
        results.append({"model": name, "grey levels": errors, **figures})
        print(rows[-1], file=sys.stderr, flush=True)
    head = ("one image", *(f"{name} ms" for name in PRECISIONS), "ratio", "grey levels off")
    print(table(head, rows))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Speed and error of inference in bfloat16."
    return run_benchmark(OneThread, measure, argv, "precision", what)


if __name__ == "__main__":
    sys.exit(main())
