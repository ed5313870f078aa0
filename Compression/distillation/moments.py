"""DiME: the first two moments of the student's features follow the teacher's.

    loss = sum over networks phi of  lambda_phi ( |m1 - mu1| + |m2 - mu2| )
    m1 = mean of phi(S), m2 = mean of phi(S)^2 over the batch; |.| the mean over the dimensions

(Yeo et al., "Nickel and Diming Your GAN", ECCV 2024: a maximum mean discrepancy with the kernels of
foundation models.) mu1 and mu2 are the teacher's, of many pictures; they are computed once and kept
in a file beside its checkpoint. Published: lambda 20 for DINO, 15 for CLIP.
"""

import hashlib
import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from Compression.distillation.terms import Call, Parts, Pass, Sources
from Evaluation.embeddings import NAMES, Embedding, load_embedding
from Evaluation.features import fingerprint
from Evaluation.sampling import images, shares
from Model.checkpoint import file_of
from Model.generator import Generator
from Util import distributed, memory
from Util.cli import check_writable
from Util.files import atomic_path, read_npz
from Util.settings import SettingError, Settings, blame, setting

Moments = tuple[Tensor, Tensor]
"""Means of phi and of phi^2, (D,) each."""

BATCH = 32
"""Teacher's pictures at a time, at most."""


@dataclass(frozen=True, kw_only=True)
class MomentsSettings(Settings):
    """Settings of the term moments; the defaults are those of DiME's figures."""

    moments_networks: tuple[str, ...] = setting(
        ("dino=20", "clip=15"),
        f"moments: networks ({', '.join(NAMES)}) and their weights",
        metavar="NAME=WEIGHT,...",
    )
    # The paper says many; with these the means are ten times as exact as those of a batch of 64.
    moments_n_sample: int = setting(
        10_000, "moments: teacher's pictures whose moments are the target", low=2
    )
    moments_file: str = setting(
        "", "moments: .npz for the teacher's moments; empty: beside teacher_ckpt"
    )
    dino_ckpt: str = setting("", "moments: weights of DINO's ResNet-50, no download")
    clip_ckpt: str = setting("", "moments: tensors of CLIP's RN50; there is no download")

    def networks(self) -> dict[str, float]:
        """Read the weight of every network, by its name.

        Raises:
            SettingError: an unknown network, a weight that is no positive number, or none at all.
        """
        found = {}
        for text in self.moments_networks:
            name, _, weight = text.partition("=")
            try:
                found[name] = float(weight)
            except ValueError:
                found[name] = math.nan
            if name not in NAMES or not 0 < found[name] < math.inf:
                raise SettingError(
                    "moments_networks",
                    f"{text}: expected NAME=WEIGHT with a weight above 0 and a name of"
                    f" {', '.join(NAMES)}",
                )
        if not found:
            raise SettingError("moments_networks", f"is empty; name some of {', '.join(NAMES)}")
        return found


def label(options: MomentsSettings) -> str:
    """Name it by its networks, for the log."""
    return "_".join(["moments", *options.networks()])


def moments(features: Tensor) -> Moments:
    """Average features (N, D) and their squares over the pictures of all processes."""
    features = features.float()
    means = torch.stack([features.mean(dim=0), features.square().mean(dim=0)])
    first, second = distributed.average(means)
    return first, second


def distance(found: Moments, target: Moments) -> Tensor:
    """Add up the mean absolute differences."""
    differences = [(a - b).abs().mean() for a, b in zip(found, target, strict=True)]
    return torch.stack(differences).sum()


@torch.no_grad()
def teacher_moments(
    teacher: Generator, networks: Mapping[str, Embedding], n: int
) -> dict[str, Moments]:
    """Compute moments of the teacher's pictures 0 ... n-1, shared among the processes.

    Args:
        teacher: frozen.
        networks: by name.
        n: number of pictures.
    """
    sums: dict[str, Tensor] = {}
    batch = memory.at_once(teacher.size, memory.INFERENCE, BATCH)
    for part in shares(n, batch, distributed.rank(), distributed.world_size()):
        pictures = images(teacher, part, seed=0)
        for name, embedding in networks.items():
            phi = embedding.network(pictures).double()
            found = torch.stack([phi.sum(dim=0), phi.square().sum(dim=0)]).cpu()
            sums[name] = sums[name] + found if name in sums else found
    everywhere = distributed.gather(sums)
    means = {
        name: torch.stack([own[name] for own in everywhere if name in own]).sum(dim=0) / n
        for name in networks
    }
    return {name: (m[0].float(), m[1].float()) for name, m in means.items()}


class TeacherMoments:
    """The teacher's moments, computed before a first run and read from a file afterwards.

    Args:
        sources: of the run.
        networks: by name.

    Attributes:
        found: moments by the networks' names; filled by `prepare`.

    Raises:
        SettingError: the file could not be written, or holds something else.
    """

    def __init__(self, sources: Sources, networks: Mapping[str, Embedding]) -> None:
        options, config = sources.options, sources.config
        assert isinstance(options, MomentsSettings)
        self.teacher, self.networks = sources.teacher, networks
        self.found: dict[str, Moments] = {}
        self.n, self.keep = options.moments_n_sample, not config.dry_run
        source = file_of(config.teacher_ckpt)
        facts = [f"{name}: {embedding.protocol}" for name, embedding in networks.items()]
        self.protocol = f"{self.n} pictures of {fingerprint(source)}; " + "; ".join(facts)
        digest = hashlib.sha256(self.protocol.encode()).hexdigest()[:8]
        self.file = Path(options.moments_file or source.with_suffix(f".moments-{digest}.npz"))
        if self.file.is_file():
            with blame(f"moments_file {self.file}:"):
                self.found |= {name: self._read(name) for name in networks}
        elif self.keep:
            check_writable("moments_file", self.file)

    def _read(self, name: str) -> Moments:
        content = read_npz(self.file)
        made = str(content.get("protocol", "no moments"))
        if made != self.protocol:
            raise ValueError(f"holds {made}, not {self.protocol}; name another file")
        values = [content.get(f"{name}_{i}", np.zeros(0)) for i in (1, 2)]
        if not all(v.ndim == 1 and v.dtype.kind == "f" and np.isfinite(v).all() for v in values):
            raise ValueError("is damaged; remove it")
        first, second = (torch.from_numpy(v).float().to(self.teacher.device) for v in values)
        return first, second

    def prepare(self) -> None:
        """Compute what the file did not have; all processes take part, the first one writes.

        A dry run takes one batch and keeps nothing.
        """
        # Together: a file that has just come into being may have been seen by some of them.
        if not distributed.any_process(not self.found):
            return
        n = self.n if self.keep else BATCH
        for name, pair in teacher_moments(self.teacher, self.networks, n).items():
            first, second = (values.to(self.teacher.device) for values in pair)
            self.found[name] = (first, second)
        if self.keep and distributed.rank() == 0:
            arrays = {
                f"{name}_{i}": values.cpu().numpy()
                for name, pair in self.found.items()
                for i, values in enumerate(pair, start=1)
            }
            with atomic_path(self.file) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays, protocol=np.array(self.protocol))  # type: ignore[arg-type]


def make(sources: Sources) -> Parts:
    """Make the term, with its networks; the teacher's moments come with `Parts.prepare`.

    Raises:
        SettingError: a network or the file of moments cannot be used.
    """
    options = sources.options
    assert isinstance(options, MomentsSettings)
    files = {"dino": options.dino_ckpt, "clip": options.clip_ckpt}
    networks = {
        name: load_embedding(
            name,
            Path(files[name]) if files.get(name) else None,
            sources.parser,
            sources.device,
        )
        for name in options.networks()
    }
    target = TeacherMoments(sources, networks)
    # Until they are there: what an iteration takes is counted before.
    zero = torch.zeros((), device=sources.device)
    known = ChainMap(target.found, dict.fromkeys(networks, (zero, zero)))
    return Parts(term(networks, options.networks(), known), prepare=target.prepare)


def term(
    networks: Mapping[str, Embedding], weights: Mapping[str, float], target: Mapping[str, Moments]
) -> Call:
    """Make the term, of networks, weights and the teacher's moments by the networks' names."""

    def call(student: Pass, teacher: Pass, mask: Tensor | None) -> Tensor:
        found = [
            weight * distance(moments(networks[name].network(student.made.image)), target[name])
            for name, weight in weights.items()
        ]
        return torch.stack(found).sum()

    return call
