"""Writing files so that a reader sees the old content or the whole new one; reading within bounds.

Nothing here needs PyTorch, which processes that only encode images do not load.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = ".tmp-cagan-"
"""Names of unfinished files begin with it: hidden, so no reader takes one for a result."""

LOCK = ".lock"
"""Name of the file by which a folder is reserved."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends well.

    On an error the temporary file is removed and ``path`` keeps what it had. What a killed process
    left in the folder is removed by the next call. Without ``flush`` the file may be empty after a
    power failure and left-overs stay; for files that are many and cheap to make again.

    Raises:
        OSError: the file could not be written; names it.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if flush:
            remove_left_overs(target.parent)
        handle, temporary = _locked_temporary(target)
        try:
            yield temporary
            if flush:
                os.fsync(handle)
            # mkstemp makes files private; a result gets the permissions of any new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, target)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path}: could not be written ({reason})") from error


def _locked_temporary(target: Path) -> tuple[int, Path]:
    """A new file beside the target, locked for as long as its handle is open."""
    while True:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=PREFIX, suffix=f"-{target.name[-100:]}"
        )
        _try_lock(handle)
        if os.fstat(handle).st_nlink:  # else taken for a left-over before it was locked
            return handle, Path(name)
        os.close(handle)


def _try_lock(handle: int) -> bool | None:
    """Lock an open file or folder for this process; False if another one holds it.

    The lock ends with the process, however that ends. None where the file system has no locks: then
    there is no protection, and nothing may be taken for left behind.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_left_overs(folder: Path) -> None:
    """Remove temporary files of processes that were killed; those being written are locked."""
    for file in folder.glob(f"{PREFIX}*"):
        try:
            # Over NFS, only what is open for writing can be locked.
            handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if stat.S_ISREG(os.fstat(handle).st_mode) and _try_lock(handle):
                file.unlink(missing_ok=True)
        finally:
            os.close(handle)


def lock_folder(folder: Path) -> int | None:
    """Reserve a folder for this process until the returned handle is closed or the process ends.

    What is locked is a hidden file in it, which stays: over NFS, the lock of a folder itself is
    known to its own node alone.

    Returns:
        The handle; None if another process has reserved the folder.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    if _try_lock(handle) is not False:
        return handle
    os.close(handle)
    return None


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in such a block for the folder.

    Nothing is left in it. It is for moments and for what costs little when two nodes of a shared
    folder collide; what is reserved for long is reserved by `lock_folder`.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def unpacked_size(file: Path) -> int:
    """Bytes that the members of a zip archive claim to hold; nothing is unpacked.

    Raises:
        ValueError: no zip archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"no whole zip archive ({error})") from None


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read NumPy arrays without running any code of the file or filling the memory with zeros.

    Raises:
        ValueError: the file is missing, damaged, holds objects, or swells beyond all measure.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError("no such file")
    limit = 2**26 + 16 * file.stat().st_size
    if unpacked_size(file) > limit:
        raise ValueError(f"refused, it would unpack to more than {limit / 2**20:,.0f} MiB")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no readable .npz ({reason})") from None
