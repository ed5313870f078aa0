"""An LMDB of encoded images in the layout of the StyleGAN2-PyTorch family, and how it is read.

Keys are those of `image_key` for every size and the indices 0 to length - 1, and ``length``.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
from PIL import Image

from Dataset import DatasetError
from Dataset.pictures import read_image

LENGTH_KEY = b"length"
STATE_KEY = b"prepare_data"
"""Settings and progress as JSON, beside the keys of the StyleGAN2-PyTorch family."""


def image_key(size: int, index: int) -> bytes:
    """Make the key of an image, like ``256-00000``."""
    return f"{size}-{index:05d}".encode()


@dataclass
class State:
    """What `Dataset.prepare_data` made an LMDB of, and how far it has come.

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
        """Encode as stored in the LMDB."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, transaction: lmdb.Transaction, folder: Path) -> "State | None":
        """Read the state of an LMDB, None where there is none.

        Args:
            transaction: of the LMDB.
            folder: of the LMDB, for messages.

        Raises:
            DatasetError: what is stored as a state is none.
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
        raise DatasetError(
            f"{folder}: an LMDB with a damaged {STATE_KEY.decode()!r}; make it again"
        )


def open_environment(folder: Path, **options: Any) -> lmdb.Environment:
    """Open an LMDB; not one that was cut off, since reading past its end would end the process.

    Args:
        folder: of the LMDB.
        **options: of `lmdb.open`.

    Raises:
        DatasetError: it is none, or not whole.
    """
    try:
        environment = lmdb.open(str(folder), **options)
    except lmdb.Error as error:
        raise DatasetError(
            f"{folder}: cannot be opened as an LMDB ({error}); make it again"
        ) from None
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = (folder / "data.mdb").stat().st_size
    if found < expected:
        environment.close()
        raise DatasetError(
            f"{folder}: an LMDB that was cut off, {found:,} of {expected:,} bytes; copy or make it"
            " again"
        )
    return environment


class Lmdb:
    """The images of one size in an LMDB. A process can read it through one object at a time.

    Raises:
        DatasetError: it is unfinished, damaged, or lacks this size.
    """

    files = ("data.mdb",)

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._opened: lmdb.Environment | None = None
        with self._environment() as environment, environment.begin() as transaction:
            stored, state = transaction.get(LENGTH_KEY), State.read(transaction, path)
            if stored is not None:
                problem = _unfit(transaction, bytes(stored), size)
            else:
                problem = _unfinished(state, path)
        self._opened = None
        if problem:
            raise DatasetError(f"{path}: an LMDB with {problem}")
        self.length = int(stored or 0)

    def __getstate__(self) -> dict[str, Any]:
        # A handle belongs to one process; a loading process opens its own.
        return vars(self) | {"_opened": None}

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Name the folder and the index."""
        return f"{self.path} image {index}"

    def read(self, index: int) -> Image.Image:
        """See `Source`."""
        with self._environment().begin() as transaction:
            data = transaction.get(image_key(self.size, index))
        if data is None:
            raise DatasetError(f"{self.path}: no image {index} of {self.size} px in this LMDB")
        return read_image(io.BytesIO(data))

    def _environment(self) -> lmdb.Environment:
        # Opened on first use in every process: a handle does not survive a fork.
        if self._opened is None:
            options = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
            self._opened = open_environment(self.path, **options)
        return self._opened


def open_lmdb(path: Path, size: int) -> Lmdb | None:
    """Open a folder that holds an LMDB; see `SOURCES`."""
    return Lmdb(path, size) if (path / "data.mdb").is_file() else None


def _unfit(transaction: lmdb.Transaction, stored: bytes, size: int) -> str:
    """Say what is wrong with a finished LMDB, if anything."""
    sizes, entries = _sizes_held(transaction), transaction.stat()["entries"]
    if size not in sizes:
        return f"no images of {size} px, but of {sizes}; choose one of these"
    if not stored.isdigit() or not 0 < int(stored[:20]) <= entries:
        return f"{entries} entries, but a key 'length' of {stored[:20]!r}"
    last = int(stored) - 1
    if transaction.get(image_key(size, last)) is None:
        return f"{last + 1} images by its key 'length', but image {last} missing"
    return ""


def _unfinished(state: State | None, path: Path) -> str:
    """Say what an LMDB without a length is, and how to complete it."""
    if state is None:
        return "no key 'length'; make one with: python -m Dataset.prepare_data"
    done, settings = state.done, state.settings
    quality = f" --quality {settings['quality']}" if settings["quality"] else ""
    return (
        f"only {done} of {settings['files']} files; complete it with: python -m"
        f" Dataset.prepare_data --path FOLDER --out {path} --format {settings['format']}"
        f"{quality} --size {','.join(map(str, settings['sizes']))}"
    )


def _sizes_held(transaction: lmdb.Transaction) -> list[int]:
    """List the image sizes in an LMDB, in pixels, by jumping over each size's keys."""
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
