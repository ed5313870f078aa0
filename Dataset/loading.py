"""Batches of images, loaded ahead by processes that may be killed at any time.

``python -m Dataset.images --path DIR`` measures their speed.
"""

import atexit
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, forkserver, get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from Dataset import DatasetError
from Dataset.batches import EndlessBatches, Item
from Dataset.images import Images, to_float
from Util import distributed
from Util.cli import run_settings
from Util.settings import Settings, blame, setting
from Util.workers import cores, end_with_parent

CPU = torch.device("cpu")

DEAF_TO = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to the main process that schedulers send to its children too."""


def load_batches(
    dataset: Images,
    batches: Iterable[list[Item]],
    workers: int | None = 0,
    device: torch.device = CPU,
) -> Generator[Tensor, None, None]:
    """Iterate over image batches (N, 3, size, size) in [-1, 1].

    They travel as bytes, from the loading processes through shared memory and on to the device.

    Args:
        dataset: the images.
        batches: which of them, in which order: `EndlessBatches` or `in_order`.
        workers: processes that load; 0 loads in this one, None is `default_workers`. They start at
            once, and end with the iterator.
        device: where the batches are wanted.

    Returns:
        The iterator; raises `DatasetError` when too many images are unreadable.
    """
    workers = default_workers() if workers is None else workers
    loader = DataLoader(
        _Batches(dataset, _pixels),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        multiprocessing_context=_worker_context() if workers else None,
        # At least four batches ahead: iterations differ in time, as most do without regularisation.
        prefetch_factor=max(2, 4 // workers) if workers else None,
        # Its own, or a resumed run would draw a seed for its workers from the restored state.
        generator=torch.Generator(),
    )
    return _reported(_fetched(_started(loader), dataset.path), dataset, device)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a loader's processes."""
    before, context = set(active_children()), loader.multiprocessing_context
    if context is not None and context.get_start_method() == "forkserver":
        # What the server ignores, its workers do; this process is deaf for its start alone.
        with _deaf_to_termination():
            forkserver.ensure_running()
        messages = iter(loader)
    else:
        with _deaf_to_termination():
            messages = iter(loader)
    # Whatever still holds the iterator at the exit (the traceback of an error, say): there, Python
    # ends remaining processes by the signal that these ignore, and waits for them.
    if new := [weakref.ref(p) for p in set(active_children()) - before]:
        atexit.register(_kill, new)
    return messages


class EpochBatches:
    """Batches of all items of a data set, in each pass anew.

    Args:
        dataset: of tensors, or of tuples of them; raises `ValueError` for what is damaged.
        place: where it is, for messages.
        batch_size: items in a batch.
        workers: processes that load, kept from pass to pass; 0 loads in this one.
        seed: of each pass's order, which leaves out what fills no batch; None keeps that
            of the data set.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        place: str | Path,
        batch_size: int,
        workers: int = 0,
        seed: int | None = None,
    ) -> None:
        self.place, shuffled = place, seed is not None
        # Streams of their own: what is drawn from PyTorch's depends on the workers, and on others.
        order = torch.Generator().manual_seed(seed or 0)
        self.loader: DataLoader[Any] = DataLoader(
            _Batches(dataset, _collated),
            batch_size,
            sampler=RandomSampler(dataset, generator=order) if shuffled else None,  # type: ignore[arg-type]
            drop_last=shuffled,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=_worker_context() if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches of a pass."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            ValueError: what the data set raised, or a `DatasetError` if a process was killed.
        """
        return _fetched(_started(self.loader), self.place)


def default_workers() -> int:
    """Loading processes of one training process: its share of the CPU cores, 1 to 4."""
    return max(1, min(4, cores() // distributed.processes_beside()))


class _Batches(Dataset[Any]):
    """What a function makes of whole batches of items, or the error that a batch ended in.

    Errors are results here: what a worker raises, DataLoader turns into a long traceback.
    """

    def __init__(self, dataset: Any, make: Callable[[Any, list[Any]], Any]) -> None:
        self.dataset, self.make = dataset, make

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, items: list[Any]) -> Any:
        try:
            return self.make(self.dataset, items)
        except ValueError as error:
            return error


def _collated(dataset: Any, items: list[int]) -> Any:
    return default_collate([dataset[i] for i in items])


def _pixels(images: Images, items: list[Item]) -> tuple[Tensor, dict[str, str]]:
    """A batch with the images newly found bad, which the main process counts."""
    known = len(images.bad)
    batch = default_collate([images.pixels(item) for item in items])
    return batch, dict(list(images.bad.items())[known:])


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # Ctrl-C and schedulers' signals reach the whole process group; the main process alone deals
    # with them, and may need batches until it has.
    for number in (signal.SIGINT, *DEAF_TO):
        signal.signal(number, signal.SIG_IGN)
    # DataLoader's own watch sees the fork server as parent, which outlives a killed main process.
    end_with_parent()


def _worker_context() -> BaseContext:
    """Start processes without this one's threads, on which a plain fork may deadlock."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    # One import of PyTorch for all workers; it takes seconds and hundreds of megabytes.
    context.set_forkserver_preload(["torch", "torch.utils.data", "PIL.Image", "lmdb"])
    return context


@contextmanager
def _deaf_to_termination() -> Iterator[None]:
    """Let processes started in the block ignore signals; the fork server cannot be told later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in DEAF_TO}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reported(
    fetched: Generator[Any, None, None], images: Images, device: torch.device = CPU
) -> Generator[Tensor, None, None]:
    with closing(fetched):
        for batch, bad in fetched:
            for name, reason in bad.items():
                images.note_bad(name, reason)
            yield to_float(batch.to(device, non_blocking=True))


def _fetched(messages: Iterator[Any], place: str | Path) -> Generator[Any, None, None]:
    """Yield what `_Batches` made; raise what it made of an error."""
    try:
        while (message := _next_message(messages, place)) is not None:
            if isinstance(message, ValueError):
                raise message
            yield message
    finally:
        # An error's traceback holds this frame; the workers end when nothing holds their iterator.
        del messages


def _next_message(messages: Iterator[Any], place: str | Path) -> Any:
    """Fetch what `_Batches` made of the next batch; None at the end.

    If its process was killed, return the error: a raised one would refer to PyTorch's, whose
    traceback holds the loader.
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
        f"{place}: a loading process was killed, perhaps for want of memory; fewer workers"
        " take less"
    )


def _kill(processes: "Sequence[weakref.ref[BaseProcess]]") -> None:
    for reference in processes:
        if (process := reference()) is not None and process.is_alive():
            process.kill()


@dataclass(frozen=True, kw_only=True)
class LoadingSettings(Settings):
    """Settings of the measurement of the loader."""

    path: tuple[Path, ...] = setting(..., "folders of images or LMDBs", nargs="+", metavar="DIR")
    size: int = setting(64, "side in pixels", low=1)
    batch_size: int = setting(32, "images in a batch", low=1)
    workers: int = setting(2, "loading processes", low=0)
    n_batches: int = setting(200, "batches per run", low=1)
    runs: int = setting(5, "runs of each path, in turn", low=1)


def images_per_second(images: Images, batch_size: int, workers: int, n_batches: int) -> float:
    """Measure the loader alone, without its start."""
    batches = load_batches(images, EndlessBatches(len(images), batch_size), workers)
    for _ in range(2 * workers + 4):  # more than wait ready-made
        next(batches)
    start = time.perf_counter()
    for _ in range(n_batches):
        next(batches)
    return n_batches * batch_size / (time.perf_counter() - start)


def _measure(settings: LoadingSettings) -> None:
    with blame("path"):
        sets = [Images(path, settings.size) for path in settings.path]
        # In turn, so that what else the machine does touches all alike.
        how = (settings.batch_size, settings.workers, settings.n_batches)
        speeds = [[images_per_second(s, *how) for s in sets] for _ in range(settings.runs)]
    for path, runs in zip(settings.path, zip(*speeds, strict=True), strict=True):
        print(f"{path}: {median(runs):.0f} images/s ({min(runs):.0f} to {max(runs):.0f})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    prog = "python -m Dataset.images"
    return run_settings(
        LoadingSettings,
        _measure,
        argv,
        prog=prog,
        description="Measure how many images a second are loaded, from one place or several.",
        epilog=f"example: {prog} --path FFHQ FFHQ_LMDB --size 256 --workers 4",
    )
