"""Images of one size as tensors, from any source; ``python -m Dataset.images`` measures loading."""

import hashlib
import sys
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from Dataset import DatasetError
from Dataset.batches import Item
from Dataset.pictures import Resizing, UnreadableImageError, fit_square
from Dataset.sources import open_source
from Util.progress import warn


def to_float(pixels: Tensor) -> Tensor:
    """Bytes to floats in [-1, 1], of the same shape, on the device where they are."""
    return pixels.float().div_(127.5).sub_(1)


class Images(Dataset[Tensor]):
    """Images of one size, as tensors (3, size, size) in [-1, 1].

    Item ``(index, mirror)`` is image ``index``, flipped left to right when ``mirror``. In place of
    an unreadable image comes the next readable one, the same in every run; the name of the
    unreadable one is printed on standard error.

    Args:
        path: a folder of images (searched recursively), or an LMDB folder in the layout of the
            StyleGAN2-PyTorch family (keys ``256-00000``, ``length``). A process can read an LMDB
            through one object at a time.
        size: image side in pixels. Folder images of another size are resized and cropped to a
            square, see `fit_square`; an LMDB must hold this size.
        max_bad: unreadable images that are passed over.
        resample: filter that resizes, one of `Dataset.pictures.FILTERS`.

    Attributes:
        source: see `Dataset.sources.Source`.
        bad: reasons of the unreadable images found so far, by name.

    Raises:
        DatasetError: the path is missing, holds no images, or an LMDB is unfinished or lacks this
            size; from an item, when more than ``max_bad`` images are unreadable.
    """

    def __init__(
        self, path: str | Path, size: int, max_bad: int = 10, resample: str = "bilinear"
    ) -> None:
        self.path, self.size, self.max_bad, self.resample = Path(path), size, max_bad, resample
        self.source = open_source(self.path, size)
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: Item) -> Tensor:
        return to_float(self.pixels(item))

    def pixels(self, item: Item) -> Tensor:
        """Give an item as bytes (3, size, size), a quarter of its floats."""
        index, mirror = item
        pixels = np.asarray(self._readable(index))
        if mirror:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    @cached_property
    def resizing(self) -> Resizing:
        """How the images come to their size; opens every file of a folder when first asked."""
        return self.source.resizing(self.size, self.resample)

    def fingerprint(self) -> str:
        """Return eight hexadecimal digits that change with the images that are there.

        Of the files' names and sizes, not of their bytes, which would take minutes to read.
        """
        listing = [(name, (self.path / name).stat().st_size) for name in self.source.files]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:8]

    def note_bad(self, name: str, reason: str) -> None:
        """Count and report an unreadable image, once.

        Raises:
            DatasetError: there are more than ``max_bad``.
        """
        if name in self.bad:
            return
        self.bad[name] = reason
        # What a worker meets is reported by the main process, or each worker would repeat it.
        if get_worker_info() is None:
            warn(f"warning: {name}: {reason}; the next readable image takes its place")
        if len(self.bad) > self.max_bad:
            raise self._too_many(f"more than {self.max_bad} unreadable images")

    def _too_many(self, what: str) -> DatasetError:
        names = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:10])
        return DatasetError(f"{self.path}: {what}: {names}; mend or remove them")

    def _readable(self, index: int) -> Image.Image:
        """Read an image, or the first readable one after it: a function of the data set alone."""
        for i in chain(range(index, len(self)), range(index)):
            name = self.source.name(i)
            if name in self.bad:
                continue
            try:
                return fit_square(self.source.read(i), self.size, self.resample)
            except UnreadableImageError as error:
                self.note_bad(name, str(error))
        raise self._too_many(f"none of {len(self)} images can be read")


if __name__ == "__main__":
    from Dataset.loading import main

    sys.exit(main())
