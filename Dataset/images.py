"""Training images from a folder or an LMDB file, and the endless stream of batches.

``python -m Dataset.images --path DIR`` measures how fast they are loaded.
"""

import argparse
import atexit
import hashlib
import io
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children, get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from tqdm import tqdm

from Dataset.prepare_data import (
    LENGTH_KEY,
    SUFFIXES,
    DatasetError,
    State,
    UnreadableImageError,
    fit_square,
    image_files,
    image_key,
    open_lmdb,
    read_image,
    sizes_held,
)
from Util.cli import OneLineParser, run_script
from Util.settings import at_least


class Images(Dataset[Tensor]):
    """Images of one size, as tensors (3, size, size) in [-1, 1].

    Item ``(index, mirror)`` is image ``index``, flipped left to right when ``mirror``. In place of
    an unreadable image comes the next readable one, the same in every run; the name of the
    unreadable one is printed on standard error.

    Args:
        path: a folder of images (searched recursively), or an LMDB folder in the layout of the
            StyleGAN2-PyTorch family (keys ``256-00000``, ``length``). A process can read an LMDB
            through one object at a time.
        size: image side in pixels. Folder images of another size are centre-cropped to a square
            and resampled (Lanczos); an LMDB must hold this size.
        max_bad: unreadable images that are passed over.

    Attributes:
        bad: reasons of the unreadable images found so far, by name.

    Raises:
        DatasetError: the path is missing, holds no images, or an LMDB is unfinished or lacks this
            size; from an item, when more than ``max_bad`` images are unreadable.
    """

    def __init__(self, path: str | Path, size: int, max_bad: int = 10) -> None:
        self.path, self.size, self.max_bad = Path(path), size, max_bad
        self.bad: dict[str, str] = {}
        self.files: list[str] = []
        self._lmdb: Any = None
        if not self.path.is_dir():
            raise DatasetError(f"--path {path}: no such folder; give a folder of images or an LMDB")
        self.is_lmdb = (self.path / "data.mdb").is_file()
        if self.is_lmdb:
            self.length = self._lmdb_length()
        else:
            self.files = image_files(self.path)
            self.length = len(self.files)
        if self.length == 0:
            raise DatasetError(f"--path {path}: holds no images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, bool]) -> Tensor:
        index, mirror = item
        pixels = np.asarray(self._readable(index))
        if mirror:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return tensor.float().div_(127.5).sub_(1)

    def __getstate__(self) -> dict[str, Any]:
        # An LMDB handle belongs to one process; a worker opens its own.
        return vars(self) | {"_lmdb": None}

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change when images are added, removed or replaced.

        Of the files' names and sizes, not of their bytes, which would take minutes to read.
        """
        files = [self.path / "data.mdb"] if self.is_lmdb else [self.path / f for f in self.files]
        listing = [(str(f.relative_to(self.path)), f.stat().st_size) for f in files]
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
            line = f"warning: {name}: {reason}; the next readable image takes its place"
            tqdm.write(line, file=sys.stderr)
        if len(self.bad) > self.max_bad:
            raise self._too_many(f"more than {self.max_bad} unreadable images")

    def _too_many(self, what: str) -> DatasetError:
        names = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:10])
        return DatasetError(f"--path {self.path}: {what}: {names}; mend or remove them")

    def _readable(self, index: int) -> Image.Image:
        """The image, or the first readable one after it: a function of the data set alone."""
        for i in (*range(index, self.length), *range(index)):
            name = f"{self.path} image {i}" if self.is_lmdb else str(self.path / self.files[i])
            if name in self.bad:
                continue
            try:
                image = read_image(self._read(i) if self.is_lmdb else name)
            except UnreadableImageError as error:
                self.note_bad(name, str(error))
            else:
                return fit_square(image, self.size)
        raise self._too_many(f"none of {self.length} images can be read")

    def _environment(self) -> Any:
        # Opened on first use in every process: an LMDB handle does not survive a fork.
        if self._lmdb is None:
            options = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
            self._lmdb = open_lmdb(f"--path {self.path}", self.path, **options)
        return self._lmdb

    def _read(self, index: int) -> io.BytesIO:
        with self._environment().begin() as transaction:
            data = transaction.get(image_key(self.size, index))
        if data is None:
            raise DatasetError(f"{self.path}: no image {index} of {self.size} px in this LMDB")
        return io.BytesIO(data)

    def _lmdb_length(self) -> int:
        with self._environment() as environment, environment.begin() as transaction:
            stored = transaction.get(LENGTH_KEY)
            problem = self._unfinished(State.read(transaction, f"--path {self.path}"))
            if stored is not None:
                problem = self._unfit(transaction, bytes(stored))
        self._lmdb = None
        if problem:
            raise DatasetError(f"--path {self.path}: an LMDB with {problem}")
        return int(stored)

    def _unfit(self, transaction: Any, stored: bytes) -> str:
        """What is wrong with a finished LMDB, if anything."""
        sizes = sizes_held(transaction)
        if self.size not in sizes:
            return f"no images of {self.size} px, but of {sizes}; choose one of these"
        if not stored.isdigit() or not 0 < int(stored[:20]) <= transaction.stat()["entries"]:
            return f"{transaction.stat()['entries']} entries, but a key 'length' of {stored[:20]!r}"
        last = int(stored) - 1
        if transaction.get(image_key(self.size, last)) is None:
            return f"{last + 1} images by its key 'length', but image {last} missing"
        return ""

    def _unfinished(self, state: State | None) -> str:
        if state is None:
            return "no key 'length'; make one with: python -m Dataset.prepare_data"
        done, settings = state.done, state.settings
        quality = f" --quality {settings['quality']}" if settings["quality"] else ""
        return (
            f"only {done} of {settings['files']} files; complete it with: python -m"
            f" Dataset.prepare_data --path FOLDER --out {self.path} --format {settings['format']}"
            f"{quality} --size {','.join(map(str, settings['sizes']))}"
        )


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


class _Batches(Dataset[Any]):
    """Whole batches with the images newly found bad, or the error that a batch ended in.

    Errors are results here: what a worker raises, DataLoader turns into a long traceback.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitems__(
        self, items: list[tuple[int, bool]]
    ) -> tuple[Tensor, dict[str, str]] | DatasetError:
        known = len(self.images.bad)
        try:
            batch = default_collate([self.images[item] for item in items])
        except DatasetError as error:
            return error
        return batch, dict(list(self.images.bad.items())[known:])


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # Ctrl-C and torchrun's SIGTERM reach the whole process group; the main process alone deals with
    # them, and may need batches until it has.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # DataLoader's own watch sees the fork server as parent, which outlives a killed main process.
    threading.Thread(target=end_with_parent, daemon=True).start()


def _worker_context() -> BaseContext:
    """Processes that do not inherit this one's threads, which a plain fork may deadlock on."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    # One import of PyTorch for all workers; it takes seconds and hundreds of megabytes.
    context.set_forkserver_preload(["torch", "torch.utils.data", "PIL.Image", "lmdb"])
    return context


@contextmanager
def _deaf_to_termination() -> Iterator[None]:
    """Processes started in the block ignore SIGTERM; the fork server cannot be told later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _reported(messages: Iterator[Any], images: Images) -> Generator[Tensor, None, None]:
    try:
        while (message := _next_message(messages, images)) is not None:
            if isinstance(message, DatasetError):
                raise message
            batch, bad = message
            for name, reason in bad.items():
                images.note_bad(name, reason)
            yield batch
    finally:
        # An error's traceback holds this frame; the workers end when nothing holds their iterator.
        del messages


def _next_message(messages: Iterator[Any], images: Images) -> Any:
    """What `_Batches` made of the next batch, an error if its process was killed, None at the end.

    The error is returned, not raised, lest it refer to PyTorch's, whose traceback holds the loader.
    """
    try:
        return next(messages, None)
    except (RuntimeError, EOFError, OSError) as error:
        # DataLoader sees a dead process when it waits for one. If a batch of it lay ready, fetching
        # that fails first: its memory is handed over by a socket that died with the process. What
        # was raised inside a living process is marked by these words.
        fetching = not isinstance(error, RuntimeError) and "in DataLoader worker" not in str(error)
        if not (fetching or "exited unexpectedly" in str(error)):
            raise
    return DatasetError(
        f"--path {images.path}: a loading process was killed, perhaps for want of memory; fewer"
        " --workers take less"
    )


def _kill(processes: "Sequence[weakref.ref[BaseProcess]]") -> None:
    for reference in processes:
        if (process := reference()) is not None and process.is_alive():
            process.kill()


def in_order(n: int, size: int, rank: int = 0, world: int = 1) -> list[list[tuple[int, bool]]]:
    """Batches of the first ``n`` images in order, none flipped; one process's share of them.

    Batches have ``size`` images, the last one maybe fewer.
    """
    starts = range(rank * size, n, world * size)
    return [[(i, False) for i in range(start, min(start + size, n))] for start in starts]


def load_batches(
    dataset: Images,
    batches: Iterable[list[tuple[int, bool]]],
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Tensor, None, None]:
    """Iterate over image batches (N, 3, size, size) in [-1, 1].

    Args:
        dataset: the images.
        batches: which of them, in which order: `EndlessBatches` or `in_order`.
        workers: processes that load; 0 loads in this one. They start at once, and end with the
            iterator.
        pin_memory: put batches where a GPU copies from fastest.

    Returns:
        The iterator; raises `DatasetError` when too many images are unreadable.
    """
    loader = DataLoader(
        _Batches(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=_worker_context() if workers else None,
        # At least four batches ahead: iterations differ in time, as most do without regularisation.
        prefetch_factor=max(2, 4 // workers) if workers else None,
        # Its own, or a resumed run would draw a seed for its workers from the restored state.
        generator=torch.Generator(),
    )
    before = set(active_children())
    with _deaf_to_termination():
        messages = iter(loader)
    # Whatever still holds the iterator at the exit (the traceback of an error, say): there, Python
    # ends remaining processes by the signal that these ignore, and waits for them.
    atexit.register(_kill, [weakref.ref(p) for p in set(active_children()) - before])
    return _reported(messages, dataset)


def images_per_second(images: Images, batch_size: int, workers: int, n_batches: int) -> float:
    """Speed of the loader alone, without its start."""
    batches = load_batches(images, EndlessBatches(len(images), batch_size), workers)
    for _ in range(2 * workers + 4):  # more than wait ready-made
        next(batches)
    start = time.perf_counter()
    for _ in range(n_batches):
        next(batches)
    return n_batches * batch_size / (time.perf_counter() - start)


def _measure(args: argparse.Namespace) -> None:
    sets = [Images(path, args.size) for path in args.path]
    # In turn, so that what else the machine does touches all alike.
    speeds = [
        [images_per_second(s, args.batch_size, args.workers, args.n_batches) for s in sets]
        for _ in range(args.runs)
    ]
    for path, runs in zip(args.path, zip(*speeds, strict=True), strict=True):
        print(f"{path}: {median(runs):.0f} images/s ({min(runs):.0f} to {max(runs):.0f})")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry: measure the loader."""
    parser = OneLineParser(prog="python -m Dataset.images", description="Measure the loader.")
    add = parser.add_argument
    add("--path", nargs="+", required=True, metavar="DIR", help="folders of images or LMDBs")
    add("--size", type=at_least(1), default=64, help="side in pixels (default: %(default)s)")
    add("--batch_size", type=at_least(1), default=32, help="images (default: %(default)s)")
    add("--workers", type=at_least(0), default=2, help="processes (default: %(default)s)")
    add("--n_batches", type=at_least(1), default=200, help="per run (default: %(default)s)")
    add("--runs", type=at_least(1), default=5, help="of each, in turn (default: %(default)s)")
    return run_script(parser, _measure, argv)


if __name__ == "__main__":
    sys.exit(main())
