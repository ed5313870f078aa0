"""Processes that work for this one, and end with it."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


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


def worker_pool(
    workers: int | None, start: Callable[[], None] = end_with_parent
) -> ProcessPoolExecutor:
    """Make a pool of processes.

    Spawned, not forked: a fork of a process that has used threads, as PyTorch does, may hang.

    Args:
        workers: processes; None: one for each core.
        start: what each does first; it should call `end_with_parent`.
    """
    return ProcessPoolExecutor(workers, get_context("spawn"), start)
