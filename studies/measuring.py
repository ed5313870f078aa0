"""What a study measures of a student, by a judge that no training sees.

Student and teacher make pictures of the same latents with their stored layer noise. "Inside" is
the content mask of the teacher's pictures, "outside" the rest; real pictures have their own masks.
The parser that makes the masks takes part in training, so its features judge nothing here (but for
the path length, whose distance it is, as everywhere for the bundled models).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from Compression.content import load_content_parser
from Dataset.images import Images
from Dataset.toon_attributes import ATTRIBUTES
from Evaluation import attributes, feature_statistics, fid, precision_recall, sampling
from Evaluation.distances import load_distance
from Evaluation.feature_statistics import Statistics
from Evaluation.features import fingerprint
from Evaluation.ppl import path_length
from Model import bundled
from Model.checkpoint import load_attribute_classifier, load_generator
from Model.generator import Generator
from Util.files import atomic_path, read_npz

CPU = torch.device("cpu")
BATCH = 100
PAIRS = 200
"""Pairs of the path length: few, it is the least of the figures."""
SEED_OFFSET = 1000
"""Latents that are measured have other seeds than those that are scored or trained on."""

GROUPS: dict[str, tuple[str, ...]] = {
    "l1": ("l1_inside", "l1_outside"),
    "agreement": (
        *("agreement", "agreement_inside", "agreement_outside", "variety"),
        *(f"agreement:{name}" for name in ATTRIBUTES),
    ),
    "frechet": ("frechet", "frechet_inside"),
    "pr": ("precision", "recall"),
    "ppl": ("ppl",),
}
"""Every figure, by the group that is measured at once."""

HIGHER_IS_BETTER = {
    figure: group in ("agreement", "pr") for group, figures in GROUPS.items() for figure in figures
}
"""Which way a figure improves."""


@dataclass(frozen=True)
class Passes:
    """What student and teacher made of the same latents.

    Attributes:
        l1_inside: mean absolute difference per value inside the masks.
        l1_outside: outside.
        values: of the attributes, by the judge: the student's, and the teacher's.
        features: of the judge, of the student's whole pictures, (N, D).
        content_features: of the same inside the masks.
    """

    l1_inside: float
    l1_outside: float
    values: tuple[attributes.Values, attributes.Values]
    features: Tensor
    content_features: Tensor


class Judge:
    """Measures students against one teacher.

    Args:
        teacher: its checkpoint.
        n: latents.
        seed: of the study's job; its latents are the same for all arms.
        real: folder of real pictures that no training saw.
        cache: folder for what is computed once.
    """

    def __init__(self, teacher: Path, n: int, seed: int, real: Path, cache: Path) -> None:
        self.teacher = load_generator(teacher).eval().requires_grad_(False)
        self.classifier = load_attribute_classifier(bundled.ATTRIBUTES)
        self.n, self.seed, self.real, self.cache = n, seed + SEED_OFFSET, real, cache
        self.mark = f"{fingerprint(bundled.ATTRIBUTES)}_{fingerprint(bundled.PARSER)}"
        self.teacher_mark = fingerprint(teacher)

    @cached_property
    def parser(self) -> Callable[[Tensor], Tensor]:
        """Makes content masks."""
        return load_content_parser(bundled.PARSER, CPU)

    def _cached(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Read tensors from the cache, or make and keep them."""
        file = self.cache / f"{name}.npz"
        if not file.is_file():
            arrays = {k: v.numpy() for k, v in make().items()}
            with atomic_path(file) as temporary, open(temporary, "wb") as stream:
                np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        return {k: torch.from_numpy(v) for k, v in read_npz(file).items()}

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """The teacher's attribute values by name, and its content masks as ``mask``."""

        def make() -> dict[str, Tensor]:
            masks, values = [], []
            for part in sampling.shares(self.n, BATCH):
                images = self.images(self.teacher, part)
                masks.append(self.parser(images).to(torch.uint8))
                values.append(attributes.values_of(self.classifier, images))
            named = {name: torch.cat([v[name] for v in values]) for name in values[0]}
            return {"mask": torch.cat(masks)} | named

        name = f"teacher_{self.teacher_mark}_{self.mark}_{self.seed}_{self.n}"
        return self._cached(name, make)

    @cached_property
    def real_features(self) -> dict[str, Statistics]:
        """Statistics of the real pictures' features, ``whole`` and ``inside`` their content."""

        def make() -> dict[str, Tensor]:
            images = Images(self.real, self.teacher.size)
            parts: dict[str, list[Tensor]] = {"whole": [], "inside": []}
            for part in sampling.shares(len(images), BATCH):
                batch = torch.stack([images[(i, False)] for i in part])
                parts["whole"].append(self.classifier.features(batch))
                parts["inside"].append(self.classifier.features(batch * self.parser(batch)))
            return {name: torch.cat(found) for name, found in parts.items()}

        found = self._cached(f"real_{self.mark}_{self.real.parent.name}", make)
        return {
            name: feature_statistics.statistics_of(features.numpy(), {}, keep_features=True)
            for name, features in found.items()
        }

    def images(self, generator: Generator, part: Sequence[int]) -> Tensor:
        """Make pictures of the latents of these numbers."""
        return sampling.images(generator, part, self.seed, fixed_noise=True)

    @torch.no_grad()
    def passes(self, student: Generator) -> Passes:
        """Make the pictures and look at them."""
        reference = self.reference
        sums, counts = torch.zeros(2, dtype=torch.double), torch.zeros(2, dtype=torch.double)
        values, whole, inside = [], [], []
        for part in sampling.shares(self.n, BATCH):
            ours, target = self.images(student, part), self.images(self.teacher, part)
            mask = reference["mask"][part.start : part.stop].float()
            difference = (ours - target).abs()
            for i, region in enumerate((mask, 1 - mask)):
                sums[i] += (difference * region).sum()
                counts[i] += region.sum() * ours.shape[1]
            values.append(attributes.values_of(self.classifier, ours))
            whole.append(self.classifier.features(ours))
            inside.append(self.classifier.features(ours * mask))
        named = {name: torch.cat([v[name] for v in values]) for name in values[0]}
        theirs = {name: reference[name] for name in named}
        l1 = (sums / counts.clamp(min=1)).tolist()
        return Passes(l1[0], l1[1], (named, theirs), torch.cat(whole), torch.cat(inside))

    def measure(self, student: Generator, figures: Sequence[str]) -> dict[str, float]:
        """Measure a student; see `FIGURES`."""
        passes = self.passes(student.eval().requires_grad_(False))
        found: dict[str, float] = {}
        for figure in figures:
            found |= FIGURES[figure](self, student, passes)
        return found

    def floor(self) -> dict[str, float]:
        """Compute the agreement of the teacher's pictures of different latents."""
        values = {k: v for k, v in self.reference.items() if k != "mask"}
        return attributes.summary(attributes.floor(values), self.classifier)


def _l1(judge: Judge, student: Generator, passes: Passes) -> dict[str, float]:
    return {"l1_inside": passes.l1_inside, "l1_outside": passes.l1_outside}


def _agreement(judge: Judge, student: Generator, passes: Passes) -> dict[str, float]:
    shares = attributes.agreement(*passes.values)
    groups = attributes.summary(shares, judge.classifier)
    named = {"all": "agreement", "inside": "agreement_inside", "outside": "agreement_outside"}
    single = {f"agreement:{name}": share for name, share in shares.items()}
    own = attributes.summary(attributes.floor(passes.values[0]), judge.classifier)
    found = {named[group]: share for group, share in groups.items()}
    return found | {"variety": 1 - own["all"]} | single


def _frechet(judge: Judge, student: Generator, passes: Passes) -> dict[str, float]:
    whole, inside = passes.features.numpy(), passes.content_features.numpy()
    return {
        **fid.measure(whole, judge.real_features["whole"], "frechet", 0),
        **fid.measure(inside, judge.real_features["inside"], "frechet_inside", 0),
    }


def _precision_recall(judge: Judge, student: Generator, passes: Passes) -> dict[str, float]:
    return precision_recall.measure(passes.features.numpy(), judge.real_features["whole"], "", 0)


def _ppl(judge: Judge, student: Generator, passes: Passes) -> dict[str, float]:
    distance = load_distance("parser", None, lambda: bundled.PARSER, CPU)
    return {"ppl": path_length(student, distance, "standard", PAIRS, seed=judge.seed)}


FIGURES: dict[str, Callable[[Judge, Generator, Passes], dict[str, float]]] = {
    "l1": _l1,
    "agreement": _agreement,
    "frechet": _frechet,
    "pr": _precision_recall,
    "ppl": _ppl,
}
"""How each of `GROUPS` is measured."""
