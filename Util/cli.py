"""What the scripts' command lines share."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from Util import progress
from Util.settings import (
    Kind,
    SettingError,
    Settings,
    add_flags,
    check_files,
    file_path,
    from_flags,
)

PACKAGES = ("Compression", "Dataset", "Evaluation", "Model", "Util")
"""Whose own errors explain themselves."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage. Has --debug and --quiet."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--quiet",
            action="store_true",
            help="show no progress; results, warnings and errors only",
        )
        self.add_argument(
            "--debug", action="store_true", help="show where in the code an error came up"
        )

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        if found := re.fullmatch(r"argument (--\w+): expected .*one argument", message):
            message += f"; one that begins with a minus is written {found[1]}=-..."
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(message: object) -> str:
    """The text of a message without line breaks."""
    return " ".join(str(message).splitlines())


class _Lasting:
    """A stream that, once its reader has gone (``| head -1``), swallows what is written to it.

    So the work goes on to its result, whoever listens.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """See `io.IOBase`."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            # What is still to come goes nowhere, also what Python flushes at its exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OSError(f"{self._stream.name}: {error.strerror}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _lasting_output() -> Iterator[None]:
    """Let standard output and standard error outlast their readers."""
    # Python has none where the shell has closed it.
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    out, err = _Lasting(sys.stdout or nowhere), _Lasting(sys.stderr or nowhere)
    with nowhere, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk, which has been reported
                out.flush()


@contextmanager
def _short_warnings(prog: str) -> Iterator[None]:
    """Show warnings in a line each, above a bar, without the place in the code."""

    def show(message: Warning | str, *where: Any, **further: Any) -> None:
        progress.warn(f"{prog}: warning: {one_line(message)}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def if_interrupted(text: Callable[[], str]) -> Iterator[None]:
    """Say what is kept and how to go on, after a Ctrl-C within the block.

    Args:
        text: makes the words then; empty ones add nothing.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if note := text():
            stop.add_note(note)
        raise


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
    with _lasting_output():
        args = parser.parse_args(argv)
        try:
            with (
                progress.quietly(args.quiet),
                _short_warnings(parser.prog),
                _ending_together(parser),
            ):
                code = run(args) or 0
                sys.stdout.flush()
            return code
        except KeyboardInterrupt as stop:
            notes = getattr(stop, "__notes__", ["no result has been written"])
            print(f"\n{parser.prog}: interrupted; {'; '.join(notes)}", file=sys.stderr)
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
        settings = from_flags(kind, vars(parser.parse_args(argv)), options)
        check_files(settings)
        return run(settings)

    return run_script(parser, run_with, argv)


def run_conversion(
    kind: type[Kind],
    convert: Callable[[Path, Path, Kind], Iterable[str]],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    epilog: str,
    source: tuple[str, str],
) -> int:
    """`run_script` for a command line that makes a checkpoint of another file.

    Args:
        kind: dataclass whose fields are the flags.
        convert: source, target and settings -> lines to print.
        argv: the command line; None takes that of the process.
        prog: the script's name.
        description: what it does.
        epilog: examples.
        source: what stands for the file in the help text, and what it is.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=file_path, metavar=source[0], help=source[1])
    parser.add_argument("target", type=file_path, metavar="OUT.pt", help="checkpoint to write")
    add_flags(parser, kind)

    def run(args: argparse.Namespace) -> None:
        print("\n".join(convert(args.source, args.target, from_flags(kind, vars(args)))))

    return run_script(parser, run, argv)


def check_target(source: Path, target: Path) -> None:
    """Refuse a result that would be a folder or take its source's place.

    Raises:
        ValueError: names the target.
    """
    if target.is_dir() or target.resolve() == source.resolve():
        raise ValueError(f"{target}: cannot be the result; name another file")


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
    """Find out before the work that a setting's file could not be written.

    Raises:
        SettingError: names the setting and the folder.
    """
    if target.is_dir():
        raise SettingError(name, f"{target} is a folder; name a file in it")
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
