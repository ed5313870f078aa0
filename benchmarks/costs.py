"""What each command costs at real sizes: CPU time an image, peak memory, and disk.

``python -m benchmarks.costs [--only JOB,...] [--sizes 64,256,1024]``. Networks of the published
sizes with random weights, on one thread of a process of its own, after one image to warm up: time
of the processor, which other processes hardly change, and peak memory of the whole process.
``--init reconstruction`` fits to all of its images at once, so it is measured with its own number.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lpips import LPIPS
from torch import Tensor, nn

from benchmarks.jobs import CPU, frozen, generator, published_parsers, terms
from benchmarks.timing import Measurement, run_benchmark, some_of, table
from Compression.initialisation.reconstruction import ReconstructionSettings, reconstruction
from Compression.scores import channel_scores
from Compression.scores.sampling import draw_sampling
from Compression.selection import select_channels
from Compression.surgery import prune_generator
from Compression.training import Teacher, Trainer
from Evaluation.distances import Lpips, at_most
from Evaluation.features import Extractor
from Evaluation.inception import FIDInception
from Evaluation.ppl import PathPairs, pair_distances
from Evaluation.sampling import images
from Model.discriminator import Discriminator
from train_hyperparams import TrainConfig
from Util.device import pick_device
from Util.settings import setting

Work = Callable[[int], object]
"""Does a job's work for N images."""


def pruning(size: int) -> Work:
    """Score the channels of the full-size generator by N images."""
    network, (_, parser) = generator(size), published_parsers()
    return lambda n: channel_scores(
        network, "content_aware", parser=parser, n_sample=n, batch_size=n
    )


def measuring(size: int, ratio: float) -> Work:
    """Make N images and their Inception features."""
    network = frozen(generator(size, ratio))
    inception = frozen(FIDInception()).to(memory_format=torch.channels_last)
    return lambda n: Extractor(inception, "", "")(images(network, range(n), 0))


def path_lengths(size: int) -> Work:
    """Make N pairs of the pruned generator's images and their perceptual distances."""
    pairs = PathPairs(frozen(generator(size, 0.7)), 1e-4, 0, shared_noise=False)
    lpips = Lpips(LPIPS(net="vgg", pnet_rand=True, verbose=False))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return lpips(at_most(a, 256), at_most(b, 256))

    return lambda n: pair_distances(pairs, distance, [range(n)])


def training(size: int) -> Work:
    """Train one iteration on N images without R1 and path length, distilling inside the content."""
    _, parser = published_parsers()
    teacher = Teacher(frozen(generator(size)), parser, terms(parser))
    settings = TrainConfig(r1=0.0, path_regularize=0.0)
    trainer = Trainer(generator(size, 0.7), Discriminator(size), settings, CPU, teacher)
    return lambda n: trainer.iterate(torch.rand(n, 3, size, size) * 2 - 1)


def reconstructing(size: int) -> Work:
    """Fit the filters of a pruned generator to the full-size one by N images."""
    full, (_, parser) = frozen(generator(size)), published_parsers()
    keep = select_channels([torch.rand(width) for width in full.channels], 0.7)
    sampling = draw_sampling(full, parser=parser)

    def work(n: int) -> None:
        options = ReconstructionSettings(init_n_sample=n)
        reconstruction(prune_generator(full, keep), full, keep, replace(sampling, options=options))

    return work


OWN_N = {"reconstruct": ReconstructionSettings().init_n_sample}
"""Images of the jobs whose cost is not proportional to them."""
JOBS: Mapping[str, Callable[[int], Work]] = {
    "prune": pruning,
    "reconstruct": reconstructing,
    "train": training,
    "fid-full": lambda size: measuring(size, 0.0),
    "fid-pruned": lambda size: measuring(size, 0.7),
    "ppl-pruned": path_lengths,
}


@dataclass(frozen=True, kw_only=True)
class CostSettings(Measurement):
    """Which jobs are measured, and how."""

    only: tuple[str, ...] = some_of(JOBS)
    sizes: tuple[int, ...] = setting((64, 256, 1024), "sides of the images in px")
    n: int = setting(2, "images in a batch", low=1, metavar="N")


def _peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def cost(job: str, size: int, n: int) -> tuple[float, float]:
    """Measure a job in this process: seconds of the processor for an image, and peak GiB."""
    torch.set_num_threads(1)
    pick_device("cpu")
    work = JOBS[job](size)
    work(1)  # compiles and warms up
    start = time.process_time()
    work(n)
    return (time.process_time() - start) / n, _peak_gib()


def megabytes(*networks: nn.Module) -> float:
    """Size of the tensors of networks, in millions of bytes."""
    return sum(t.nbytes for network in networks for t in network.state_dict().values()) / 1e6


def disk(size: int) -> list[str]:
    """Sizes of a full, a pruned and a training checkpoint, computed without making the networks."""
    with torch.device("meta"):
        full, small, critic = generator(size), generator(size, 0.7), Discriminator(size)
    # Adam keeps two values for every trained one.
    moments = 2 * sum(p.nbytes for net in (small, critic) for p in net.parameters()) / 1e6
    sizes = (
        megabytes(full, full, critic),
        megabytes(small, small, critic),
        megabytes(small, small, critic) + moments,
    )
    return [f"{value:.0f}" for value in sizes]


def measure(settings: CostSettings) -> dict[str, Any]:
    """Print the tables; return their figures."""
    found: dict[str, Any] = {}
    rows = []
    for job in settings.only:
        for size in settings.sizes:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                n = OWN_N.get(job, settings.n)
                seconds, peak = pool.submit(cost, job, size, n).result()
            found[f"{job} {size}"] = {"seconds": seconds, "gib": peak}
            rows.append([job, size, n, f"{seconds:.2f}", f"{peak:.2f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(("job", "px", "images", "CPU seconds an image", "peak GiB"), rows))
    sizes = {size: disk(size) for size in settings.sizes}
    print(table(("px", "full MB", "pruned MB", "of a run MB"), [[k, *v] for k, v in sizes.items()]))
    return found | {"disk": sizes}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_benchmark(
        CostSettings, measure, argv, "costs", "What each command costs at real sizes."
    )


if __name__ == "__main__":
    sys.exit(main())
