"""The bundled models in one table: cost, speed here, and what compression did to the pictures.

``python -m benchmarks.bundled_models [--also FILE...]`` prints it as Markdown.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from Compression.content import ContentParser, load_content_parser
from Compression.pruning import PruneSettings, prune
from Dataset.batches import in_order
from Dataset.images import Images
from Dataset.loading import load_batches
from Evaluation import attributes, feature_statistics, sampling
from Evaluation.comparison import content_l1
from Evaluation.distances import Distance, load_distance
from Evaluation.feature_sets import sampled_features
from Evaluation.features import Extractor, make_extractor
from Evaluation.metrics import evaluate
from Evaluation.ppl import path_length
from Model import bundled
from Model.attribute_classifier import AttributeClassifier
from Model.checkpoint import load_attribute_classifier, load_generator
from Model.complexity import macs, parameters
from Model.generator import Generator
from Util.cli import run_settings
from Util.progress import track
from Util.settings import Settings, setting

Row = dict[str, str]


def speeds(networks: Mapping[str, Generator], batch: int, rounds: int = 7) -> dict[str, float]:
    """Time the networks in turns: images per second of each, medians of the rounds."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name, network in networks.items():
            w = torch.randn(batch, network.n_latent, network.style_dim)
            start = time.perf_counter()
            with torch.no_grad():
                for _ in range(4):
                    network.synthesis(w, "fixed")
            times[name].append((time.perf_counter() - start) / (4 * batch))
    return {name: 1 / median(taken[1:]) for name, taken in times.items()}


@torch.no_grad()
def to_teacher(
    student: Generator, teacher: Generator, mask: ContentParser, perceptual: Distance, n: int
) -> tuple[float, float]:
    """Compare a student's pictures with its teacher's inside the content: L1 and perceptual."""
    l1, distances = [], []
    for part in sampling.shares(n, 50):
        ours, target = (
            sampling.images(g, part, seed=1, fixed_noise=True) for g in (student, teacher)
        )
        inside = mask(target)
        l1.append(content_l1(ours, target, inside) * len(part))
        distances.append(perceptual(ours * inside, target * inside))
    return sum(l1) / n, torch.cat(distances).mean().item()


@torch.no_grad()
def shown_attributes(generator: Generator, judge: AttributeClassifier, n: int) -> attributes.Values:
    """Name the attributes of what a generator shows."""
    parts = sampling.shares(n, 50)
    images = [sampling.images(generator, part, seed=1, fixed_noise=True) for part in parts]
    return attributes.values_of(judge, torch.cat(images))


def frechet(generator: Generator, extractor: Extractor, file: Path, n: int) -> float:
    """Compute the Frechet distance to bundled statistics of the real images."""
    features = sampled_features(generator, extractor, n, batch_size=50, seed=0)
    real = feature_statistics.load(file)
    (value,) = evaluate(["fid"], extractor, features, real, seed=0).values()
    return value


def rows(networks: Mapping[str, Generator], n_sample: int, n_pairs: int) -> dict[str, Row]:
    """Measure every network; figures by column."""
    device = torch.device("cpu")
    parser = load_content_parser(bundled.PARSER, device)
    perceptual = load_distance("parser", None, lambda: bundled.PARSER, device)
    judge = load_attribute_classifier(bundled.ATTRIBUTES)
    kinds = (("attributes", None), ("parser", None), ("parser", load_content_parser))
    extractors = [
        make_extractor(features, None, bundled.PARSER, load_mask, device)
        for features, load_mask in kinds
    ]
    files = (bundled.ATTRIBUTE_STATISTICS, bundled.STATISTICS, bundled.CONTENT_STATISTICS)
    per_second = speeds(networks, batch=16)
    teacher = next(iter(networks.values()))
    wanted = shown_attributes(teacher, judge, n_sample)
    table = {}
    for name, network in track(networks.items(), len(networks), "measuring", "model"):
        judged, whole, content = (
            frechet(network, extractor, file, n_sample)
            for extractor, file in zip(extractors, files, strict=True)
        )
        shares = attributes.agreement(shown_attributes(network, judge, n_sample), wanted)
        shared = attributes.summary(shares, judge)
        l1, distance = to_teacher(network, teacher, parser, perceptual, n=500)
        path = path_length(network, perceptual, "standard", n_pairs)
        table[name] = {
            "parameters": f"{parameters(network):,}",
            "MACs": f"{macs(network):,}",
            "images/s": f"{per_second[name]:.0f}",
            "attributes shared with the teacher inside": f"{shared['inside']:.3f}",
            "outside": f"{shared['outside']:.3f}",
            "Frechet attribute distance": f"{judged:.1f}",
            "Frechet parser distance": f"{whole:.3f}",
            "inside the content": f"{content:.3f}",
            "L1 to the teacher inside": f"{l1:.4f}",
            "parser distance to it inside": f"{distance:.4f}",
            "PPL (standard, parser)": f"{path:.1f}",
        }
    return table


@torch.no_grad()
def content_shares(
    networks: Mapping[str, Generator], parser: ContentParser, path: Path | None, n: int = 500
) -> str:
    """Compute the share of pixels inside the content mask, of generated and of real pictures."""
    parts = list(sampling.shares(n, 50))
    shares = {
        name: [parser(sampling.images(network, part, seed=1)).mean() for part in parts]
        for name, network in networks.items()
    }
    if path is not None:
        size = next(iter(networks.values())).size
        real = load_batches(Images(path, size), in_order(n, 50))
        shares["real"] = [parser(images).mean() for images in real]
    values = {name: torch.stack(found).mean().item() for name, found in shares.items()}
    return "content pixels: " + ", ".join(f"{name} {value:.1%}" for name, value in values.items())


def markdown(table: Mapping[str, Row]) -> str:
    """Format a table with one row for each network."""
    columns = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row.values()) + " |" for name, row in table.items()]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class TableSettings(Settings):
    """Settings of the table."""

    n_sample: int = setting(5000, "images for the Frechet distances", low=113)
    path: Path | None = setting(
        None, "real images, whose share of content is told too", metavar="DIR"
    )
    n_pairs: int = setting(1000, "pairs for the path length", low=1)
    also: tuple[Path, ...] = setting(
        (), "further compressed models, a row each", nargs="+", metavar="FILE"
    )


def run(settings: TableSettings) -> None:
    """Measure and print."""
    with TemporaryDirectory() as folder:
        pruned = prune(PruneSettings(out=Path(folder) / "pruned.pt", device="cpu")).pruned
    networks = {"teacher": load_generator(bundled.MODEL), "pruned": pruned}
    if bundled.COMPRESSED.is_file():
        networks["retrained"] = load_generator(bundled.COMPRESSED)
    networks |= {str(file): load_generator(file) for file in settings.also}
    for network in networks.values():
        network.eval().requires_grad_(False)
    print(markdown(rows(networks, settings.n_sample, settings.n_pairs)))
    parser = load_content_parser(bundled.PARSER, torch.device("cpu"))
    print(content_shares(networks, parser, settings.path))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    prog = "python -m benchmarks.bundled_models"
    return run_settings(TableSettings, run, argv, prog=prog, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
