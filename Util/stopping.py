"""Ending a run on SIGINT or SIGTERM after the iteration it is in."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """While the block runs, the first SIGINT or SIGTERM is noted instead of ending the process.

    A second signal ends it at once, as if there were no such block.

    Attributes:
        signal: number of the signal that came, or 0.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.signal != 0
