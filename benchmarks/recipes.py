"""What an iteration of each recipe costs, relative to cagc.

``python -m benchmarks.recipes [--only RECIPE,...] [--threads N]``. 64 px networks of full width, a
student pruned by 0.7, random weights, batches of 2 whatever the recipe's own. An iteration is the
mean over sixteen: R1 once, path length four times. Times are those of the processor, which others
on the machine change little. Multiply-accumulates are those of convolutions and matrix products,
forwards and backwards, counted on plain PyTorch operators.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
import torchvision
from lpips import LPIPS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.jobs import CPU, frozen, generator, published_parsers
from benchmarks.timing import Timing, interleaved, machine, parser, table, write_json
from Compression import recipes
from Compression.distillation import (
    Term,
    high_band,
    moments,
    perceptual,
    pixels,
    relation,
    weights,
)
from Compression.distillation.teacher_discriminator import adversary
from Compression.distillation.terms import Call, Parts
from Compression.training import Teacher, Trainer
from Evaluation.clip import ClipResNet
from Evaluation.directions import modulation_directions
from Evaluation.embeddings import Embedding
from Model.discriminator import Discriminator
from Model.generator import Generator
from Model.ops.dispatch import VARIABLE
from train_hyperparams import TrainConfig
from Util.device import pick_device
from Util.settings import from_flags

SIZE, BATCH = 64, 2
PHASES = {"plain": (1, 12), "path length": (4, 3), "path length and R1": (16, 1)}
"""An iteration of each kind, and how many of sixteen are of it."""


def _moments() -> Call:
    dino = frozen(torchvision.models.resnet50(weights=None))
    dino.fc = nn.Identity()
    networks = {"dino": Embedding(dino, ""), "clip": Embedding(frozen(ClipResNet()), "")}
    widths = {"dino": 2048, "clip": 1024}
    target = {name: (torch.zeros(n), torch.zeros(n)) for name, n in widths.items()}
    return moments.term(networks, {"dino": 20.0, "clip": 15.0}, target)


def _made(name: str, teacher: Generator) -> Call | Parts:
    """A term with random networks."""
    layer = 2 * (SIZE.bit_length() - 3)
    draw = relation.offsets(modulation_directions(teacher), 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        lpips = frozen(LPIPS(net="vgg", pnet_rand=True, verbose=False))
    makers: dict[str, Callable[[], Call | Parts]] = {
        "l1": pixels.term,
        "perceptual": lambda: perceptual.term(lambda a, b: lpips(a, b)),
        "relation": lambda: relation.term(
            relation.layers_of(teacher), draw, relation.RelationSettings()
        ),
        "moments": _moments,
        "high_band": lambda: Parts(critic=high_band.term(layer, SIZE)),
        "teacher_discriminator": lambda: adversary(Discriminator(SIZE)),
    }
    return makers[name]()


def trainer(name: str) -> Trainer:
    """A trainer of a recipe."""
    settings = from_flags(TrainConfig, recipes.train_values(name))
    teacher = frozen(generator(SIZE))
    terms = [
        Term(term, weight, _made(term, teacher), features=term == "relation")
        for term, weight in weights(settings).items()
    ]
    mask = published_parsers()[1] if settings.content_aware_KD else None
    settings = replace(settings, batch_size=BATCH)
    distils = Teacher(teacher, mask, terms)
    return Trainer(generator(SIZE, 0.7), Discriminator(SIZE), settings, CPU, distils)


def phases(job: Trainer) -> dict[str, Callable[[], object]]:
    """One iteration of each kind."""
    real = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1

    def run(iteration: int) -> object:
        job.iteration = iteration
        return job.iterate(real)

    return {kind: lambda i=i: run(i) for kind, (i, _) in PHASES.items()}  # type: ignore[misc]


def mean(costs: Mapping[str, float]) -> float:
    """Cost of an iteration, of those of the kinds."""
    return sum(costs[kind] * n for kind, (_, n) in PHASES.items()) / 16


@contextmanager
def _plain_operators() -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def macs(job: Trainer) -> float:
    """Multiply-accumulates of an iteration for one image."""
    counts = {}
    with _plain_operators():
        for kind, run in phases(job).items():
            with FlopCounterMode(display=False) as counter:
                run()
            counts[kind] = counter.get_total_flops() / 2 / BATCH
    return mean(counts)


def measure(names: Sequence[str], rounds: int) -> list[dict[str, object]]:
    """Multiply-accumulates and seconds of the recipes' iterations; all recipes take turns."""
    jobs = {name: trainer(name) for name in names}
    variants = {f"{n} {kind}": f for n, job in jobs.items() for kind, f in phases(job).items()}
    times = interleaved(variants, rounds, clock=time.process_time)
    results: list[dict[str, object]] = []
    for name, job in jobs.items():
        parts = {kind: times[f"{name} {kind}"] for kind in PHASES}
        seconds = {
            field: mean({kind: asdict(t)[field] for kind, t in parts.items()})
            for field in ("median", "fastest", "slowest")
        }
        results.append({"recipe": name, "macs": macs(job), "seconds": asdict(Timing(**seconds))})
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON if asked."""
    names = [name for name in recipes.RECIPES if name != "ours"]
    options = parser("Cost of an iteration of each recipe.", names).parse_args(argv)
    pick_device("cpu")
    torch.set_num_threads(options.threads)
    results = measure(options.only, options.rounds)
    first = results[0]
    rows = []
    for result in results:
        seconds, base = (r["seconds"]["median"] for r in (result, first))  # type: ignore[index]
        count, whole = result["macs"], first["macs"]
        assert isinstance(count, float)
        assert isinstance(whole, float)
        rows.append(
            [
                result["recipe"],
                f"{count / 1e9:.1f}",
                f"{count / whole:.2f}",
                f"{seconds:.2f}",
                f"{seconds / base:.2f}",
            ]
        )
    head = ("recipe", "GMACs an image", "ratio", f"s a batch of {BATCH}", "ratio")
    print(machine("cpu"))
    print(table(head, rows))
    write_json(options.json, "cpu", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
