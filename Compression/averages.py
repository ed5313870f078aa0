"""Means of a run's metrics between two lines of its log."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from Util import distributed


class Averages:
    """Means of the metrics since the last line of the log, without waiting for the device."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._images, self._since = 0, time.perf_counter()

    def begin(self) -> None:
        """Count the time of the speed from now on."""
        self._since = time.perf_counter()

    def add(self, metrics: Mapping[str, Tensor], images: int) -> None:
        """Take one iteration's metrics."""
        for key, value in metrics.items():
            self._values.setdefault(key, []).append(value)
        self._images += images

    def flush(self) -> dict[str, float]:
        """Return the means over iterations and processes, and the speed; start afresh."""
        keys = list(self._values)
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        result = dict(zip(keys, distributed.average(means).tolist(), strict=True))
        result["images_per_second"] = self._images / (time.perf_counter() - self._since)
        self._clear()
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count as training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def state(self) -> dict[str, list[float]]:
        """The values so far, so that a resumed run writes the same line."""
        return {key: torch.stack(values).tolist() for key, values in self._values.items()}

    def load(self, values: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Take up `state`."""
        self._clear()
        self._values = {k: list(torch.tensor(v, device=device)) for k, v in values.items()}
