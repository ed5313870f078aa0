"""A long small training: memory, open files and iteration time must not grow.

``python -m benchmarks.soak`` trains tiny networks on rendered noise for 2,000 iterations with
distillation, both regularisers, samples, the Frechet distance and checkpoints, prints what the
process held at the start and at the end, and exits with 1 if that has grown.
"""

import gc
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from Compression.run import train
from Compression.training import Trainer
from Model import bundled, checkpoint
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.cli import run_settings
from Util.settings import Settings, setting

WARM_UP = 0.2
"""Part of the run before the first measurements: caches and pools fill."""


@dataclass
class Probe:
    """What this process holds, iteration by iteration.

    Attributes:
        memory: resident, MiB.
        files: open ones.
        seconds: elapsed in every iteration, without samples, evaluation and checkpoints.
        cpu_seconds: of processor time in it.
    """

    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def take(self, seconds: float, cpu_seconds: float) -> None:
        """Note one iteration."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * resource.getpagesize() / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)


@dataclass(frozen=True)
class Growth:
    """A quantity in the first and in the last part of a run, and by how much it may grow."""

    name: str
    unit: str
    start: float
    end: float
    allowed: float

    @property
    def grew(self) -> bool:
        """Whether it has grown by more."""
        return self.end > self.start + self.allowed

    def __str__(self) -> str:
        verdict = "GREW" if self.grew else "ok"
        return (
            f"{self.name:<16} {self.start:>9.2f} {self.end:>9.2f} {self.unit:<4}"
            f" (allowed: {self.allowed:+.2f}) {verdict}"
        )


def growth(probe: Probe) -> list[Growth]:
    """Compare the fifth of the run after the warm-up with its last fifth."""
    n = len(probe.seconds)
    first, last = slice(int(WARM_UP * n), int(2 * WARM_UP * n)), slice(int((1 - WARM_UP) * n), n)

    def of(name: str, unit: str, values: Sequence[float], share: float, more: float) -> Growth:
        start, end = statistics.median(values[first]), statistics.median(values[last])
        return Growth(name, unit, start, end, share * start + more)

    return [
        of("resident memory", "MiB", probe.memory, 0, 8),
        of("open files", "", probe.files, 0, 0),
        # Other work on the processor lengthens the elapsed time, so that one is only shown.
        of("processor time", "ms", [1e3 * s for s in probe.cpu_seconds], 0.25, 0),
        of("elapsed time", "ms", [1e3 * s for s in probe.seconds], math.inf, 0),
    ]


def make_inputs(folder: Path) -> None:
    """A teacher and pictures."""
    torch.manual_seed(0)
    checkpoint.save(folder / "teacher.pt", {"g_ema": Generator(16, 16, 2, (16,) * 6)})
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(128):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"data/{i}.png")


def settings_of(folder: Path, iterations: int, workers: int) -> TrainConfig:
    """A training in which everything takes part, every 50 iterations or so."""
    return TrainConfig(
        path=f"{folder}/data",
        out=f"{folder}/run",
        size=16,
        style_dim=16,
        n_mlp=2,
        channels=(8,) * 6,
        teacher_ckpt=f"{folder}/teacher.pt",
        perceptual="parser",
        parser_ckpt=str(bundled.PARSER),
        batch_size=2,
        iter=iterations,
        workers=workers,
        device="cpu",
        log_freq=10,
        val_sample_freq=50,
        model_save_freq=100,
        keep_checkpoints=2,
        fid_n_sample=113,
        fid_features="parser",
    )


def soak(iterations: int, workers: int) -> Probe:
    """Train in a temporary folder and watch."""
    probe, iterate = Probe(), Trainer.iterate

    def watched(trainer: Trainer, real: torch.Tensor) -> dict[str, torch.Tensor]:
        start, cpu_start = time.perf_counter(), time.process_time()
        metrics = iterate(trainer, real)
        probe.take(time.perf_counter() - start, time.process_time() - cpu_start)
        return metrics

    with tempfile.TemporaryDirectory() as name, mock.patch.object(Trainer, "iterate", watched):
        folder = Path(name)
        make_inputs(folder)
        train(settings_of(folder, iterations, workers))
    gc.collect()
    return probe


@dataclass(frozen=True, kw_only=True)
class SoakSettings(Settings):
    """Settings of the soak."""

    iter: int = setting(2000, "iterations", low=20)
    workers: int = setting(1, "loading processes", low=0)


def run(settings: SoakSettings) -> int:
    """Soak and report; returns 1 if anything has grown."""
    found = growth(soak(settings.iter, settings.workers))
    print(f"{settings.iter} iterations; medians of the second and of the last fifth:")
    print("\n".join(map(str, found)))
    return int(any(quantity.grew for quantity in found))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    prog = "python -m benchmarks.soak"
    return run_settings(SoakSettings, run, argv, prog=prog, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
