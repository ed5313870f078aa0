"""Where pictures come from: a table of sources, one file each.

To add a source, write a file with a class that keeps to `Source` and a function that opens it, and
list that function in `SOURCES`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from Dataset import DatasetError
from Dataset.sources.folder import open_folder
from Dataset.sources.lmdb import open_lmdb


class Source(Protocol):
    """Pictures by index from 0; copies are pickled to the loading processes."""

    @property
    def files(self) -> Sequence[str]:
        """The files that hold the pictures, relative to the source's path."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name a picture for messages, with the source's path."""

    def read(self, index: int) -> Image.Image:
        """Decode a picture to RGB, of any size.

        Raises:
            UnreadableImageError: it is missing or damaged.
            DatasetError: the source is.
        """


SOURCES: tuple[Callable[[Path, int], Source | None], ...] = (open_lmdb, open_folder)
"""In the order in which they are asked. Each takes the path and the images' side in pixels, and
returns None where the path is none of its own."""


def open_source(path: Path, size: int) -> Source:
    """Open the first source that recognises a path.

    Raises:
        DatasetError: none does, or the source cannot be used.
    """
    for open_one in SOURCES:
        if (source := open_one(path, size)) is not None:
            return source
    raise DatasetError(f"{path}: no such folder; give a folder of images or an LMDB")
