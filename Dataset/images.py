"""Training images from a folder or an LMDB file, and the endless stream of batches."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DatasetError(ValueError):
    """A data set cannot be used; the message names the path, what was found and what to do."""


class Images(Dataset[Tensor]):
    """Images of one size, as tensors (3, size, size) in [-1, 1].

    Item ``(index, mirror)`` is image ``index``, flipped left to right when ``mirror``.

    Args:
        path: a folder of images (searched recursively), or an LMDB folder in the layout of the
            StyleGAN2-PyTorch family (keys ``256-00000``, ``length``).
        size: image side in pixels. Folder images of another size are centre-cropped to a square
            and resampled (Lanczos); an LMDB must hold this size.

    Raises:
        DatasetError: the path is missing, holds no images, or an LMDB lacks this size.
    """

    def __init__(self, path: str | Path, size: int) -> None:
        self.path, self.size = Path(path), size
        self._lmdb: Any = None
        if not self.path.is_dir():
            raise DatasetError(f"--path {path}: no such folder; give a folder of images or an LMDB")
        self.is_lmdb = (self.path / "data.mdb").is_file()
        if self.is_lmdb:
            self.files: list[Path] = []
            self.length = self._lmdb_length()
        else:
            self.files = sorted(f for f in self.path.rglob("*") if f.suffix.lower() in SUFFIXES)
            self.length = len(self.files)
        if self.length == 0:
            raise DatasetError(f"--path {path}: holds no images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, bool]) -> Tensor:
        index, mirror = item
        pixels = np.asarray(self._open(index))
        if mirror:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return tensor.float().div_(127.5).sub_(1)

    def _open(self, index: int) -> Image.Image:
        source = io.BytesIO(self._read(index)) if self.is_lmdb else self.files[index]
        name = f"{self.path} image {index}" if self.is_lmdb else source
        try:
            with Image.open(source) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DatasetError(f"{name}: not a readable image ({error})") from None
        return self._fit(image)

    def _fit(self, image: Image.Image) -> Image.Image:
        if image.size == (self.size, self.size):
            return image
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def _environment(self) -> Any:
        # Opened on first use in every process: an LMDB handle does not survive a fork.
        if self._lmdb is None:
            import lmdb

            self._lmdb = lmdb.open(
                str(self.path), readonly=True, lock=False, readahead=False, meminit=False
            )
        return self._lmdb

    def _read(self, index: int) -> bytes:
        with self._environment().begin() as transaction:
            data = transaction.get(f"{self.size}-{index:05d}".encode())
        if data is None:
            raise DatasetError(f"{self.path}: no image {index} of {self.size} px in this LMDB")
        return data

    def _lmdb_length(self) -> int:
        with self._environment().begin() as transaction:
            length = transaction.get(b"length")
            first = transaction.get(f"{self.size}-00000".encode())
        self._lmdb.close()
        self._lmdb = None
        if length is None or first is None:
            what = "no key 'length'" if length is None else f"no images of {self.size} px"
            raise DatasetError(f"--path {self.path}: an LMDB with {what}")
        return int(length)


class EndlessBatches(Sampler[list[tuple[int, bool]]]):
    """Indices of an endless stream of full batches, a pure function of the seed and a position.

    Epoch after epoch is a fresh permutation; a batch may span two epochs, so that none is partial.

    Args:
        length: images in the data set.
        batch_size: images per batch over all processes.
        seed: of permutations and mirroring.
        start: images already shown, where a resumed run goes on.
        mirror: flip each image left to right with probability 1/2.
        rank: this process takes images rank, rank + world, ... of every batch.
        world: number of processes; must divide ``batch_size``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        mirror: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch size {batch_size} is not divisible by {world} processes")
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.mirror, self.rank, self.world = mirror, rank, world

    def _epoch(self, epoch: int) -> list[tuple[int, bool]]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.length).tolist()
        flips = (rng.random(self.length) < 0.5 * self.mirror).tolist()
        return list(zip(order, flips, strict=True))

    def _stream(self) -> Iterator[tuple[int, bool]]:
        epoch, offset = divmod(self.start, self.length)
        while True:
            yield from self._epoch(epoch)[offset:]
            epoch, offset = epoch + 1, 0

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        stream = self._stream()
        while True:
            batch = [next(stream) for _ in range(self.batch_size)]
            yield batch[self.rank :: self.world]


def endless_loader(
    dataset: Images, batches: EndlessBatches, workers: int = 0, pin_memory: bool = False
) -> Iterator[Tensor]:
    """Iterate over image batches (N, 3, size, size) in [-1, 1] for ever."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        # Its own, or a resumed run would draw a seed for its workers from the restored state.
        generator=torch.Generator(),
    )
    return iter(loader)
