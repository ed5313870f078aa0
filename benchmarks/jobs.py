"""The tool's jobs against the original's formulations (`benchmarks.textbook`), in the same run.

``python -m benchmarks.jobs [--only JOB,...]``. Each pair computes the same numbers from the same
parameters (tests/test_textbook.py), takes turns, and is reported by medians. Weights are random: no
download, and speed does not depend on them. "roof" is the time that the convolutions' and linear
layers' multiply-accumulates would take at the speed of a large matrix product.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lpips import LPIPS
from torch import Tensor, nn

from benchmarks import textbook
from benchmarks.timing import (
    Measurement,
    Timing,
    interleaved,
    milliseconds,
    run_benchmark,
    some_of,
    table,
)
from Compression.content import ContentParser
from Compression.distillation import Term, perceptual, pixels
from Compression.scores import channel_scores
from Compression.training import Teacher, Trainer
from Evaluation.distances import Distance, Lpips, ParserDistance
from Evaluation.features import Extractor
from Evaluation.inception import FIDInception
from Evaluation.ppl import PathPairs, pair_distances
from Evaluation.sampling import images
from Model.complexity import macs
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet, fold_batch_norm
from Model.generator import Generator, full_size_channels
from train_hyperparams import TrainConfig

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]


def frozen(network: nn.Module) -> Any:
    """A network for inference."""
    return network.eval().requires_grad_(False)


def generator(size: int, ratio: float = 0.0) -> Generator:
    """A generator with random weights, its channels pruned by a ratio."""
    channels = [c - int(c * ratio) for c in full_size_channels(size)]
    return Generator(size, channels=channels)


def published_parsers() -> tuple[ContentParser, ContentParser]:
    """The published face parser's architecture, for the textbook and as this project loads it.

    With random weights it may find no content at all, so every class counts as content.
    """
    network = frozen(BiSeNet())
    plain = textbook.textbook_parser(network)
    parsers = ContentParser(plain), ContentParser(fold_batch_norm(network))
    for content in parsers:
        content.is_content.fill_(1)
    return parsers


@functools.cache
def _factors() -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(1, 2048, 64, 32), torch.randn(2048, 2048, 1, 1)
    packed = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return tuple(packed)  # type: ignore[return-value]


@torch.no_grad()
def matrix_product() -> Tensor:
    """2048 x 2048 times 2048 x 2048 as a 1x1 convolution.

    `torch.mm` calls another library, which on some processors reaches half of its speed.
    """
    return F.conv2d(*_factors())


@dataclass
class Pair:
    """The same work in two formulations.

    ``work`` is the number of multiply-accumulates, or 0 where no roof is told.
    """

    name: str
    textbook: Callable[[], object]
    ours: Callable[[], object]
    work: float = 0


Pairs = Iterator[Pair]


def synthesis(size: int, label: str, ratio: float, batches: Sequence[int]) -> Pairs:
    """Images of the w of a prepared generator."""
    ours = frozen(generator(size, ratio)).prepare("float32")
    theirs = textbook.textbook_generator(ours)
    run_theirs, run_ours = torch.no_grad()(theirs.synthesis), torch.no_grad()(ours.synthesis)
    for batch in batches:
        w = torch.randn(batch, ours.n_latent, 512)
        yield Pair(
            f"generator {size} px {label}, batch {batch}",
            partial(run_theirs, w, "fixed"),
            partial(run_ours, w, "fixed"),
            macs(ours) * batch,
        )


def inference() -> Pairs:
    """Images of the 256 px generator, full size and pruned."""
    yield from synthesis(256, "full size", 0.0, (1, 8))
    yield from synthesis(256, "pruned by 0.7", 0.7, (1, 8))


def large() -> Pairs:
    """Images of the 1024 px generator, pruned."""
    yield from synthesis(1024, "pruned by 0.7", 0.7, (1,))


def scoring(batch: int = 4) -> Pairs:
    """Channel scores of one batch, full size."""
    slow, fast = published_parsers()
    ours = generator(256)
    theirs = textbook.textbook_generator(ours)
    z = torch.randn(batch, 512)
    yield Pair(
        f"scores of {batch} images, 256 px full size",
        lambda: textbook.content_aware_scores(theirs, slow, z, 0.05),
        lambda: channel_scores(
            ours, "content_aware", parser=fast, n_sample=batch, batch_size=batch
        ),
    )


def terms(parser: ContentParser) -> list[Term]:
    """The paper's distillation, with a distance that needs no download."""
    assert isinstance(parser.network, BiSeNet)
    distance = ParserDistance(parser.network)
    return [Term("l1", 3.0, pixels.term()), Term("parser", 3.0, perceptual.term(distance))]


def training() -> Pairs:
    """Iterations with distillation inside the content, 64 px, full-size teacher, batch 4."""
    slow, fast = published_parsers()
    teacher, student, discriminator = generator(64), generator(64, 0.7), Discriminator(64)
    # R1 and path length once in two iterations: every phase, in minutes.
    settings = TrainConfig(batch_size=4, d_reg_every=2, g_reg_every=2)
    ours = Trainer(
        student,
        discriminator,
        settings,
        CPU,
        Teacher(frozen(teacher), fast, terms(fast)),
    )
    theirs = Trainer(
        textbook.textbook_generator(student),
        textbook.TextbookDiscriminator(discriminator),  # type: ignore[arg-type]
        settings,
        CPU,
        Teacher(
            frozen(textbook.textbook_generator(teacher)),
            lambda x: textbook.content_masks(slow, x),
            terms(slow),
        ),
    )
    real = torch.rand(4, 3, 64, 64) * 2 - 1

    def two(trainer: Trainer) -> Callable[[], object]:
        return lambda: [trainer.iterate(real) for _ in range(2)]

    yield Pair("2 training iterations, 64 px", two(theirs), two(ours))


def masks() -> Pairs:
    """Content masks of 8 images, 256 px."""
    slow, fast = published_parsers()
    batch = torch.rand(8, 3, 256, 256) * 2 - 1
    yield Pair(
        "content masks of 8 images, 256 px",
        lambda: textbook.content_masks(slow, batch),
        lambda: fast(batch),
    )


def evaluation() -> Pairs:
    """Images for get_fid.py and pairs for get_ppl.py, pruned 256 px generator, batch 8."""
    ours = frozen(generator(256, 0.7))
    theirs = textbook.textbook_generator(ours)
    slow = frozen(FIDInception())
    fast = frozen(FIDInception()).to(memory_format=torch.channels_last)
    fast.load_state_dict(slow.state_dict())
    lpips = frozen(LPIPS(net="vgg", pnet_rand=True, verbose=False))

    def features(g: Generator, inception: nn.Module) -> Callable[[], Tensor]:
        return lambda: Extractor(inception, "", "")(images(g, range(8), 0))

    def distances(g: Generator, perceptual: Distance) -> Callable[[], object]:
        return lambda: pair_distances(PathPairs(g, 1e-4, 0, False), perceptual, [range(4)])

    yield Pair("get_fid.py, 8 images", features(theirs, slow), features(ours, fast))
    yield Pair("get_ppl.py, 4 pairs", distances(theirs, lpips), distances(ours, Lpips(lpips)))


JOBS: dict[str, Callable[[], Pairs]] = {
    "inference": inference,
    "large": large,
    "scoring": scoring,
    "training": training,
    "masks": masks,
    "evaluation": evaluation,
}
START = "start"


@dataclass(frozen=True, kw_only=True)
class JobSettings(Measurement):
    """Which jobs are measured."""

    only: tuple[str, ...] = some_of([*JOBS, START])


def compared(pair: Pair, rounds: int) -> Result:
    """Time a pair."""
    product = {"gemm": matrix_product} if pair.work else {}
    times = interleaved({"textbook": pair.textbook, "ours": pair.ours, **product}, rounds)
    ratio = times["textbook"].median / times["ours"].median
    result = {"job": pair.name, "ratio": ratio, **{k: asdict(t) for k, t in times.items()}}
    if pair.work:
        roof = pair.work / 2048**3 * times["gemm"].median
        result["share of roof"] = roof / times["ours"].median
    return result


def start(rounds: int) -> Result:
    """Time ``python3 prune.py --help``."""
    command = [sys.executable, str(ROOT / "prune.py"), "--help"]

    def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    times: Timing = interleaved({"ours": run}, rounds)["ours"]
    return {"job": "prune.py --help", "ours": asdict(times)}


def timed(job: str, rounds: int) -> Iterator[Result]:
    """Time the pairs of a job, by its name."""
    if job == START:
        yield start(rounds)
        return
    for pair in JOBS[job]():
        yield compared(pair, rounds)


def row(result: Result) -> list[str]:
    """A line of the table."""
    found = [Timing(**result[name]) if name in result else None for name in ("textbook", "ours")]
    times = [milliseconds(timing) if timing else "" for timing in found]
    ratio = f"{result['ratio']:.2f}" if "ratio" in result else ""
    roof = f"{result['share of roof']:.0%}" if "share of roof" in result else ""
    return [result["job"], *times, ratio, roof]


def measure(settings: JobSettings) -> list[Result]:
    """Print a table of the jobs; return its figures."""
    results: list[Result] = []
    for name in settings.only:
        for result in timed(name, settings.rounds):
            results.append(result)
            print(row(result), file=sys.stderr, flush=True)
    head = ("job", "textbook ms", "ours ms", "textbook / ours", "of the roof")
    print(table(head, [row(result) for result in results]))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Speed of the tool's jobs against the original's formulations."
    return run_benchmark(JobSettings, measure, argv, "jobs", what)


if __name__ == "__main__":
    sys.exit(main())
