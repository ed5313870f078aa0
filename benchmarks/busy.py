"""Speed of small networks on an idle machine, and beside processes that keep cores busy.

``python -m benchmarks.busy`` starts and ends the busy processes itself. For each job of the bundled
networks, processes with one thread, with a thread for every core, and with the number that the tool
takes by itself (`Util.threads`) start under the same load and then take turns.
"""

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.jobs import frozen
from benchmarks.timing import Measurement, run_benchmark, some_of, table
from Compression.content import load_content_parser
from Compression.distillation import Term, perceptual, pixels
from Compression.scores import channel_scores
from Compression.training import Teacher, Trainer
from Evaluation import sampling
from Evaluation.distances import ParserDistance
from Model import bundled
from Model.checkpoint import load_discriminator, load_generator
from train_hyperparams import TrainConfig
from Util.device import pick_device
from Util.threads import VARIABLES

CPU = torch.device("cpu")
BATCH = 16
Job = Callable[[], object]
"""Works through `BATCH` images."""


def training() -> Job:
    """Iterations as in the demo: discriminator and generator, distillation inside the content."""
    parser = load_content_parser(bundled.PARSER, CPU)
    distance = ParserDistance(parser.network)  # type: ignore[arg-type]
    terms = [Term("l1", 3.0, pixels.term()), Term("parser", 3.0, perceptual.term(distance))]
    settings = TrainConfig(batch_size=BATCH, r1=0.0, path_regularize=0.0, mixing=0.0)
    teacher = Teacher(frozen(load_generator(bundled.MODEL)), parser, terms)
    student, critic = load_generator(bundled.COMPRESSED), load_discriminator(bundled.MODEL)
    trainer = Trainer(student, critic, settings, CPU, teacher)
    real = torch.rand(BATCH, 3, 64, 64) * 2 - 1
    return lambda: trainer.iterate(real)


def pictures() -> Job:
    """Images of the compressed model."""
    generator = frozen(load_generator(bundled.COMPRESSED))
    return lambda: sampling.images(generator, range(BATCH), 0)


def scoring() -> Job:
    """Channel scores of the full-size model."""
    generator, parser = load_generator(bundled.MODEL), load_content_parser(bundled.PARSER, CPU)
    how = {"parser": parser, "n_sample": BATCH, "batch_size": BATCH}
    return lambda: channel_scores(generator, "content_aware", **how)


JOBS: dict[str, Callable[[], Job]] = {
    "training": training,
    "pictures": pictures,
    "scoring": scoring,
}


@dataclass(frozen=True, kw_only=True)
class BusySettings(Measurement):
    """What runs beside what."""

    only: tuple[str, ...] = some_of(JOBS)
    busy: tuple[int, ...] = (0, 1)


@functools.cache
def _job(name: str) -> Job:
    pick_device("cpu")
    return JOBS[name]()


def speed(name: str, seconds: float) -> tuple[float, int]:
    """Work for some seconds, at least once: images per second, and the number of threads."""
    job = _job(name)
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() < start + seconds:
        job()
        calls += 1
    return calls * BATCH / (time.perf_counter() - start), torch.get_num_threads()


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep ``n`` cores busy, until the block or this process ends."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n)]
    try:
        time.sleep(0.2 if loops else 0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that say how many threads there are; without ``values`` nothing does."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def compared(name: str, busy: int, most: int, rounds: int) -> dict[str, Any]:
    """Measure a job beside ``busy`` processes with one thread, ``most``, and the tool's number."""
    variants = {
        "one thread": {VARIABLES[0]: "1"},
        "all threads": {VARIABLES[0]: str(most)},
        "the tool's": {},
    }
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    threads = 0
    with ExitStack() as stack:
        stack.enter_context(busy_processes(busy))
        workers = {}
        for variant, values in variants.items():
            workers[variant] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            with _environment(values):
                _, threads = workers[variant].submit(speed, name, 0).result()
        for _ in range(rounds):
            for variant, worker in workers.items():
                speeds[variant].append(worker.submit(speed, name, 0.5).result()[0])
    medians = {variant: statistics.median(found) for variant, found in speeds.items()}
    return {"job": name, "busy": busy, "threads": threads, **medians}


def measure(settings: BusySettings) -> list[dict[str, Any]]:
    """Print a table of the jobs; return its figures."""
    most = settings.threads or len(os.sched_getaffinity(0))
    results, rows = [], []
    for name in settings.only:
        for busy in settings.busy:
            found = compared(name, busy, most, settings.rounds)
            one, all_, ours = (found[key] for key in ("one thread", "all threads", "the tool's"))
            row = [name, busy, f"{one:.1f}", f"{all_:.1f}", f"{ours:.1f} ({found['threads']})"]
            results.append(found)
            rows.append([*row, f"{ours / one:.2f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    head = ("job", "busy processes", "one thread", f"{most} threads", "the tool's number")
    print(table((*head, "the tool's / one thread"), rows))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Images per second of small networks beside busy processes."
    return run_benchmark(BusySettings, measure, argv, "busy", what)


if __name__ == "__main__":
    sys.exit(main())
