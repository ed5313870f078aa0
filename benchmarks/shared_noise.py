"""What --kd_shared_noise changes: two retrainings of the bundled model that differ in it alone.

``python -m benchmarks.shared_noise --path IMAGES``. The bundled teacher hardly uses its layer
noise, so that both settings would agree; here its noise strengths are set to --strength
(activations have unit variance before the noise).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import prune
import train
from Compression.content import load_content_parser
from Evaluation import sampling
from Evaluation.comparison import content_l1
from Model import bundled, checkpoint
from Model.generator import Generator
from Util.cli import OneLineParser
from Util.settings import at_least


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
    assert isinstance(target, torch.Tensor)
    mask = load_content_parser(bundled.PARSER, torch.device("cpu"))(target)
    same, different = (student([z], noise=maps) for maps in (noise, other))
    assert isinstance(same, torch.Tensor)
    assert isinstance(different, torch.Tensor)
    return content_l1(same, target, mask), content_l1(different, target, mask)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = OneLineParser(prog="python -m benchmarks.shared_noise", description=__doc__)
    add = parser.add_argument
    add("--path", required=True, help="training images, e.g. Dataset/toon_faces_64px/images")
    add("--iter", type=at_least(1), default=1000, help="iterations of 16 (default: %(default)s)")
    add("--strength", type=float, default=0.1, help="of the noise (default: %(default)s)")
    args = parser.parse_args(argv)
    rows = [
        f"{'layer noise':<13}{'L1, same noise':>16}{'L1, other noise':>17}{'strength left':>15}"
    ]
    with TemporaryDirectory() as name:
        folder = Path(name)
        teacher = noisy_teacher(args.strength, folder / "teacher.pt")
        files = f"--ckpt {folder}/teacher.pt --parser_ckpt {bundled.PARSER}"
        code = prune.main(f"{files} --n_sample 100 --out {folder}/pruned.pt".split())
        for shared in (False, True):
            flags = (
                f"--path {args.path} --ckpt {folder}/pruned.pt --teacher_ckpt {folder}/teacher.pt"
                f" --parser_ckpt {bundled.PARSER} --perceptual parser --path_regularize 0 --r1 0.1"
                f" --lr 0.004 --batch_size 16 --iter {args.iter} --workers 1 --model_save_freq 0"
                f" --val_sample_freq 0 --kd_shared_noise {shared} --out {folder}/{shared}"
            )
            code = code or train.main(flags.split())
            if code:
                return code
            student = checkpoint.load_generator(folder / f"{shared}/checkpoints/{args.iter:06d}.pt")
            same, other = distances(student.eval(), teacher)
            left = [layer.noise.weight.abs().item() for layer in student.styled_convs]
            label = "shared" if shared else "independent"
            rows.append(f"{label:<13}{same:>16.4f}{other:>17.4f}{sum(left) / len(left):>15.4f}")
    print("\n" + "\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
