"""What the scripts' command lines share."""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage. Has --debug."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--debug", action="store_true", help="show where in the code an error came up"
        )

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(message: object) -> str:
    """The text of a message without line breaks."""
    return " ".join(str(message).splitlines())


def run_script(
    parser: OneLineParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, and turn what a user can cause into one line on standard error.

    Args:
        parser: of the command line.
        run: the script; returns its exit code, None for 0.
        argv: the command line; None takes that of the process.

    Returns:
        The exit code: 2 after bad input, lack of memory or a full disk, 130 after Ctrl-C.
    """
    args = parser.parse_args(argv)
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if args.debug or not _explains_itself(error):
            raise
        print(f"{parser.prog}: error: {_explanation(error)}", file=sys.stderr)
        return 2


def _lacks_memory(error: Exception) -> bool:
    """Whether Python, NumPy or PyTorch (on any device) got no memory."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "allocate memory" in str(error)


def _explains_itself(error: Exception) -> bool:
    # Other RuntimeErrors are PyTorch's or Python's own: mistakes in this code, not in the input.
    return type(error) is not RuntimeError or _lacks_memory(error)


def _explanation(error: Exception) -> str:
    if _lacks_memory(error):
        return f"out of memory ({one_line(error)[:200]}); take smaller batches or a smaller --size"
    return one_line(error) or type(error).__name__


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put a flag's name before the message of any ValueError from the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def file_path(text: str) -> Path:
    """Argument type: a path; an empty one, as of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return Path(text)


def check_writable(flag: str, target: Path) -> None:
    """Find out before the work that its result could not be written.

    Raises:
        ValueError: names the flag and the folder.
    """
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{flag} {target}: {parent} is no folder; name another place")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{flag} {target}: nothing can be written in {parent} ({reason}); name another place"
        ) from None


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


def positive(text: str) -> float:
    """Argument type: a finite number above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


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
