"""Widths under a budget: what each allocation makes of the bundled generator, and what it costs.

``python -m benchmarks.widths [--only NAME,...] [--seeds N] [--threads N]``. No row has more
multiply-accumulates than a remove ratio of 0.7 leaves. A short distillation without GAN losses
says which widths are worth more; three in four of its iterations leave the parser distance out:

    15 * L1 + 3 * parser distance inside the content, Adam 0.005 falling as a cosine to 0,
    pictures of the teacher drawn beforehand

Distances are means over other latents, inside the content; the lowest is best. Seconds are of the
processor, for one picture. ``--sizes 256,1024`` adds the time of full-width generators with
random weights by uniform and by power widths.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.jobs import frozen
from benchmarks.timing import Measurement, Timing, interleaved, run_benchmark, some_of, table
from Compression.allocation import ALLOCATIONS, AllocationSettings, Budget, Problem, Widths
from Compression.allocation.costs import costs_like
from Compression.content import load_content_parser
from Compression.initialisation import INITIALISATIONS
from Compression.scores import SCORES
from Compression.scores.sampling import Sampling, draw_sampling
from Compression.selection import kept_count, select_widths
from Compression.surgery import prune_generator
from Evaluation.comparison import content_l1
from Evaluation.distances import load_distance
from Model import bundled, checkpoint
from Model.complexity import macs, parameters
from Model.generator import Generator
from Util.progress import track
from Util.settings import from_flags, setting
from Util.streams import stream

CPU = torch.device("cpu")
RATIO = 0.7
BATCH, PARSED, EVERY = 16, 8, 4
"""Pictures of an iteration; those of them whose parser distance counts, in every so-many-th."""
POOL, JUDGED, SCORED = 1536, 128, 400


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table.

    Attributes:
        allocation: how the widths are chosen.
        init: how what remains is initialised.
        metric: how the channels that remain are chosen.
        flags: settings of these, by name.
    """

    allocation: str = "uniform"
    init: str = "pruned"
    metric: str = "content_aware"
    flags: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = {
    "uniform": Variant(),
    "power 0.5": Variant(allocation="power", flags={"power_exponent": 0.5}),
    "power 1": Variant(allocation="power", flags={"power_exponent": 1.0}),
    "power 2": Variant(allocation="power", flags={"power_exponent": 2.0}),
    "spectrum": Variant(allocation="spectrum"),
    "spectrum untied": Variant(allocation="spectrum", flags={"allocation_tie": False}),
    "greedy": Variant(allocation="greedy"),
    "greedy untied": Variant(allocation="greedy", flags={"allocation_tie": False}),
    "greedy in 3 rounds": Variant(allocation="greedy", flags={"allocation_rounds": 3}),
    "greedy in fours": Variant(allocation="greedy", flags={"round_to": 4}),
    "uniform reconstructed": Variant(init="reconstruction"),
    "greedy reconstructed": Variant(allocation="greedy", init="reconstruction"),
    "uniform reconstructed in 24 steps": Variant(init="reconstruction", flags={"init_steps": 24}),
    "uniform by subset": Variant(metric="subset"),
    "uniform by subset reconstructed": Variant(metric="subset", init="reconstruction"),
}


@dataclass(frozen=True, kw_only=True)
class WidthSettings(Measurement):
    """Settings of the benchmark."""

    only: tuple[str, ...] = some_of(VARIANTS)
    iterations: int = setting(300, "of the distillation; 0 leaves it out", low=0, metavar="N")
    seeds: int = setting(1, "distillations of each row, with other seeds", low=1, metavar="N")
    sizes: tuple[int, ...] = setting((), "sides in px of full-width generators to time too")


class Bench:
    """The teacher, its parser, its pictures, and its scores."""

    def __init__(self) -> None:
        self.teacher = frozen(checkpoint.load_generator(bundled.MODEL))
        self.mask = load_content_parser(bundled.PARSER, CPU)
        self.perceptual = load_distance("parser", None, lambda: bundled.PARSER, CPU)
        self.costs = costs_like(self.teacher)

    def sampling(self) -> Sampling:
        """What scores, allocations and initialisations draw on."""
        return draw_sampling(self.teacher, parser=self.mask, n_sample=SCORED, seed=11)

    @cache  # noqa: B019
    def scores(self, metric: str) -> list[Tensor]:
        """Score the teacher's channels."""
        return SCORES[metric].compute(self.teacher, self.sampling())

    @torch.no_grad()
    def pictures(self, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw z (n, style_dim), the teacher's pictures of them, and their masks."""
        z = torch.randn(n, self.teacher.style_dim, generator=stream(seed, 0))
        made = [self.teacher([part], randomize_noise=False) for part in z.split(32)]
        return z, torch.cat(made), torch.cat([self.mask(images) for images in made])

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures to learn from."""
        return self.pictures(POOL, 123)

    @cached_property
    def judges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures to be judged by."""
        return self.pictures(JUDGED, 77)

    def widths(self, variant: Variant) -> Widths:
        """Choose widths for the cost of the ratio."""
        kind, full = ALLOCATIONS[variant.allocation], self.teacher.channels
        most = self.costs[0]([kept_count(c, RATIO) for c in full])
        budget = Budget(full, *self.costs, most, from_flags(AllocationSettings, variant.flags))
        options = from_flags(kind.options, variant.flags) if kind.options else None
        sampling = replace(self.sampling(), options=options)
        return kind.function(Problem(self.teacher, self.scores(variant.metric), sampling, budget))

    def student(self, variant: Variant, widths: Widths) -> Generator:
        """Prune to the widths and initialise."""
        keep = select_widths(self.scores(variant.metric), widths)
        made = prune_generator(self.teacher, keep)
        kind = INITIALISATIONS[variant.init]
        options = from_flags(kind.options, variant.flags) if kind.options else None
        kind.function(made, self.teacher, keep, replace(self.sampling(), options=options))
        return made

    def distil(self, student: Generator, iterations: int, seed: int) -> None:
        """Train a student on the pool, see the module."""
        for layer in student.styled_convs:
            layer.noise.weight.requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, 0.005, betas=(0.0, 0.99))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for i, (z, target, mask) in enumerate(_batches(self.pool, iterations, seed)):
            made = student([z])
            loss = 15 * ((made - target).abs() * mask).mean()
            if i % EVERY == 0:
                pair = [(x * mask)[:PARSED] for x in (made, target)]
                loss = loss + 3 * EVERY * self.perceptual(*pair).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()

    @torch.no_grad()
    def judge(self, student: Generator) -> tuple[float, float]:
        """L1 and parser distance to the teacher inside the content."""
        z, target, mask = self.judges
        made = torch.cat([student([part], randomize_noise=False) for part in z.split(32)])
        return (
            content_l1(made, target, mask),
            self.perceptual(made * mask, target * mask).mean().item(),
        )


def _batches(
    pool: Sequence[Tensor], iterations: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw batches without repetition within a pass over the pool."""
    order, draws = torch.empty(0, dtype=torch.long), torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        if len(order) < BATCH:
            order = torch.randperm(len(pool[0]), generator=draws)
        now, order = order[:BATCH], order[BATCH:]
        z, target, mask = (values[now] for values in pool)
        yield z, target, mask


def seconds(networks: Mapping[str, Generator], rounds: int) -> dict[str, Timing]:
    """Time one picture of each network, in turns."""

    def job(network: Generator) -> Callable[[], object]:
        w = torch.randn(1, network.n_latent, network.style_dim)

        @torch.no_grad()
        def run() -> None:
            network.synthesis(w, "fixed")

        return run

    jobs = {n: job(frozen(network).prepare("float32")) for n, network in networks.items()}
    return interleaved(jobs, rounds, clock=time.process_time)


def full_width(size: int) -> dict[str, Generator]:
    """Full-width generators of a size with random weights, narrowed by their shape alone."""
    with torch.device("meta"):
        full = Generator(size)
    counts = costs_like(full)
    most = counts[0]([kept_count(c, RATIO) for c in full.channels])
    sampling = draw_sampling(full, n_sample=1)
    networks = {}
    for name, limits, flags in (
        ("uniform", {}, {}),
        ("power", {"round_to": 8, "min_channels": 16}, {"power_exponent": 0.5}),
        ("power", {"round_to": 8, "min_channels": 16}, {"power_exponent": 1.0}),
    ):
        kind = ALLOCATIONS[name]
        budget = Budget(full.channels, *counts, most, from_flags(AllocationSettings, limits))
        options = from_flags(kind.options, flags) if kind.options else None
        problem = Problem(full, (), replace(sampling, options=options), budget)
        title = " ".join([f"{size} px, {name}", *(f"{v:g}" for v in flags.values())])
        networks[title] = Generator(size, channels=kind.function(problem))
    return networks


def _row(name: str, network: Generator, timing: Timing, distances: Sequence[str]) -> list[str]:
    widths = " ".join(map(str, network.channels))
    cost = [f"{macs(network):,}", f"{parameters(network):,}"]
    return [name, widths, *cost, *distances, f"{1e3 * timing.median:.1f}"]


def measure(settings: WidthSettings) -> dict[str, Any]:
    """Print the table; return the numbers."""
    bench = Bench()
    students: dict[str, Generator] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in track(settings.only, len(settings.only), "measuring", "row"):
        widths = bench.widths(VARIANTS[name])
        distances = []
        for seed in range(100, 100 + settings.seeds):
            students[name] = bench.student(VARIANTS[name], widths)
            if settings.iterations:
                bench.distil(students[name], settings.iterations, seed)
            distances.append(bench.judge(students[name]))
        found[name] = {"widths": widths, "distances": distances}
    rows = []
    for name, timing in seconds(students, settings.rounds).items():
        l1, parser = zip(*found[name]["distances"], strict=True)
        cells = [f"{mean(values):.4f}" for values in (l1, parser)]
        rows.append(_row(name, students[name], timing, cells))
        found[name]["seconds"] = timing.median
    for size in settings.sizes:
        networks = full_width(size)
        for name, timing in seconds(networks, settings.rounds).items():
            rows.append(_row(name, networks[name], timing, ("", "")))
            found[name] = {"widths": networks[name].channels, "seconds": timing.median}
    head = ["widths by", "widths", "MACs", "parameters", "L1", "parser distance", "ms a picture"]
    print(table(head, rows))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Widths under a budget: distances after a short distillation, and time."
    return run_benchmark(WidthSettings, measure, argv, "widths", what)


if __name__ == "__main__":
    sys.exit(main())
