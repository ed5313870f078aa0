"""What --kd_shared_noise changes: two retrainings of the bundled model that differ in it alone.

``python -m benchmarks.shared_noise --path IMAGES``. The bundled teacher hardly uses its layer
noise, so that both settings would agree; here its noise strengths are set to --strength
(activations have unit variance before the noise).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from Compression.content import load_content_parser
from Compression.pruning import PruneSettings, prune
from Compression.run import train
from Evaluation import sampling
from Evaluation.comparison import content_l1
from Model import bundled, checkpoint
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.cli import run_settings
from Util.settings import Settings, setting


def noisy_teacher(strength: float, file: Path) -> Generator:
    """Save the bundled teacher with other noise strengths."""
    content = checkpoint.read(bundled.MODEL)
    teacher = checkpoint.load_generator(content).requires_grad_(False)
    for layer in teacher.styled_convs:
        layer.noise.weight.fill_(strength)
    checkpoint.save(file, {"g_ema": teacher, "d": content["d"]})
    return teacher


@torch.no_grad()
def distances(student: Generator, teacher: Generator, n: int = 256) -> tuple[float, float]:
    """L1 inside the teacher's content, with the same layer noise on both sides and with others."""
    indices = range(n)
    z = sampling.draw_z(teacher, indices, seed=1)
    noise, other = (sampling.draw_noise(teacher, indices, seed) for seed in (1, 2))
    target = teacher([z], noise=noise)
    mask = load_content_parser(bundled.PARSER, torch.device("cpu"))(target)
    same, different = (student([z], noise=maps) for maps in (noise, other))
    return content_l1(same, target, mask), content_l1(different, target, mask)


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """Settings of the comparison."""

    path: Path = setting(..., "training images, e.g. Dataset/toon_faces_64px/images")
    iter: int = setting(1000, "iterations of 16", low=1)
    strength: float = setting(0.1, "of the noise", low=0)


def retrained(settings: NoiseSettings, folder: Path, shared: bool) -> Generator:
    """Retrain the pruned teacher of the folder."""
    config = TrainConfig(
        path=str(settings.path),
        ckpt=f"{folder}/pruned.pt",
        teacher_ckpt=f"{folder}/teacher.pt",
        parser_ckpt=str(bundled.PARSER),
        perceptual="parser",
        path_regularize=0.0,
        r1=0.1,
        lr=0.004,
        batch_size=16,
        iter=settings.iter,
        workers=1,
        model_save_freq=0,
        val_sample_freq=0,
        kd_shared_noise=shared,
        out=f"{folder}/{shared}",
    )
    return checkpoint.load_generator(train(config).checkpoint).eval()


def compare(settings: NoiseSettings) -> None:
    """Retrain with and without, and print the table."""
    rows = [
        f"{'layer noise':<13}{'L1, same noise':>16}{'L1, other noise':>17}{'strength left':>15}"
    ]
    with TemporaryDirectory() as name:
        folder = Path(name)
        teacher = noisy_teacher(settings.strength, folder / "teacher.pt")
        prune(
            PruneSettings(
                ckpt=folder / "teacher.pt",
                parser_ckpt=bundled.PARSER,
                n_sample=100,
                out=folder / "pruned.pt",
            )
        )
        for shared in (False, True):
            student = retrained(settings, folder, shared)
            same, other = distances(student, teacher)
            left = [layer.noise.weight.abs().item() for layer in student.styled_convs]
            label = "shared" if shared else "independent"
            rows.append(f"{label:<13}{same:>16.4f}{other:>17.4f}{sum(left) / len(left):>15.4f}")
    print("\n" + "\n".join(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    prog = "python -m benchmarks.shared_noise"
    return run_settings(NoiseSettings, compare, argv, prog=prog, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
