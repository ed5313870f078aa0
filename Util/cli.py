"""What the scripts' command lines share."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put a flag's name before the message of any ValueError from the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def at_least(low: int) -> Callable[[str], int]:
    """Argument type: an integer that is not below a limit."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is not at least {low}")
        return value

    return integer


def fraction(low_open: bool = False, high_open: bool = False) -> Callable[[str], float]:
    """Argument type: a number in [0, 1], without 0 or 1 where the end is open."""
    interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"

    def number(text: str) -> float:
        value = float(text)
        inside = 0 <= value <= 1 and not ((low_open and value == 0) or (high_open and value == 1))
        if not inside:
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value

    return number


def boolean(text: str) -> bool:
    """Argument type: True or False; ``bool("False")`` would be true."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def integers(text: str) -> tuple[int, ...]:
    """Argument type: integers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not integers separated by commas") from None
