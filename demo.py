"""The main job on the bundled model: render data, prune, retrain, compare. Takes minutes on a CPU.

Every step is one of the project's commands; the demo prints it before it runs it.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from Compression import recipes
from Compression.content import load_content_parser
from Compression.pruning import PruneSettings, option_kinds, prune
from Compression.report import summary
from Compression.run import train
from Dataset import toon_faces
from Evaluation import sampling
from Evaluation.comparison import content_l1
from Model import bundled
from Model.checkpoint import load_generator
from Model.complexity import macs, parameters
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util import progress
from Util.cli import check_writable, run_settings
from Util.files import atomic_path, lock_folder
from Util.pictures import save_png, side_by_side
from Util.plot_log import plot
from Util.run_log import CONFIG, TIMING, read_config
from Util.settings import SettingError, Settings, command, from_flags, setting
from Util.workers import cores

TEACHER = os.path.relpath(bundled.MODEL)
EXAMPLE = """example: python3 demo.py --out longer --iter 18000
    retrains five times as long as make demo does
"""
RECIPE = "ours"
DATA = "toon_faces_64px"
BATCH = 8
LATENTS = 64
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Settings of the demo; one flag each."""

    out: Path = setting(Path("demo"), "folder of the results", metavar="DIR")
    n: int = setting(5000, "pictures to render", low=1)
    iter: int = setting(3600, "retraining iterations", low=1)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the command that means what the block does, and how long it took."""
    print(f"\n$ {name}", flush=True)
    start = time.perf_counter()
    yield
    print(f"[{time.perf_counter() - start:.0f} s]", flush=True)


def pruning(**given: Any) -> PruneSettings:
    """Prune to a tenth by this project's recipe: it comes furthest in few minutes."""
    values = recipes.prune_values(RECIPE) | {"remove_ratio": 0.7} | given
    return from_flags(PruneSettings, values, option_kinds())


def retraining(data: Path, pruned: Path, iterations: int, run: Path) -> TrainConfig:
    """A short retraining of the bundled model.

    Too short for mixed styles; the teacher has next to no layer noise; R1's 10 is for 256 px. In so
    few iterations the paper's weight of 3 hardly brings the colours back. Batches of 8 take
    twice the steps of 16 in as many images, and in so short a training faces, too, come out better
    where the whole picture is distilled than where the content alone is (`python -m studies demo`,
    doc/Study.md).
    """
    return TrainConfig(
        path=f"{data}/images",
        ckpt=str(pruned),
        teacher_ckpt=TEACHER,
        recipe=RECIPE,
        perceptual="parser",
        freeze_noise=True,
        mixing=0.0,
        path_regularize=0.0,
        r1=0.1,
        kd_l1_lambda=15.0,
        content_aware_KD=False,
        lr=0.005,
        lr_decay=BATCH * iterations // 3,
        batch_size=BATCH,
        iter=iterations,
        log_freq=40,
        val_sample_freq=500,
        model_save_freq=0,
        workers=1,
        out=str(run),
    )


def rehearse(settings: DemoSettings) -> dict[str, float]:
    """Do a little of each step in a temporary folder; returns the seconds that the whole takes."""
    with TemporaryDirectory() as folder, progress.quietly():
        place, few = Path(folder), 16
        start = time.perf_counter()
        for i in range(few):
            picture, _ = toon_faces.render(i, labels=False)
            save_png(place / f"data/images/{i}.png", picture)
        rendering = (time.perf_counter() - start) / few / cores() * settings.n

        taken = []
        for n in (10, 30):  # what does not depend on the number of images is in both
            start = time.perf_counter()
            small = prune(pruning(n_sample=n, out=place / "pruned.pt"))
            taken.append(time.perf_counter() - start)
        per_image = max(taken[1] - taken[0], 0) / 20
        pruned = taken[0] + per_image * (PruneSettings.n_sample - 10)

        config = retraining(place / "data", small.path, 9, place / "run")
        result = train(replace(config, log_freq=3, val_sample_freq=0))
        if result.signal:
            raise KeyboardInterrupt
        per_second = max(row[TIMING[0]] for row in result.rows[1:])  # the first ones warm up
        training = config.batch_size * settings.iter / per_second
    return {"rendering": rendering, "pruning": pruned, "retraining": training}


def announcement(settings: DemoSettings, seconds: Mapping[str, float]) -> str:
    """What will happen, and how long it takes here."""
    render, pruned, trained = map(progress.duration, seconds.values())
    return (
        f"This renders {settings.n:,} pictures of toon faces ({render}), prunes the bundled teacher"
        f" to a tenth of its cost ({pruned}),\nretrains it for {settings.iter:,} iterations"
        f" ({trained}) and compares the three. On this machine, as busy as it is now, all of it"
        f" takes about\n{progress.duration(sum(seconds.values()))}, by a little of each that was"
        f" done just now. The results go to {settings.out}; Ctrl-C ends it."
    )


def compare(networks: dict[str, Generator], out: Path) -> str:
    """Write the pictures; return the table."""
    z = torch.randn(LATENTS, 128, generator=torch.Generator().manual_seed(7))
    images = {
        name: sampling.render(network, sampling.from_z(network, z))
        for name, network in networks.items()
    }
    mask = load_content_parser(bundled.PARSER, torch.device("cpu"))(images["teacher"])
    rows = {name: x[:SHOWN] for name, x in images.items()} | {"content mask": mask[:SHOWN]}
    save_png(out / "comparison.png", side_by_side(rows))
    lines = [f"{'':<12}{'MACs':>14}{'parameters':>13}{'L1 to teacher inside the content':>36}"]
    for name, network in networks.items():
        distance = content_l1(images[name], images["teacher"], mask)
        lines.append(f"{name:<12}{macs(network):>14,}{parameters(network):>13,}{distance:>36.4f}")
    return "\n".join(lines)


def _check_run(folder: Path) -> None:
    """Refuse to replace a folder that is no run, or in which a run is going on."""
    if not folder.exists():
        return
    made = read_config(folder) if (folder / CONFIG).is_file() else {}
    own = {"ckpt": folder.parent / "pruned.pt", "path": folder.parent / DATA / "images"}
    if any(Path(made.get(key, "")).resolve() != file.resolve() for key, file in own.items()):
        raise SettingError("out", f"{folder} is no run of the demo; name another folder")
    lock = lock_folder(folder)
    if lock is None:
        raise SettingError("out", f"{folder}: another process is training there; wait for its end")
    os.close(lock)


def run(settings: DemoSettings) -> int:
    """Run all steps and print the result; returns the exit code."""
    out, start = settings.out, time.perf_counter()
    check_writable("out", out / "table.txt")
    _check_run(out / "run")
    print(announcement(settings, rehearse(settings)), flush=True)
    data, run = out / DATA, out / "run"

    faces = toon_faces.ToonFacesSettings(out=data, n=settings.n, no_labels=True)
    with step(command("python3 -m Dataset.toon_faces", faces)):
        toon_faces.render_dataset(faces, progress=True)

    smaller = pruning(out=out / "pruned.pt")
    with step(command("python3 prune.py", smaller, recipes.prune_values(RECIPE))):
        small = prune(smaller)
        print(f"{summary(small.full, small.pruned)}\nsaved {small.path}")

    _check_run(run)  # again: one may have begun since
    if run.exists():
        shutil.rmtree(run)
    config = retraining(data, small.path, settings.iter, run)
    with step(command("python3 train.py", config)):
        result = train(config, progress.show)
    if result.signal:
        return 128 + result.signal
    trained = result.checkpoint

    files: dict[str, str | Path] = {"teacher": TEACHER, "pruned": small.path, "retrained": trained}
    table = compare({name: load_generator(file) for name, file in files.items()}, out)
    with atomic_path(out / "table.txt") as temporary:
        temporary.write_text(table + "\n")
    plot([run], out / "training_curve.png")

    print(f"\n{table}\n\nMade in {time.perf_counter() - start:.0f} s:")
    made = {
        "comparison.png": "the same latents through teacher, pruned and retrained generator",
        "training_curve.png": "losses and distance to the teacher",
        "table.txt": "the table above",
        f"run/checkpoints/{trained.name}": "the compressed model",
    }
    for name, what in made.items():
        print(f"  {out / name}: {what}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return run_settings(
        DemoSettings, run, argv, prog="demo.py", description=__doc__, epilog=EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
