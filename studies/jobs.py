"""One job: prune, initialise, train, measure. Its state is its files, so it goes on after a stop.

WORK/PLAN/JOB/pruned.pt          after pruning
run/               the training's folder, with a checkpoint at every measuring point
figures_NNNNNN.json    after measuring, one for each point
student.pt         at the end, the moving average alone; pruned.pt and run/ go
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from Compression.pruning import prune
from Compression.run import settings as run_settings
from Compression.run import train
from Dataset import toon_faces
from Evaluation.features import fingerprint
from Model import bundled, checkpoint
from Model.complexity import macs, parameters
from studies.measuring import Judge
from studies.plan import FOLDER, Job, Plan, iterations, prune_settings, train_config
from train_hyperparams import TrainConfig
from Util.files import atomic_path
from Util.settings import file_path
from Util.stopping import StoppedError

REAL_START = 4_000_000
"""First of the real pictures that are compared with; neither the judge nor a student saw them."""


@dataclass(frozen=True)
class Places:
    """Where a study's files are.

    Attributes:
        work: folder of pictures, jobs and caches.
        results: folder of the results, one file a plan.
    """

    work: Path
    results: Path

    def job(self, plan: Plan, job: Job) -> Path:
        """Folder of a job."""
        return self.work / plan.name / job.name

    def data(self, plan: Plan) -> Path:
        """Folder of the training pictures."""
        return self.work / f"toon_faces_64px_{plan.pictures}"

    def real(self, plan: Plan) -> Path:
        """Folder of the real pictures that are measured against."""
        return self.work / f"toon_faces_64px_held_out_{plan.real_pictures}"


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a study's folders, ``work`` and ``results``."""
    add = parser.add_argument
    add("--work", type=file_path, default=Path("runs/studies"), metavar="DIR",
        help="pictures, runs and students (default: runs/studies)")  # fmt: skip
    add("--results", type=file_path, default=FOLDER.parent / "results", metavar="DIR",
        help="results, one file a plan (default: studies/results)")  # fmt: skip


def prepare(plan: Plan, places: Places, workers: int | None = None) -> None:
    """Render the pictures that are not there yet."""
    sets = [(places.real(plan), REAL_START, plan.real_pictures)]
    if plan.images:
        sets.append((places.data(plan), 0, plan.pictures))
    for out, start, n in sets:
        toon_faces.render_dataset(
            toon_faces.ToonFacesSettings(out=out, n=n, start=start, no_labels=True, workers=workers)
        )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


class Clock:
    """Seconds of the processor that each phase took, kept in a file over stops."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        if file.is_file():
            self.seconds = json.loads(file.read_text())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what the block takes; nothing is added where the process is killed in it."""
        start = time.process_time()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.process_time() - start
            self.seconds[name] = round(spent, 2)
            write_json(self.file, self.seconds)


_make_judge = cache(Judge)
"""One for each seed: it keeps what it has computed."""


def judge_for(plan: Plan, seed: int, teacher: Path, places: Places) -> Judge:
    """Give the judge of a seed, made once per process."""
    real, cached = places.real(plan) / "images", places.work / "cache"
    return _make_judge(teacher, plan.n_sample, seed, real, cached)


def run_job(plan: Plan, job: Job, places: Places) -> dict[str, Any]:
    """Run a job, or what is left of it.

    Returns:
        What goes into the results: figures at every point, settings, costs, seconds.

    Raises:
        StoppedError: a signal ended the training.
        ValueError: a setting cannot be used.
    """
    folder = places.job(plan, job)
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "settings.json"
    if begun.is_file():
        check_unchanged(job, json.loads(begun.read_text()), settings_of(plan, job), str(folder))
    else:
        write_json(begun, settings_of(plan, job))
    clock, pruned, run = Clock(folder / "clock.json"), folder / "pruned.pt", folder / "run"
    pruning = prune_settings(job, pruned)
    if not pruned.is_file():
        with clock.phase("prune"):
            prune(pruning)
    config = train_config(plan, job, places.data(plan) / "images", pruned, run)
    if plan.images and not _checkpoint(run, config.iter).is_file():
        with clock.phase("train"):
            if train(config).signal:
                raise StoppedError(job.name)
    judge = judge_for(plan, job.seed, pruning.ckpt, places)
    points = []
    for iteration in iterations(plan, config.batch_size):
        file = folder / f"figures_{iteration:06d}.json"
        source = _checkpoint(run, iteration) if iteration else pruned
        if not file.is_file():
            at_end = iteration == iterations(plan, config.batch_size)[-1]
            figures = [f for f in plan.figures if at_end or f != "ppl"]
            with clock.phase("measure"):
                found = judge.measure(checkpoint.load_generator(source), figures)
            write_json(file, {"images": iteration * config.batch_size, "figures": found})
        points.append(json.loads(file.read_text()))
    student = _student(plan, config, folder)
    return _result(plan, job, points, clock.seconds, student, judge)


def reference_figures(plan: Plan, seed: int, places: Places) -> dict[str, dict[str, float]]:
    """Measure what students are seen beside, by its name: the teacher, the compressed model.

    The teacher shows what cannot be surpassed, the bundled compressed model a longer retraining.
    """
    teacher = prune_settings(plan.jobs[0], Path("pruned.pt")).ckpt
    judge = judge_for(plan, seed, teacher, places)
    files = {"teacher": teacher, "bundled compressed model": bundled.COMPRESSED}
    return {
        name: judge.measure(checkpoint.load_generator(file), plan.figures)
        for name, file in files.items()
    }


def clean(plan: Plan, job: Job, places: Places) -> None:
    """Keep the student alone of a finished job; one that was killed in this is gone on with."""
    folder = places.job(plan, job)
    config = train_config(plan, job, Path("data"), folder / "pruned.pt", folder / "run")
    source = _student(plan, config, folder)
    if source.is_file() and not (folder / "student.pt").is_file():
        g_ema = checkpoint.load_generator(source)
        checkpoint.save(folder / "student.pt", {"g_ema": g_ema})
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "pruned.pt").unlink(missing_ok=True)


def _checkpoint(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"{iteration:06d}.pt"


def _student(plan: Plan, config: TrainConfig, folder: Path) -> Path:
    """Where the finished student of a job is, in its folder."""
    return _checkpoint(folder / "run", config.iter) if plan.images else folder / "pruned.pt"


def _result(
    plan: Plan,
    job: Job,
    points: list[Any],
    seconds: Mapping[str, float],
    student: Path,
    judge: Judge,
) -> dict[str, Any]:
    network = checkpoint.load_generator(student)
    return {
        "plan": plan.name,
        "job": job.name,
        "arm": job.arm.name,
        "group": job.arm.group,
        "ratio": job.ratio,
        "seed": job.seed,
        "points": points,
        "floor": judge.floor(),
        "macs": macs(network),
        "parameters": parameters(network),
        "channels": list(network.channels),
        "seconds": dict(seconds),
        "settings": settings_of(plan, job),
    }


def judged_by() -> dict[str, Any]:
    """What figures depend on besides a plan."""
    return {
        "attributes": fingerprint(bundled.ATTRIBUTES),
        "masks": fingerprint(bundled.PARSER),
        "real_start": REAL_START,
    }


def settings_of(plan: Plan, job: Job) -> dict[str, dict[str, Any]]:
    """Everything that a plan says about a job, and what judges it, as JSON holds it."""
    stand_in = Path("pruned.pt")
    training = plain_settings(train_config(plan, job, Path("data"), stand_in, Path("no folder")))
    names = ("images", "measure_at", "pictures", "figures", "n_sample", "real_pictures")
    values = {name: getattr(plan, name) for name in names}
    return {
        "plan": {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
        "judge": judged_by(),
        "prune": plain_settings(prune_settings(job, stand_in)),
        "train": {k: v for k, v in training.items() if k not in ("out", "resume")},
    }


def check_unchanged(
    job: Job, old: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]], place: str
) -> None:
    """Refuse to go on with a job, or to count it as done, under other settings.

    Settings that only one side knows are passed over: later versions may have more.

    Raises:
        ValueError: names a setting, and what to do.
    """
    for kind, values in new.items():
        before = old.get(kind, {})
        for name in sorted(before.keys() & values.keys()):
            if before[name] != values[name]:
                raise ValueError(
                    f"{place}: {job.name} was begun with {name} {before[name]}, and the plan now"
                    f" says {values[name]}; give the arm another name, or remove that"
                )


def plain_settings(settings: Any) -> dict[str, Any]:
    """Settings as JSON holds them, those of options beside the others; files by their names."""
    values = run_settings.plain_settings(settings)
    paths = ("ckpt", "teacher_ckpt", "path", "out", "resume")
    return {k: Path(v).name if k in paths and v else v for k, v in values.items()}
