"""Processes that work for this one, and end with it."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process

from Util import control_groups


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however it did.

    Otherwise one whose parent was killed may wait for ever to hand over its result. Does nothing in
    a process that no other started.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker() -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the parent, and end with it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def cores() -> int:
    """Cores that this process may use, or as many as its container has the time of."""
    linux = hasattr(os, "sched_getaffinity")
    own = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return min(own, control_groups.processors() or own)


def worker_pool(workers: int | None) -> ProcessPoolExecutor:
    """Make a pool of processes.

    Spawned, not forked: a fork of a process that has used threads, as PyTorch does, may hang.

    Args:
        workers: processes; None: one for each core.
    """
    return ProcessPoolExecutor(workers or cores(), get_context("spawn"), start_worker)
