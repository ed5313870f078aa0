"""Peak memory of the tool's jobs against the original's formulations (`benchmarks.jobs`).

``python -m benchmarks.memory [--only JOB,...]``. Every formulation runs twice in a process of its
own; what counts is how far the process's resident memory rises above what it was with all networks
made and nothing computed.

``--fake`` counts from shapes what training and evaluation take at 256 and 1024 px
(`benchmarks.fake_memory`).
"""

import ctypes
import gc
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import fake_memory
from benchmarks.jobs import JOBS
from benchmarks.timing import Measurement, run_benchmark, some_of, table
from Util.device import pick_device
from Util.settings import setting

SIDES = ("textbook", "ours")


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Measurement):
    """Which jobs are measured."""

    only: tuple[str, ...] = some_of(JOBS)
    fake: bool = setting(
        False, "count from shapes, without computing, what training and evaluation take instead"
    )


def resident_gib() -> float:
    """Measure what this process needs now (Linux with glibc), freed memory given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line for line in lines if line.startswith(entry)).split()[1]
    return int(kibibytes) / 2**20


def rise(job: str, index: int, side: str, threads: int | None) -> tuple[str, float] | None:
    """Measure the memory one formulation of a job's pair takes; None without such a pair."""
    pick_device("cpu", threads=threads or 0)
    pair = next(itertools.islice(JOBS[job](), index, None), None)
    if pair is None:
        return None
    before = resident_gib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the networks
    for _ in range(2):
        getattr(pair, side)()
    return pair.name, _status("VmHWM") - before


def measured(job: str, threads: int | None) -> list[dict[str, Any]]:
    """Measure both formulations of every pair of a job."""
    results: list[dict[str, Any]] = []
    for index in itertools.count():
        found: dict[str, Any] = {}
        for side in SIDES:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                result = pool.submit(rise, job, index, side, threads).result()
            if result is None:
                return results
            found["job"], found[side] = result
        results.append(found)
        print(found, file=sys.stderr, flush=True)
    return results


def measure(settings: MemorySettings) -> object:
    """Print a table of the jobs; return its figures."""
    if settings.fake:
        return fake_memory.report()
    results = [found for job in settings.only for found in measured(job, settings.threads)]
    rows = [
        [r["job"], *(f"{r[side]:.2f}" for side in SIDES), f"{r['ours'] / r['textbook']:.2f}"]
        for r in results
    ]
    print(table(("job", "textbook GiB", "ours GiB", "ours / textbook"), rows))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Peak memory of the tool's jobs against the original's formulations."
    return run_benchmark(MemorySettings, measure, argv, "memory", what)


if __name__ == "__main__":
    sys.exit(main())
