"""What training and evaluation take at 256 and 1024 px, counted from shapes alone.

``python -m benchmarks.memory --fake``. Nothing is allocated but the networks (`Util.memory`), so
this tells on any machine what a GPU would have to hold: the published architectures, pruned by 0.7,
float32. LPIPS and parser have random weights: no download.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lpips import LPIPS
from torch import Tensor, nn

from benchmarks.jobs import CPU, frozen, generator, published_parsers
from benchmarks.timing import table
from Compression.batch_memory import need
from Compression.distillation import Term, perceptual, pixels
from Compression.scores import channel_scores
from Compression.training import Teacher, Trainer
from Evaluation import sampling
from Evaluation.distances import Lpips
from Evaluation.features import Extractor
from Evaluation.inception import FIDInception
from Evaluation.ppl import PathPairs, pair_distances
from Evaluation.projection import project
from Model.discriminator import Discriminator
from train_hyperparams import TrainConfig
from Util import memory
from Util.memory import imagined

GIB = 2**30
BATCHES = {256: (2, 8, 16), 1024: (1, 2, 4)}
"""Images of a process in training, by their size in px."""


def lpips() -> Any:
    """LPIPS with random weights."""
    return Lpips(LPIPS(net="vgg", pnet_rand=True, verbose=False))


def trainer(size: int) -> Trainer:
    """The paper's retraining: full-size teacher, student pruned by 0.7, L1 and LPIPS in a mask."""
    distance, parser = lpips(), published_parsers()[1]
    terms = [
        Term("l1", 3.0, pixels.term()),
        Term("lpips", 3.0, perceptual.term(lambda a, b: distance(a, b).flatten())),
    ]
    teacher = Teacher(frozen(generator(size)), parser, terms)
    return Trainer(generator(size, 0.7), Discriminator(size), TrainConfig(), CPU, teacher)


def network_bytes(*networks: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = (t for n in networks for t in (*n.parameters(), *n.buffers()))
    return sum(t.numel() * t.element_size() for t in tensors)


def training() -> list[dict[str, Any]]:
    """Count an iteration of training for sizes and batches."""
    results = []
    for size, batches in BATCHES.items():
        whole = trainer(size)
        assert whole.teacher
        nets = (whole.generator, whole.g_ema, whole.discriminator, whole.teacher.generator)
        for batch in batches:
            whole.settings = replace(whole.settings, batch_size=batch)
            counted = {"networks": network_bytes(*nets), "iteration": need(whole).peak}
            results.append({"size": size, "batch": batch, **counted})
    return results


@dataclass
class Job:
    """A part of an evaluation.

    Attributes:
        name: what is done.
        unit: what is counted.
        asked: of them at once, by default.
        bounded: of them at once, by the pixels of an image.
        run: computes so many.
    """

    name: str
    unit: str
    asked: int
    bounded: int
    run: Callable[[int], object]


def evaluations(size: int) -> Iterator[Job]:
    """The full-size generator's evaluations, and its scoring."""
    full, inception, distance = frozen(generator(size)), frozen(FIDInception()), lpips()
    parser = published_parsers()[1]
    extractor, inference = Extractor(inception, "", ""), memory.INFERENCE

    def flat(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b).flatten()

    def projection(n: int) -> object:
        return project(full, torch.empty(n, 3, size, size), small, optimizer="adam", num_iters=1)

    def small(a: Tensor, b: Tensor) -> Tensor:
        return flat(perceptual.at_most(a, 256), perceptual.at_most(b, 256))

    def scores(n: int) -> object:
        return channel_scores(full, "content_aware", parser=parser, n_sample=n, batch_size=n)

    yield Job(
        "images and Inception features", "images", 64, memory.at_once(size, inference, 64),
        lambda n: extractor(sampling.images(full, range(n), 0)),
    )  # fmt: skip
    yield Job(
        "path length", "pairs", 50, memory.at_once(size, inference // 2, 50),
        lambda n: pair_distances(PathPairs(full, 1e-4, 0, False), small, [range(n)]),
    )  # fmt: skip
    yield Job(
        "sample grid", "images", 16, memory.at_once(size, inference, 16),
        lambda n: sampling.images(full, range(n), 0),
    )  # fmt: skip
    yield Job("projection", "pictures", 8, memory.at_once(size, memory.GRADIENTS, 8), projection)
    yield Job("scoring", "images", 10, memory.at_once(size, memory.SCORING, 10), scores)


def evaluating() -> list[dict[str, Any]]:
    """Count what evaluations take as they are bounded, and without the bound."""
    results = []
    for size in BATCHES:
        for job in evaluations(size):
            found: dict[str, Any] = {"size": size, "job": job.name, "unit": job.unit}
            for kind, n in (("bounded", job.bounded), ("asked", job.asked)):
                with imagined(None) as (_, meter):
                    job.run(n)
                found |= {kind: n, f"{kind} bytes": meter.peak}
            results.append(found)
    return results


def report() -> dict[str, Any]:
    """Print both tables; return their figures."""
    trained, evaluated = training(), evaluating()
    rows = []
    for r in trained:
        parts = (r["networks"], r["iteration"], r["networks"] + r["iteration"])
        rows.append([r["size"], r["batch"], *(f"{part / GIB:.2f}" for part in parts)])
    print(
        table(("px", "images", "networks GiB", "iteration GiB", "together GiB"), rows), "", sep="\n"
    )
    rows = [
        [
            r["size"], r["job"], f"{r['bounded']} {r['unit']}", f"{r['bounded bytes'] / GIB:.2f}",
            r["asked"], f"{r['asked bytes'] / GIB:.2f}",
        ]
        for r in evaluated
    ]  # fmt: skip
    print(table(("px", "job", "at once", "GiB", "without the bound", "GiB"), rows))
    return {"training": trained, "evaluation": evaluated}
