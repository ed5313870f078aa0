"""Make an LMDB of training images from a folder.

Every encoding process imports this module, so it must not import PyTorch.
"""

import hashlib
import io
import shutil
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
from PIL import Image

from Dataset import DatasetError
from Dataset.pictures import FILTERS, UnreadableImageError, fit_square, read_image
from Dataset.sources.folder import Folder
from Dataset.sources.lmdb import LENGTH_KEY, STATE_KEY, State, image_key, open_environment
from Util.cli import check_writable, if_interrupted, run_settings
from Util.progress import Progress, warn
from Util.settings import SettingError, Settings, blame, setting
from Util.workers import cores, worker_pool

MAP_SIZE = 2**30
"""Of a new LMDB, in bytes; doubled whenever it is full. The file takes only what it holds."""
CHUNK_PIXELS = 2**22
"""Encoded per job and transaction: bounds the memory and what an interruption loses."""
KEPT = "what is written is kept: the same command goes on from there"

Encoded = tuple[int, list[bytes]] | str
"""A picture's shorter side in px and its files, one per size; or why it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Settings):
    """What goes into an LMDB, and how it is stored."""

    path: Path = setting(
        ..., "folder of images, searched recursively", metavar="DIR", exists="folder"
    )
    out: Path = setting(..., "folder of the LMDB, new or unfinished", metavar="LMDB")
    size: tuple[int, ...] = setting(..., "sides in pixels: 128,256", metavar="N,...")
    resample: str = setting(
        "bilinear", "filter that resizes; bilinear is the original's", choices=FILTERS
    )
    workers: int | None = setting(None, "processes (default: one per core)", low=1)
    format: str = setting(
        "png", "png keeps the exact pixels, jpeg is smaller and faster", choices=("png", "jpeg")
    )
    quality: int | None = setting(None, "of jpeg, 1 to 100 (default: 100)", low=1, high=100)
    max_bad: int = setting(10, "unreadable images to leave out before giving up", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.size or min(self.size) < 1:
            raise SettingError("size", "must be one or more positive integers separated by commas")
        if self.quality and self.format != "jpeg":
            raise SettingError("quality", f"{self.quality}: goes with the format jpeg only")

    @property
    def sizes(self) -> list[int]:
        """Sides in pixels, each once, smallest first."""
        return sorted(set(self.size))

    @property
    def jpeg_quality(self) -> int | None:
        """Quality of the JPEG files; None for PNG."""
        return (self.quality or 100) if self.format == "jpeg" else None

    def encode(self, image: Image.Image) -> list[bytes]:
        """Encode one image in each of the ``sizes``."""
        # Full colour resolution: the JPEG default halves it even at quality 100.
        options = {"quality": self.jpeg_quality, "subsampling": 0} if self.jpeg_quality else {}
        files = []
        for size in self.sizes:
            buffer = io.BytesIO()
            fit_square(image, size, self.resample).save(buffer, format=self.format, **options)
            files.append(buffer.getvalue())
        return files


def prepare(settings: PrepareSettings, progress: bool = True) -> State:
    """Write a folder's images to an LMDB; go on where an interrupted call stopped.

    An index is the position among the readable files of `Folder`. The key ``length`` is written
    last.

    Args:
        settings: what to store, and how.
        progress: show a bar.

    Returns:
        What was done, with the names of unreadable files.

    Raises:
        SettingError: a path cannot be used, the LMDB was made otherwise, too many files are
            unreadable, or the disk is full.
        DatasetError: a worker was killed.
    """
    out = settings.out
    with blame("path"):
        names = Folder(settings.path).files
    try:
        with blame("out"), _open(out) as env:
            state = _resume(out, env, _record(settings, names))
            try:
                _check_bad(settings, state)
                _write_missing(env, state, settings, names, progress)
            except lmdb.Error as error:
                # A full disk may show as "Input/output error", hence the free space.
                free = f"{shutil.disk_usage(out).free / 1e6:.1f} MB free on its disk"
                raise DatasetError(f"{out}: {error}, with {free}; {KEPT}") from None
    except BrokenProcessPool:
        why = "a worker was killed, perhaps for want of memory (fewer workers take less)"
        raise DatasetError(f"{why}; {KEPT}") from None
    return state


def _record(settings: PrepareSettings, names: list[str]) -> dict[str, Any]:
    """List what the content of an LMDB depends on; files as a hash of their names and sizes."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = (settings.path / name).stat().st_size
        except OSError:
            size = -1  # will be reported as unreadable
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return {
        "sizes": settings.sizes,
        "format": settings.format,
        "quality": settings.jpeg_quality,
        "resample": settings.resample,
        "files": len(names),
        "files_sha256": digest.hexdigest(),
    }


def _open(out: Path) -> lmdb.Environment:
    """Open or create the LMDB for writing.

    Raises:
        DatasetError: the place holds something else.
    """
    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    # A process killed at its very start leaves only the lock file.
    if out.is_file() or ("data.mdb" not in names and names - {"lock.mdb"}):
        raise DatasetError(f"{out} holds other files; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    return open_environment(out, map_size=MAP_SIZE)


def _resume(out: Path, env: lmdb.Environment, record: dict[str, Any]) -> State:
    """Return the state to go on from: a new one, or the stored one if its record is the same.

    Raises:
        DatasetError: the LMDB was made otherwise.
    """
    with env.begin() as transaction:
        state, entries = State.read(transaction, out), transaction.stat()["entries"]
    if state is None:
        if entries:
            raise DatasetError(
                f"{out} holds an LMDB that was not made by this command; name a new folder"
            )
        return State(record)
    for key, value in record.items():
        if state.settings.get(key) != value:
            if key == "files_sha256":
                difference = "of other files (names or sizes in bytes differ)"
            else:
                difference = f"with {key} {state.settings.get(key)}, not {value}"
            raise DatasetError(
                f"{out} holds an LMDB {difference}; name a new folder, or delete this one"
            )
    return state


def _check_bad(settings: PrepareSettings, state: State) -> None:
    """Stop where too many files are bad, or all.

    Raises:
        SettingError: names the first of them.
    """
    first = "; ".join(f"{name}: {reason}" for name, reason in state.bad[:10])
    if len(state.bad) > settings.max_bad:
        raise SettingError(
            "path",
            f"{settings.path}: more than {settings.max_bad} unreadable images: {first}; raise"
            " max_bad to go on without them, or mend them and start afresh in a new folder",
        )
    if state.complete and not state.length:
        for name in ("data.mdb", "lock.mdb"):  # the same command shall do once they are mended
            (settings.out / name).unlink(missing_ok=True)
        raise SettingError("path", f"{settings.path}: none of its images can be read: {first}")


def _write_missing(
    env: lmdb.Environment, state: State, settings: PrepareSettings, names: list[str], progress: bool
) -> None:
    """Encode and store the files that the state does not count as done."""
    if state.complete:
        return
    pixels = sum(size**2 for size in settings.sizes)
    step = min(max(CHUNK_PIXELS // pixels, 1), 256)
    chunks = [names[i : i + step] for i in range(state.done, len(names), step)]
    workers = min(settings.workers or cores(), len(chunks))
    bar = Progress(len(names), "encoding", "img", done=state.done, shown=progress)
    # Closed by hand, so that an error here stops the processes at once.
    with bar, closing(_encoded(settings, chunks, workers)) as encoded:
        for results in encoded:
            _store(env, state, names[state.done :][: len(results)], results)
            bar.update(len(results))
            _check_bad(settings, state)


def _encode_files(settings: PrepareSettings, names: list[str]) -> list[Encoded]:
    results: list[Encoded] = []
    for name in names:
        try:
            image = read_image(settings.path / name)
            results.append((min(image.size), settings.encode(image)))
        except UnreadableImageError as error:
            results.append(str(error))
    return results


def _encoded(
    settings: PrepareSettings, chunks: Iterable[list[str]], workers: int
) -> Generator[list[Encoded], None, None]:
    """Encode chunks of files in several processes; yield in order, with few chunks in memory."""
    waiting: deque[Future[list[Encoded]]] = deque()
    with worker_pool(workers) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_files, settings, chunk))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _store(
    env: lmdb.Environment, state: State, names: list[str], results: Sequence[Encoded]
) -> None:
    """Write a chunk's images together with the progress; names are those not yet done."""
    items = []
    for name, result in zip(names, results, strict=False):
        if isinstance(result, str):
            state.bad.append((name, result))
        else:
            side, files = result
            keys = [image_key(size, state.length) for size in state.settings["sizes"]]
            items += list(zip(keys, files, strict=True))
            state.sides = [min([side, *state.sides]), max([side, *state.sides])]
        state.done += 1
    items.append((STATE_KEY, state.to_bytes()))
    if state.complete:
        # Last of all, for a reader takes an LMDB that has it for a whole one.
        items.append((LENGTH_KEY, str(state.length).encode()))
    _commit(env, items)


def _commit(env: lmdb.Environment, items: Sequence[tuple[bytes, bytes]]) -> None:
    """Write all items or none, in a larger map if need be."""
    while True:
        try:
            with env.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def _run(settings: PrepareSettings) -> None:
    check_writable("out", settings.out / "data.mdb")
    with if_interrupted(lambda: "the same command goes on from here"):
        state = prepare(settings)
    for name, reason in state.bad:
        warn(f"prepare_data: warning: {name}: {reason}; left out")
    sizes = ", ".join(map(str, settings.sizes))
    print(f"{state.length} images of {sizes} px ({settings.format}) in {settings.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_settings(
        PrepareSettings,
        _run,
        argv,
        prog="python -m Dataset.prepare_data",
        description="Store a folder's images in an LMDB for train.py, resized to one or\n"
        "several sizes and cropped to a square. An interrupted run goes on where it stopped.",
        epilog="example: python -m Dataset.prepare_data --path FFHQ --out FFHQ_LMDB --size 256",
    )


if __name__ == "__main__":
    sys.exit(main())
