"""Progress of long work on standard error: a bar on a terminal, elsewhere a line now and then.

Nothing of it where `quietly` is in force; warnings always.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines, at least."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
Item = TypeVar("Item")


@contextmanager
def quietly(on: bool = True) -> Iterator[None]:
    """Show no progress within the block."""
    token = _quiet.set(on)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether `quietly` is in force."""
    return _quiet.get()


def is_terminal() -> bool:
    """Whether someone may be watching standard error."""
    return sys.stderr.isatty()


def tell(text: str) -> None:
    """Say on standard error what goes on, above a bar if there is one."""
    if not is_quiet():
        warn(text)


def show(text: str) -> None:
    """Print a result on standard output, above a bar if there is one."""
    tqdm.write(text, file=sys.stdout)


def warn(text: str) -> None:
    """Say something on standard error that is said in any case."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """A length of time in words, such as ``8 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """Shows how far some work has come while the block runs.

    Args:
        total: units of work.
        what: is done.
        unit: name of one unit.
        done: units done before.
        shown: False shows nothing, as in all processes but the first.
        leave: keep the full bar in sight.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "it",
        *,
        done: int = 0,
        shown: bool = True,
        leave: bool = True,
    ) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, done
        shown = shown and not is_quiet()
        self._bar: tqdm | None = None
        self._lines = shown and not is_terminal()
        if shown and not self._lines:
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                unit=unit,
                leave=leave,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        self._figures = ""
        self._start = self._last = time.monotonic()
        self._last_done = done

    def update(self, n: int = 1) -> None:
        """Note that ``n`` more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._lines and self.done < self.total and time.monotonic() - self._last >= EVERY:
            self._print_line()

    def figures(self, text: str) -> None:
        """Show this beside the progress from now on."""
        self._figures = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def _print_line(self) -> None:
        now = time.monotonic()
        each = (now - self._last) / max(self.done - self._last_done, 1)
        rate = f"{each:.1f} s/{self.unit}" if each > 1 else f"{1 / each:.1f} {self.unit}/s"
        words = [f"{self.what}: {self.done} of {self.total} {self.unit}", rate]
        words.append(f"{duration(each * (self.total - self.done))} left")
        warn(", ".join([*words, *([self._figures] if self._figures else [])]))
        self._last, self._last_done = now, self.done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.leave = self._bar.leave and kind is None
            self._bar.close()
        elif self._lines and kind is None and time.monotonic() - self._start >= EVERY:
            taken = duration(time.monotonic() - self._start)
            warn(f"{self.what}: {self.done} of {self.total} {self.unit} in {taken}")


def track(items: Iterable[Item], total: int, what: str, unit: str = "it") -> Iterator[Item]:
    """Go through items, each of which is one unit of work."""
    with Progress(total, what, unit, shown=total > 0) as progress:
        for item in items:
            yield item
            progress.update()
