"""Signals that end a run with a checkpoint, or ask it for one."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

from Util import distributed

PATIENCE = 60.0
"""Seconds in which a repeated signal is an echo: launchers and schedulers send several."""
ECHO = 1.0
"""The same for SIGINT, which comes from the keyboard and may be meant."""


class StoppedError(Exception):
    """Work was left unfinished because the end has been asked for."""


class StopRequest:
    """While the block runs, signals are noted instead of ending the process.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for the end, SIGUSR2 for a checkpoint. Which one a
    scheduler sends and how often is its affair, so that repeated signals are ignored for a minute;
    a second Ctrl-C after the first one's second, or any signal after that minute, ends the process
    at once, as if there were no such block.

    Attributes:
        signal: number of the signal that asked for the end, or 0.
        save: a checkpoint has been asked for.
    """

    STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    SAVE = signal.SIGUSR2

    def __init__(self) -> None:
        self.signal, self.save = 0, False
        self._since = 0.0

    def __enter__(self) -> Self:
        # A run under nohup outlives its terminal.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [n for n in self.STOP if not (ignored and n == signal.SIGHUP)]
        self._before = {n: signal.signal(n, self._note) for n in (*numbers, self.SAVE)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.SAVE:
            self.save = True
        elif not self.signal:
            self.agree(number)
        elif time.monotonic() - self._since > (ECHO if number == signal.SIGINT else PATIENCE):
            self._restore()
            signal.raise_signal(number)

    def agree(self, number: int) -> None:
        """Take the end as asked for by a signal; one that other processes got may come here yet."""
        if not self.signal:
            self._since = time.monotonic()
        self.signal = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After another process's failure, the launcher's SIGTERM would cut the message short.
        if kind is None or not distributed.launched():
            self._restore()

    def __call__(self) -> bool:
        """Whether a signal has asked for the end."""
        return self.signal != 0
