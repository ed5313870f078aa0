"""What an iteration of each recipe costs, relative to cagc.

``python -m benchmarks.recipes [--only RECIPE,...] [--threads N]``. Multiply-accumulates: full-size
teachers at 64 and 256 px, students pruned by 0.7; convolutions and matrix products, forwards and
backwards, of plain PyTorch operators, counted without computing them. Times: the bundled 64 px
model's widths, random weights, batches of 4 whatever the recipe's own, in seconds of the processor.
An iteration is the mean over sixteen: R1 once, path length four times.
"""

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torchvision
from lpips import LPIPS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.jobs import frozen, generator, published_parsers
from benchmarks.timing import (
    Measurement,
    Timing,
    interleaved,
    run_benchmark,
    some_of,
    table,
)
from Compression import distillation, recipes
from Compression.content import load_content_parser
from Compression.distillation import (
    Parts,
    Term,
    high_band,
    moments,
    perceptual,
    pixels,
    relation,
    teacher_discriminator,
)
from Compression.distillation.terms import Call
from Compression.optimisation import Part, Update
from Compression.training import Teacher, Trainer
from Evaluation.clip import ClipResNet
from Evaluation.directions import modulation_directions
from Evaluation.embeddings import Embedding
from Model import bundled, checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from Model.onnx import plain_operators
from train_hyperparams import TrainConfig
from Util.settings import from_flags

CPU, META = torch.device("cpu"), torch.device("meta")
BATCH = 4
PHASES = {"plain": (1, 12), "path length": (4, 3), "path length and R1": (16, 1)}
"""An iteration of each kind, and how many of sixteen are of it."""


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(Measurement):
    """Settings of the benchmark."""

    only: tuple[str, ...] = some_of(
        name for name in recipes.RECIPES if name not in ("ours", "combined")
    )


class Operations(TorchDispatchMode):
    """Count the multiply-accumulates of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func._overloadpacket)
        if cost is not None:
            self.count += cost(*args, **(kwargs or {}), out_val=out) / 2
        return out


class CountedTrainer(Trainer):
    """A trainer that only counts: its tensors have no values, so it cannot look at them."""

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)

    def _look(self, now: bool) -> None:
        pass

    def _step(
        self,
        update: Update,
        phase: str,
        parts: Sequence[Part],
        loss_of: Callable[[Part], Tensor],
    ) -> dict[str, Tensor]:
        update.gradients.start()
        for part in parts:
            loss_of(part).backward()
        return {}


def _moments(device: torch.device) -> Call:
    dino = frozen(torchvision.models.resnet50(weights=None)).to(device)
    dino.fc = nn.Identity()
    clip = frozen(ClipResNet()).to(device)
    target = {
        name: (torch.zeros(n, device=device),) * 2 for name, n in (("dino", 2048), ("clip", 1024))
    }
    networks = {"dino": Embedding(dino, ""), "clip": Embedding(clip, "")}
    return moments.term(networks, {"dino": 20.0, "clip": 15.0}, target)


def _perceptual(device: torch.device) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        lpips = frozen(LPIPS(net="vgg", pnet_rand=True, verbose=False)).to(device)
    return perceptual.term(lambda a, b: lpips(a, b))


def _made(name: str, teacher: Generator, widths: Sequence[int]) -> Call | Parts:
    """Make a term with random networks."""
    makers: dict[str, Callable[[], Call | Parts]] = {
        "l1": pixels.term,
        "perceptual": lambda: _perceptual(teacher.device),
        "relation": lambda: relation.term(
            relation.layers_of(teacher),
            relation.offsets(modulation_directions(teacher), 5.0),
            relation.RelationSettings(),
        ),
        "moments": lambda: _moments(teacher.device),
        "high_band": lambda: Parts(critic=high_band.term(8, 64)),
        "teacher_discriminator": lambda: teacher_discriminator.adversary(
            Discriminator(teacher.size, channels=widths).to(teacher.device)
        ),
    }
    return makers[name]()


def trainer(
    name: str, teacher: Generator, student: Generator, parser: nn.Module, kind: type[Trainer]
) -> Trainer:
    """Make a trainer of a recipe, on the teacher's device."""
    device, widths = teacher.device, teacher.channels[1::2]
    settings = from_flags(TrainConfig, recipes.train_values(name))
    terms = [
        Term(term, weight, _made(term, teacher, widths), distillation.TERMS[term].features)
        for term, weight in distillation.weights(settings).items()
    ]
    mask = parser if settings.content_aware_KD else None
    network = Discriminator(teacher.size, channels=widths)
    settings = replace(settings, batch_size=BATCH)
    return kind(student, network, settings, device, Teacher(teacher, mask, terms))


def phases(job: Trainer) -> dict[str, Callable[[], object]]:
    """Give functions that run one iteration of each kind."""
    real = torch.zeros(BATCH, 3, job.generator.size, job.generator.size, device=job.device)

    def run(iteration: int) -> object:
        job.iteration = iteration
        return job.iterate(real)

    return {kind: lambda i=i: run(i) for kind, (i, _) in PHASES.items()}  # type: ignore[misc]


def mean(costs: Mapping[str, float]) -> float:
    """Average the costs of the kinds."""
    return sum(costs[kind] * n for kind, (_, n) in PHASES.items()) / 16


def macs(name: str, size: int) -> float:
    """Count the multiply-accumulates of a recipe's iteration for one image."""
    teacher, student = frozen(generator(size)).to(META), generator(size, 0.7).to(META)
    parser = published_parsers()[1].to(META)
    job = trainer(name, teacher, student, parser, CountedTrainer)
    counts = {}
    with plain_operators():
        for kind, run in phases(job).items():
            with Operations() as operations:
                run()
            counts[kind] = operations.count / BATCH
    return mean(counts)


def seconds(names: Sequence[str], rounds: int) -> dict[str, Timing]:
    """Time the recipes' iterations on the bundled model's widths; all recipes take turns."""
    teacher = frozen(checkpoint.load_generator(bundled.MODEL))
    content = load_content_parser(bundled.PARSER, CPU)
    widths = [c - int(0.7 * c) for c in teacher.channels]
    variants: dict[str, Callable[[], object]] = {}
    for name in names:
        student = teacher.like(widths)
        job = trainer(name, teacher, student, content, Trainer)
        variants |= {f"{name} {kind}": run for kind, run in phases(job).items()}
    times = interleaved(variants, rounds, clock=time.process_time)
    found = {}
    for name in names:
        parts = {kind: asdict(times[f"{name} {kind}"]) for kind in PHASES}
        fields = ("median", "fastest", "slowest")
        found[name] = Timing(*(mean({k: t[field] for k, t in parts.items()}) for field in fields))
    return found


def measure(settings: RecipeSettings) -> dict[str, Any]:
    """Print the table; return the numbers."""
    counts = {size: {name: macs(name, size) for name in settings.only} for size in (64, 256)}
    times = seconds(settings.only, settings.rounds)
    columns: list[tuple[str, dict[str, float], float, int]] = [
        (f"GMACs an image, {size} px", found, 1e-9, 0) for size, found in counts.items()
    ]
    columns.append((f"s a batch of {BATCH}", {k: t.median for k, t in times.items()}, 1, 2))
    head, rows = ["recipe"], [[name] for name in settings.only]
    for title, found, unit, digits in columns:
        head += [title, "ratio"]
        for row in rows:
            value, first = found[row[0]], found[settings.only[0]]
            row += [f"{value * unit:.{digits}f}", f"{value / first:.2f}"]
    print(table(head, rows))
    results: dict[str, Any] = {f"macs_{size}": found for size, found in counts.items()}
    return results | {"seconds": {name: asdict(timing) for name, timing in times.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Cost of an iteration of each recipe."
    return run_benchmark(RecipeSettings, measure, argv, "recipes", what)


if __name__ == "__main__":
    sys.exit(main())
