"""Make an LMDB of training images from a folder; also what the readers of both share.

Every encoding process imports this module, so it must not import PyTorch.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import lmdb
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from Util.cli import OneLineParser, check_writable, run_script
from Util.settings import at_least, integers

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LENGTH_KEY = b"length"
STATE_KEY = b"prepare_data"
"""Settings and progress as JSON, beside the keys of the StyleGAN2-PyTorch family."""
MAP_SIZE = 2**30
"""Of a new LMDB, in bytes; doubled whenever it is full. The file takes only what it holds."""
CHUNK_PIXELS = 2**22
"""Encoded per job and transaction: bounds the memory and what an interruption loses."""


class DatasetError(ValueError):
    """A data set cannot be used; the message names the path, what was found and what to do."""


class UnreadableImageError(ValueError):
    """An image is missing, damaged, of an unknown format or absurdly large; says which of these."""


def image_files(folder: str | os.PathLike[str]) -> list[str]:
    """Find a folder's images, recursively.

    Hidden files and folders are left out (they are other programs' leftovers), links to folders
    are not followed.

    Returns:
        Paths relative to the folder, in the same order everywhere.

    Raises:
        DatasetError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: cannot be read ({error.strerror})")

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(os.path.relpath(os.path.join(place, name), folder))
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return [path.as_posix() for path in sorted(found)]


def read_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Decode an image file as a viewer shows it, as RGB.

    Of an animation the first picture; turned as its EXIF data say; transparent parts on white; 16
    bits a channel reduced to 8.

    Raises:
        UnreadableImageError: it is missing, damaged, truncated or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            # Of oddities in the file, and of large pictures; absurdly large ones are an error.
            warnings.simplefilter("ignore")
            with Image.open(source) as file:
                return _as_rgb(ImageOps.exif_transpose(file))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "unknown format or damaged"
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = " ".join(reason.split()) or type(error).__name__
    raise UnreadableImageError(f"not a readable image ({reason})")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # which Pillow would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Crop an image centrally to a square and resample it (Lanczos) to ``size`` pixels a side."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def image_key(size: int, index: int) -> bytes:
    """Key of an image in an LMDB of the StyleGAN2-PyTorch family, like ``256-00000``."""
    return f"{size}-{index:05d}".encode()


@dataclass(frozen=True)
class Encoding:
    """How images are stored: sides in pixels, ``png`` or ``jpeg``, JPEG quality (None for PNG)."""

    sizes: tuple[int, ...]
    format: str = "png"
    quality: int | None = None

    def encode(self, image: Image.Image) -> list[bytes]:
        """Files of one image, in the order of ``sizes``."""
        # Full colour resolution: the JPEG default halves it even at quality 100.
        options = {"quality": self.quality, "subsampling": 0} if self.format == "jpeg" else {}
        files = []
        for size in self.sizes:
            buffer = io.BytesIO()
            fit_square(image, size).save(buffer, format=self.format, **options)
            files.append(buffer.getvalue())
        return files


@dataclass
class State:
    """What an LMDB was made of, and how far it has come.

    Attributes:
        settings: sizes, format and quality, number and SHA-256 of the file list.
        done: files encoded or found bad, in the order of the list.
        bad: name and reason of every unreadable file; they get no index.
    """

    settings: dict[str, Any]
    done: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Images stored so far."""
        return self.done - len(self.bad)

    @property
    def complete(self) -> bool:
        """Whether every file was looked at."""
        return self.done == self.settings["files"]

    def to_bytes(self) -> bytes:
        """As stored in the LMDB."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, transaction: lmdb.Transaction, name: str) -> "State | None":
        """The state of an LMDB, None if `prepare` did not make it.

        Args:
            transaction: of the LMDB.
            name: flag and folder, for messages.

        Raises:
            DatasetError: what is stored as one is none.
        """
        stored = transaction.get(STATE_KEY)
        if stored is None:
            return None
        try:
            state = cls(**json.loads(bytes(stored)))
            keys = {"sizes", "format", "quality", "files", "files_sha256"}
            if keys <= state.settings.keys() and state.done >= len(state.bad):
                return state
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        raise DatasetError(f"{name}: an LMDB with a damaged {STATE_KEY.decode()!r}; make it again")


def open_lmdb(name: str, folder: Path, **options: Any) -> lmdb.Environment:
    """Open an LMDB; not one that was cut off, since reading past its end would end the process.

    Args:
        name: flag and folder, for messages.
        folder: of the LMDB.
        **options: of `lmdb.open`.

    Raises:
        DatasetError: it is none, or not whole.
    """
    try:
        environment = lmdb.open(str(folder), **options)
    except lmdb.Error as error:
        raise DatasetError(
            f"{name}: cannot be opened as an LMDB ({error}); make it again"
        ) from None
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = (folder / "data.mdb").stat().st_size
    if found < expected:
        environment.close()
        raise DatasetError(
            f"{name}: an LMDB that was cut off, {found:,} of {expected:,} bytes; copy or make it"
            " again"
        )
    return environment


def sizes_held(transaction: lmdb.Transaction) -> list[int]:
    """Image sizes in an LMDB, in pixels, found by jumping over each size's keys."""
    sizes, cursor = [], transaction.cursor()
    more = cursor.first()
    while more:
        head, dash, _ = bytes(cursor.key()).partition(b"-")
        if dash and head.isdigit():
            sizes.append(int(head))
            more = cursor.set_range(head + b".")  # the byte after "-"
        else:
            more = cursor.next()
    return sorted(sizes)


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole process group; the parent alone deals with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_files(folder: Path, names: list[str], encoding: Encoding) -> list[list[bytes] | str]:
    """For each file its encoded images, or why it cannot be read."""
    results: list[list[bytes] | str] = []
    for name in names:
        try:
            results.append(encoding.encode(read_image(folder / name)))
        except UnreadableImageError as error:
            results.append(str(error))
    return results


def _encoded(
    folder: Path, chunks: Iterable[list[str]], encoding: Encoding, workers: int
) -> Generator[list[list[bytes] | str], None, None]:
    """Encode chunks of files in several processes; yields in order, with few chunks in memory."""
    waiting: deque[Future[list[list[bytes] | str]]] = deque()
    # Spawned, not forked: a fork of a process that has used threads may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupt) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_files, folder, chunk, encoding))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _settings(folder: Path, names: list[str], encoding: Encoding) -> dict[str, Any]:
    """What the content of an LMDB depends on, the file list as a hash of names and file sizes."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = (folder / name).stat().st_size
        except OSError:
            size = -1  # will be reported as unreadable
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return {
        "sizes": list(encoding.sizes),
        "format": encoding.format,
        "quality": encoding.quality,
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
        raise DatasetError(f"--out {out} holds other files; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    return open_lmdb(f"--out {out}", out, map_size=MAP_SIZE)


def _resume(out: Path, env: lmdb.Environment, settings: dict[str, Any]) -> State:
    """The state to go on from: a new one, or the stored one if its settings are the same.

    Raises:
        DatasetError: the LMDB was made otherwise.
    """
    with env.begin() as transaction:
        state, entries = State.read(transaction, f"--out {out}"), transaction.stat()["entries"]
    if state is None:
        if entries:
            raise DatasetError(
                f"--out {out} holds an LMDB that was not made by this command; name a new folder"
            )
        return State(settings)
    for key, value in settings.items():
        if state.settings.get(key) != value:
            if key == "files_sha256":
                difference = "of other files (names or sizes in bytes differ)"
            else:
                difference = f"with {key} {state.settings.get(key)}, not {value}"
            raise DatasetError(
                f"--out {out} holds an LMDB {difference}; name a new folder, or delete this one"
            )
    return state


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


def _store(
    env: lmdb.Environment, state: State, names: list[str], results: Sequence[list[bytes] | str]
) -> None:
    """Write a chunk's images together with the progress; names are those not yet done."""
    items = []
    for name, result in zip(names, results, strict=False):
        if isinstance(result, str):
            state.bad.append((name, result))
        else:
            keys = [image_key(size, state.length) for size in state.settings["sizes"]]
            items += list(zip(keys, result, strict=True))
        state.done += 1
    items.append((STATE_KEY, state.to_bytes()))
    if state.complete:
        # Last of all, for a reader takes an LMDB that has it for a whole one.
        items.append((LENGTH_KEY, str(state.length).encode()))
    _commit(env, items)


def _check_bad(path: Path, state: State, max_bad: int) -> None:
    """Stop where too many files are bad, or all."""
    first = "; ".join(f"{name}: {reason}" for name, reason in state.bad[:10])
    if len(state.bad) > max_bad:
        raise DatasetError(
            f"--path {path}: more than {max_bad} unreadable images: {first}; raise --max_bad to go"
            " on without them, or mend them and start afresh with a new --out"
        )
    if state.complete and not state.length:
        raise DatasetError(f"--path {path}: none of its images can be read: {first}")


def prepare(
    path: str | Path,
    out: str | Path,
    encoding: Encoding,
    workers: int | None = None,
    max_bad: int = 10,
    progress: bool = True,
) -> State:
    """Write a folder's images to an LMDB; goes on where an interrupted call stopped.

    Keys are those of `image_key` for indices 0 to length - 1, and ``length``, which is written
    last. An index is the position among the readable files of `image_files`.

    Args:
        path: folder of images.
        out: folder of the LMDB, new or unfinished.
        encoding: how to store them.
        workers: processes; None takes one per core.
        max_bad: unreadable files that are left out.
        progress: show a bar.

    Returns:
        What was done, with the names of unreadable files.

    Raises:
        DatasetError: a path cannot be used, the LMDB was made otherwise, too many files are
            unreadable, the disk is full, or a worker was killed.
    """
    path, out = Path(path), Path(out)
    if not path.is_dir():
        raise DatasetError(f"--path {path}: no such folder; give a folder of images")
    names = image_files(path)
    if not names:
        raise DatasetError(f"--path {path}: holds no images ({', '.join(SUFFIXES)})")
    with _open(out) as env:
        state = _resume(out, env, _settings(path, names, encoding))
        try:
            _check_bad(path, state, max_bad)
            _write_missing(env, state, path, names, encoding, workers, max_bad, progress)
        except lmdb.Error as error:
            # A full disk may show as "Input/output error", hence the free space.
            free = shutil.disk_usage(out).free / 1e6
            why = f"--out {out}: {error}, with {free:.1f} MB free on its disk"
        except BrokenProcessPool:
            why = "a worker was killed, perhaps for want of memory (fewer --workers take less)"
        else:
            return state
    raise DatasetError(f"{why}; what is written is kept: the same command goes on from there")


def _write_missing(
    env: lmdb.Environment,
    state: State,
    path: Path,
    names: list[str],
    encoding: Encoding,
    workers: int | None,
    max_bad: int,
    progress: bool,
) -> None:
    """Encode and store the files that the state does not count as done."""
    if state.complete:
        return
    pixels = sum(size**2 for size in encoding.sizes)
    step = min(max(CHUNK_PIXELS // pixels, 1), 256)
    chunks = [names[i : i + step] for i in range(state.done, len(names), step)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    bar = tqdm(
        total=len(names), initial=state.done, unit="img", desc="encoding", disable=not progress
    )
    # Closed by hand, so that an error here stops the processes at once.
    with bar, closing(_encoded(path, chunks, encoding, workers)) as encoded:
        for results in encoded:
            _store(env, state, names[state.done :][: len(results)], results)
            bar.update(len(results))
            _check_bad(path, state, max_bad)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m Dataset.prepare_data",
        description="Store a folder's images in an LMDB for train.py, cropped to a square and"
        " resampled to one or several sizes. An interrupted run goes on where it stopped.",
        epilog="example: python -m Dataset.prepare_data --path FFHQ --out FFHQ_LMDB --size 256",
    )
    add = parser.add_argument
    add("--path", required=True, metavar="DIR", help="folder of images, searched recursively")
    add("--out", required=True, metavar="LMDB", help="folder of the LMDB, new or unfinished")
    add("--size", type=integers, required=True, metavar="N,...", help="sides in pixels: 128,256")
    add("--workers", type=at_least(1), help="processes (default: one per core)")
    formats = "png keeps the exact pixels, jpeg is faster and smaller for photographs"
    add("--format", choices=("png", "jpeg"), default="png", help=f"{formats} (default: png)")
    add("--quality", type=at_least(1), help="of jpeg, 1 to 100 (default: 100)")
    bad = "unreadable images to leave out before giving up (default: %(default)s)"
    add("--max_bad", type=at_least(0), default=10, help=bad)
    return parser


def _run(args: argparse.Namespace) -> int:
    if not args.size or min(args.size) < 1:
        raise DatasetError("--size must be one or more positive integers separated by commas")
    if args.quality and (args.format != "jpeg" or args.quality > 100):
        raise DatasetError(f"--quality {args.quality}: is 1 to 100 and goes with --format jpeg")
    check_writable("out", Path(args.out) / "data.mdb")
    quality = args.quality or 100 if args.format == "jpeg" else None
    encoding = Encoding(tuple(sorted(set(args.size))), args.format, quality)
    try:
        state = prepare(args.path, args.out, encoding, args.workers, args.max_bad)
    except KeyboardInterrupt:
        print("prepare_data: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for name, reason in state.bad:
        print(f"prepare_data: warning: {name}: {reason}; left out", file=sys.stderr)
    sizes = ", ".join(map(str, encoding.sizes))
    print(f"{state.length} images of {sizes} px ({args.format}) in {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    return run_script(_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
