"""Timings that hold on a busy machine: variants take turns, and medians and ranges are reported."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Variants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, fastest and slowest round."""

    median: float
    fastest: float
    slowest: float


def parser(description: str, jobs: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Flags that every benchmark takes, and --only, a list, where there are jobs to choose from."""
    flags = argparse.ArgumentParser(description=description)
    names = list(jobs)

    def some(text: str) -> list[str]:
        for name in text.split(","):
            if name not in names:
                choice = ", ".join(names)
                raise argparse.ArgumentTypeError(f"{name}: no such job; choose from {choice}")
        return text.split(",")

    if names:
        help_text = ", ".join(names)
        flags.add_argument("--only", type=some, default=names, metavar="JOB,...", help=help_text)
    flags.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    flags.add_argument("--rounds", type=int, default=7, metavar="N", help="at least 5")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    return flags


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
        rounds: how often each is timed, at least 5; one more warms up.
        device: "cuda" waits for the GPU before the clock is read.
        least: seconds that one timing should take; short functions are called several times.
        clock: seconds, e.g. `time.thread_time` to leave out what other processes took of a core.

    Raises:
        ValueError: fewer than 5 rounds.
    """
    if rounds < 5:
        raise ValueError(f"a median of {rounds} rounds says little; take at least 5")
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def seconds(function: Callable[[], object], calls: int) -> float:
        wait()
        start = clock()
        for _ in range(calls):
            function()
        wait()
        return (clock() - start) / calls

    calls = {}
    for name, function in variants.items():
        seconds(function, 1)
        calls[name] = max(1, round(least / max(seconds(function, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in variants.items():
                times[name].append(seconds(function, calls[name]))
    finally:
        gc.enable()
    return {k: Timing(statistics.median(v), min(v), max(v)) for k, v in times.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns aligned."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def milliseconds(timing: Timing) -> str:
    """Median and range, e.g. ``2.31 (2.20-2.95)``."""
    median, low, high = (1e3 * t for t in (timing.median, timing.fastest, timing.slowest))
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def machine(device: str) -> dict[str, object]:
    """What the numbers depend on."""
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


def write_json(path: Path | None, device: str, results: object) -> None:
    """Write the machine and the results, if there is a file to write to."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1))
