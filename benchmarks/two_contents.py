"""One teacher compressed for the face and for the background: each keeps what was asked.

``python -m benchmarks.two_contents --path FACES/images`` prunes the bundled teacher for each
content, retrains both alike, prints how far each is from the teacher inside either content, and
draws them; ``--contents face,hair`` takes others. An interrupted comparison goes on with the same
command. Make the pictures by ``python -m Dataset.toon_faces --out FACES --n 5000 --no_labels``.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from Compression.content import load_content_parser
from Compression.pruning import PruneSettings, prune
from Compression.run import train
from Evaluation import sampling
from Evaluation.comparison import content_l1
from Model import bundled
from Model.checkpoint import load_generator
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.cli import check_writable, run_settings
from Util.pictures import save_png, side_by_side
from Util.run_log import newest_checkpoint
from Util.settings import Settings, command, setting

CONTENTS = {
    "face": ("all", "-background", "-cloth"),
    "background": ("background",),
    "hair": ("hair",),
}


@dataclass(frozen=True, kw_only=True)
class ContentsSettings(Settings):
    """Settings of the comparison."""

    path: Path = setting(..., "training pictures", metavar="DIR")
    contents: tuple[str, ...] = setting(
        ("face", "background"), f"of {', '.join(CONTENTS)}", choices=CONTENTS, metavar="NAME,..."
    )
    out: Path = setting(Path("two_contents"), "folder of the runs and the picture", metavar="DIR")
    iter: int = setting(480, "retraining iterations of each", low=1)
    batch_size: int = setting(16, "images per iteration", low=2)
    n_sample: int = setting(500, "pictures that are compared", low=1)
    shown: int = setting(8, "of these in the picture", low=1)
    seed: int = setting(0, "seed of pruning and training", low=0)
    device: str = setting("cpu", "where it prunes and trains: auto, cpu, cuda or cuda:N")


def compress(settings: ContentsSettings, name: str) -> Generator:
    """Prune the teacher for a content and retrain it inside that content."""
    out, content = settings.out, CONTENTS[name]
    begun = newest_checkpoint(out / name)
    if begun is None:
        pruning = PruneSettings(
            content=content, seed=settings.seed, device=settings.device, out=out / f"{name}.pt"
        )
        print(f"$ {command('python3 prune.py', pruning)}", flush=True)
        prune(pruning)
        shutil.rmtree(out / name, ignore_errors=True)
    config = TrainConfig(
        path=str(settings.path),
        ckpt=f"{out}/{name}.pt",
        teacher_ckpt=str(bundled.MODEL),
        content=content,
        perceptual="parser",
        # As in demo.py: too short for mixed styles, and 64 px ask for less R1.
        freeze_noise=True,
        mixing=0.0,
        path_regularize=0.0,
        r1=0.1,
        kd_l1_lambda=15.0,
        lr=0.005,
        batch_size=settings.batch_size,
        iter=settings.iter,
        model_save_freq=0,
        workers=0,
        seed=settings.seed,
        device=settings.device,
        out=f"{out}/{name}",
        resume=f"{out}/{name}" if begun else "",
    )
    print(f"$ {command('python3 train.py', config)}", flush=True)
    result = train(config, print)
    if result.signal:
        raise KeyboardInterrupt
    return load_generator(result.checkpoint).eval().requires_grad_(False)


def distances(networks: Mapping[str, Generator], teacher: Generator, n: int) -> str:
    """Markdown table: L1 to the teacher inside each content, mean over the same latents."""
    device = torch.device("cpu")
    masks = {k: load_content_parser(bundled.PARSER, device, CONTENTS[k]) for k in networks}
    parts = list(sampling.shares(n, 50))
    lines = [
        f"| compressed for | {' | '.join(f'L1 inside {name}' for name in masks)} |",
        "|---" * (len(masks) + 1) + "|",
    ]
    for name, network in networks.items():
        sums = dict.fromkeys(masks, 0.0)
        for part in parts:
            ours, target = (
                sampling.images(g, part, seed=1, fixed_noise=True) for g in (network, teacher)
            )
            for inside, mask in masks.items():
                sums[inside] += content_l1(ours, target, mask(target)) * len(part) / n
        lines.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in sums.values())} |")
    return "\n".join(lines)


def picture(
    networks: Mapping[str, Generator], teacher: Generator, settings: ContentsSettings
) -> None:
    """Draw the same latents through the teacher and both."""
    part = range(settings.shown)
    rows = {
        name: sampling.images(g, part, seed=2, fixed_noise=True)
        for name, g in (
            {"teacher": teacher} | {f"for the\n{k}": v for k, v in networks.items()}
        ).items()
    }
    save_png(settings.out / "two_contents.png", side_by_side(rows))


def run(settings: ContentsSettings) -> None:
    """Compress twice, compare, and draw."""
    check_writable("out", settings.out / "two_contents.png")
    teacher = load_generator(bundled.MODEL).eval().requires_grad_(False)
    networks = {name: compress(settings, name) for name in settings.contents}
    print(distances(networks, teacher, settings.n_sample))
    picture(networks, teacher, settings)
    print(f"saved {settings.out}/two_contents.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    prog = "python -m benchmarks.two_contents"
    return run_settings(ContentsSettings, run, argv, prog=prog, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
