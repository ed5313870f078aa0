"""Peak memory of the tool's jobs against the original's formulations (`benchmarks.jobs`).

``python -m benchmarks.memory [--only JOB,...]``. Every formulation runs twice in a process of its
own; what counts is how far the process's resident memory rises above what it was with all networks
made and nothing computed.
"""

import ctypes
import gc
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.jobs import JOBS
from benchmarks.timing import machine, parser, table, write_json
from Util.device import peak_memory_gib, pick_device

SIDES = ("textbook", "ours")


def resident_gib() -> float:
    """Memory that this process needs now (Linux with glibc): what was freed is given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


def rise(job: str, index: int, side: str, threads: int) -> tuple[str, float] | None:
    """Name of a job's pair and the memory one formulation takes; None if there is no such pair."""
    device = pick_device("cpu")
    torch.set_num_threads(threads)
    pair = next(itertools.islice(JOBS[job](), index, None), None)
    if pair is None:
        return None
    before = resident_gib()
    for _ in range(2):
        getattr(pair, side)()
    return pair.name, peak_memory_gib(device) - before


def measured(job: str, threads: int) -> list[dict[str, Any]]:
    """Both formulations of every pair of a job."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON if asked."""
    flags = parser("Peak memory of the tool's jobs against the original's formulations.")
    flags.add_argument("--only", default=",".join(JOBS), metavar="JOB,...", help=", ".join(JOBS))
    options = flags.parse_args(argv)
    names = options.only.split(",")
    for name in names:
        if name not in JOBS:
            flags.error(f"--only {name}: no such job; choose from {', '.join(JOBS)}")
    results = [result for name in names for result in measured(name, options.threads)]
    print(machine("cpu"))
    rows = [
        [r["job"], *(f"{r[side]:.2f}" for side in SIDES), f"{r['ours'] / r['textbook']:.2f}"]
        for r in results
    ]
    print(table(("job", "textbook GiB", "ours GiB", "ours / textbook"), rows))
    write_json(options.json, "cpu", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
