"""How many threads a CPU computes with: as the user says, else as many as there are idle cores.

A network of small tensors shares out thousands of pieces of work a second among its threads and
waits for all of them each time. A thread whose core another process holds makes all others wait,
so that two threads can be ten times slower than one.
"""

import functools
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from Util.workers import cores

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
STATISTICS = Path("/proc/stat")
INTERVAL = 0.2
"""Seconds that the cores are watched: 20 ticks of Linux's clock."""


def use_threads(chosen: int = 0) -> None:
    """Set the number of threads; 0 leaves the choice to `leave_busy_cores`."""
    if chosen:
        torch.set_num_threads(chosen)
    else:
        leave_busy_cores()


@functools.cache
def leave_busy_cores() -> None:
    """Let PyTorch use no more threads than there are idle cores to be used, at least one.

    Cached: a process looks once. A number that the user has chosen (`VARIABLES`,
    ``torch.set_num_threads(1)``) stays, as does PyTorch's own where the system tells no times.
    """
    before = torch.get_num_threads()
    if before == 1 or any(os.environ.get(name) for name in VARIABLES):
        return
    most, idle = min(before, cores()), idle_cores()
    threads = most if idle is None else threads_for(idle, most)
    if threads < before:
        torch.set_num_threads(threads)
    if threads == most:
        return
    print(
        f"{threads} of {most} threads, since other processes hold the cores; OMP_NUM_THREADS"
        " chooses another number",
        file=sys.stderr,
        flush=True,
    )


def threads_for(idle: float, most: int) -> int:
    """Return the number of threads for so many idle cores: rounded, in [1, most]."""
    return min(most, max(1, round(idle)))


def idle_cores(interval: float = INTERVAL) -> float | None:
    """Watch the cores that this process may use while it sleeps.

    Args:
        interval: seconds.

    Returns:
        How many of them were idle, on average; None where the system does not tell (Linux only).
    """
    before = _times()
    time.sleep(interval)
    after = _times()
    if before is None or after is None:
        return None
    idle, all_ = (new - old for new, old in zip(after, before, strict=True))
    return idle / all_ * len(os.sched_getaffinity(0)) if all_ > 0 else None


def _times() -> tuple[int, int] | None:
    """Ticks since the start of the system that this process's cores were idle, and all of them."""
    try:
        text = STATISTICS.read_text()
        own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    return sum_times(text.splitlines(), own)


def sum_times(lines: Iterable[str], cores: set[str]) -> tuple[int, int]:
    """Add up idle and all ticks of some cores in the lines of /proc/stat (proc(5))."""
    idle = total = 0
    for line in lines:
        name, *ticks = line.split()
        if name in cores:
            user, nice, system, rest, waiting, *others = map(int, ticks[:8])
            idle += rest + waiting
            total += user + nice + system + rest + waiting + sum(others)
    return idle, total
