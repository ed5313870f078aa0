"""Seconds that the parts of an iteration take, on a GPU without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Times named parts of a program; on a GPU by events that it passes, read when asked for.

    Args:
        device: where the work is done.

    Attributes:
        running: False times nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.running, self._on_gpu = True, device.type == "cuda"
        self._parts: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block."""
        if not self.running:
            yield
            return
        start = self._now()
        yield
        self._parts.setdefault(name, []).append((start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def flush(self) -> dict[str, float]:
        """Give the mean seconds of each part, ``seconds_NAME``, and start afresh."""
        if self._on_gpu:
            torch.cuda.synchronize()
        means = {
            f"seconds_{name}": sum(self._between(*pair) for pair in pairs) / len(pairs)
            for name, pairs in self._parts.items()
        }
        self._parts = {}
        return means

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
