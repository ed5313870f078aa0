"""Timings that hold on a busy machine: variants take turns, and medians and ranges are reported."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from Util.cli import run_settings
from Util.device import pick_device
from Util.files import atomic_path
from Util.settings import SettingError, Settings, setting

Variants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, fastest and slowest round."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True, kw_only=True)
class Measurement(Settings):
    """What every benchmark is told."""

    threads: int | None = setting(None, "of PyTorch (default: as it finds)", low=1, metavar="N")
    rounds: int = setting(7, "of each timing, at least 5", low=5, metavar="N")
    json: Path | None = setting(None, "also write the numbers there", metavar="FILE")
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class OneThread(Measurement):
    """What a benchmark is told that may count one thread's own time."""

    cpu_time: bool = setting(False, "count this thread's processor time only, on a shared machine")

    @property
    def clock(self) -> Callable[[], float]:
        """The clock to measure by.

        Raises:
            SettingError: processor time was asked for of several threads, or of a GPU.
        """
        if self.cpu_time and (self.threads != 1 or self.device != "cpu"):
            raise SettingError("cpu_time", "sees one CPU thread only: it needs --threads 1")
        return time.thread_time if self.cpu_time else time.perf_counter


Kind = TypeVar("Kind", bound=Measurement)


def some_of(jobs: Iterable[str]) -> Any:
    """Make the setting of the jobs to measure."""
    names = tuple(jobs)
    text = f"of {','.join(names)} (default: all)"
    return setting(names, text, choices=names, metavar="JOB,...")


def run_benchmark(
    kind: type[Kind],
    measure: Callable[[Kind], object],
    argv: Sequence[str] | None,
    name: str,
    description: str,
) -> int:
    """Parse the flags, print what the numbers depend on, measure, and write JSON if asked.

    ``measure`` prints a table and returns the numbers. See `run_settings`.
    """

    def run(settings: Kind) -> None:
        device = pick_device(settings.device, threads=settings.threads or 0)
        settings = replace(settings, device=str(device))
        print(machine(settings.device), flush=True)
        results = measure(settings)
        if settings.json is not None:
            content = {"machine": machine(settings.device), "results": results}
            with atomic_path(settings.json) as temporary:
                temporary.write_text(json.dumps(content, indent=1))

    prog = f"python -m benchmarks.{name}"
    return run_settings(kind, run, argv, prog=prog, description=description)


def interleaved(
    variants: Variants,
    rounds: int = 7,
    device: str = "cpu",
    least: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time variants in turn, so that whatever slows the machine down slows all of them.

    Args:
        variants: functions without arguments by name.
        rounds: how often each is timed; a median of fewer than 5 says little. One more warms up.
        device: "cuda" waits for the GPU before the clock is read.
        least: seconds that one timing should take; short functions are called several times.
        clock: seconds, e.g. `time.thread_time` to leave out what other processes took of a core.
    """
    return {k: t for k, (t,) in interleaved_by((clock,), variants, rounds, device, least).items()}


def interleaved_by(
    clocks: Sequence[Callable[[], float]],
    variants: Variants,
    rounds: int = 7,
    device: str = "cpu",
    least: float = 0.02,
) -> dict[str, list[Timing]]:
    """Time variants as `interleaved` does, by several clocks at once; a timing for each."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def seconds(function: Callable[[], object], calls: int) -> list[float]:
        wait()
        starts = [clock() for clock in clocks]
        for _ in range(calls):
            function()
        wait()
        return [(clock() - start) / calls for clock, start in zip(clocks, starts, strict=True)]

    calls = {}
    for name, function in variants.items():
        seconds(function, 1)
        calls[name] = max(1, round(least / max(*seconds(function, 1), 1e-6)))
    times: dict[str, list[list[float]]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in variants.items():
                times[name].append(seconds(function, calls[name]))
    finally:
        gc.enable()
    return {
        name: [Timing(statistics.median(v), min(v), max(v)) for v in zip(*found, strict=True)]
        for name, found in times.items()
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Make a Markdown table, columns aligned."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def milliseconds(timing: Timing) -> str:
    """Format median and range, e.g. ``2.31 (2.20-2.95)``."""
    median, low, high = (1e3 * t for t in (timing.median, timing.fastest, timing.slowest))
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def machine(device: str) -> dict[str, object]:
    """Tell what the numbers depend on."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith("model name"):
            name = line.partition(": ")[2]
            break
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    memory = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
    return {
        "device": device,
        "processor": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "malloc": memory,
    }
