"""What the scripts' command lines share."""

import argparse
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from Util.settings import Kind, SettingError, Settings, add_flags, from_flags

PACKAGES = ("Compression", "Dataset", "Evaluation", "Model", "Util")
"""Whose own errors explain themselves."""


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
        with _ending_together(parser):
            return run(args) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if args.debug or not _explains_itself(error):
            raise
        print(f"{parser.prog}: error: {_explanation(error, parser)}", file=sys.stderr)
        return 2


@contextmanager
def _ending_together(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Leave the other processes after success; end this one at once after an error.

    Where there are others, an error is told with this process's number, and without unwinding any
    further: some process may be waiting for this one already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from Util import distributed  # PyTorch, which few command lines need

    try:
        yield
    except BaseException as error:
        # The launcher ends all processes once it sees that one has failed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told = _explains_itself(error) or isinstance(error, KeyboardInterrupt)
        if not told:
            traceback.print_exc()
        reason = f"{type(error).__name__}: {one_line(error)}"
        if told:
            reason = _explanation(error, parser)
        reason = distributed.explain(error, reason)
        print(f"{parser.prog}: error: {distributed.name()}: {reason}", file=sys.stderr)
        distributed.end_at_once((130 if isinstance(error, KeyboardInterrupt) else 2) if told else 1)
    distributed.leave()


def run_settings(
    kind: type[Kind],
    run: Callable[[Kind], int | None],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    epilog: str = "",
    options: Sequence[type[Settings]] = (),
    defaults: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda args: {},
) -> int:
    """`run_script` for a command line that is made of settings alone.

    Args:
        kind: dataclass whose fields are the flags.
        run: the script; returns its exit code, None for 0.
        argv: the command line; None takes that of the process.
        prog: the script's name.
        description: what it does.
        epilog: examples.
        options: further dataclasses whose fields are flags; they go to the field ``options``.
        defaults: of flags that are not given, by what is.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, kind, *options)

    def run_with(args: argparse.Namespace) -> int | None:
        parser.set_defaults(**defaults(args))
        return run(from_flags(kind, vars(parser.parse_args(argv)), options))

    return run_script(parser, run_with, argv)


def _lacks_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch (on any device) got no memory."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or "allocate memory" in str(error):
        return True
    # The words of CUDA itself and of its libraries.
    known = ("out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in known)


def _explains_itself(error: BaseException) -> bool:
    """Whether an error's text tells a user what to do; else its place in the code is needed too.

    Of RuntimeErrors, our own do; PyTorch's, CUDA's and nccl's are mistakes here or on the machine.
    """
    if isinstance(error, RuntimeError):
        return type(error).__module__.partition(".")[0] in PACKAGES or _lacks_memory(error)
    return isinstance(error, ValueError | OSError | FloatingPointError | MemoryError)


def _less_memory(parser: argparse.ArgumentParser) -> str:
    """What to do about a lack of memory, by flags that the command has."""
    flags = set(re.findall(r"--\w+", parser.format_usage()))
    for candidates in (("--batch_size", "--batch_gpu", "--fid_batch"), ("--n_sample", "--size")):
        if known := [flag for flag in candidates if flag in flags]:
            return f"lower {' or '.join(known)}"
    return "end what else takes memory on this machine"


def _explanation(error: BaseException, parser: argparse.ArgumentParser) -> str:
    if _lacks_memory(error):
        return f"out of memory ({one_line(error)[:200]}); {_less_memory(parser)}"
    flag = "--" if isinstance(error, SettingError) else ""
    return flag + one_line(error) or type(error).__name__


def check_writable(name: str, target: Path) -> None:
    """Find out before the work that the result of a setting could not be written.

    Raises:
        SettingError: names the setting and the folder.
    """
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise SettingError(name, f"{target}: {parent} is no folder; name another place")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise SettingError(
            name, f"{target}: nothing can be written in {parent} ({reason}); name another place"
        ) from None


def listed(table: Mapping[str, Any]) -> str:
    """Names and descriptions of a table's entries, one a line, for a help text."""
    width = max(map(len, table))
    return "\n".join(f"  {name:<{width}}  {item.description}" for name, item in table.items())
