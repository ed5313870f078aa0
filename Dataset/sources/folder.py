"""A folder of image files."""

import os
from pathlib import Path

from PIL import Image

from Dataset import DatasetError
from Dataset.pictures import read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_files(folder: str | os.PathLike[str]) -> list[str]:
    """Find a folder's images, recursively.

    Leave out hidden files and folders (other programs' leftovers) and do not follow links to
    folders.

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


class Folder:
    """The images of a folder and the folders in it.

    Raises:
        DatasetError: it is missing, cannot be read, or holds no images.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DatasetError(f"{path}: no such folder; give a folder of images")
        self.path, self.files = path, image_files(path)
        if not self.files:
            raise DatasetError(f"{path}: holds no images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Name the file, with the folder."""
        return str(self.path / self.files[index])

    def read(self, index: int) -> Image.Image:
        """See `Source`."""
        return read_image(self.name(index))


def open_folder(path: Path, size: int) -> Folder | None:
    """Open any folder, whatever the sizes of its images; see `SOURCES`."""
    return Folder(path) if path.is_dir() else None
