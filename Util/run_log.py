"""The folder of a training run: settings, metrics, samples, checkpoints."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from Util.files import atomic_path, lock_folder
from Util.pictures import save_png

METRICS = "metrics.jsonl"
CONFIG = "config.json"
BEST = "best.pt"
ASIDE = ".pt.aside"
"""Ending of checkpoints that a run, taken up again from an earlier one, has left behind."""
TIMING = (
    *("images_per_second", "peak_memory_gib", "reserved_memory_gib", "seconds_left", "time"),
    *("seconds_data", "seconds_discriminator", "seconds_r1", "seconds_generator", "seconds_path"),
)
"""Metrics that differ between two runs of the same numbers."""


class RunLog:
    """Writes one run's files.

    ``config.json`` holds every setting, versions, git commit and command line; ``metrics.jsonl``
    one object a line; ``samples/`` and ``checkpoints/`` are named by iteration; ``best.pt`` is the
    checkpoint of the lowest ``best_by``, where that is measured. Where the package
    tensorboard is installed, ``events/`` holds the metrics and samples for it too, and where a
    project of Weights & Biases is named, that.

    Args:
        folder: made if missing.
        config: the run's settings, plain values.
        save: writes a checkpoint's content to a file, atomically.
        resume_at: iteration at which a run goes on; later lines of its metrics are dropped, since
            they will be written again, and later checkpoints get another ending. None starts a run.
        keep: newest checkpoints that stay; 0 keeps all.
        best_by: name of the metric whose lowest value chooses ``best.pt``; None keeps none.
        wandb: project of Weights & Biases; empty: none.

    Raises:
        ValueError: the folder holds a run and this is not its resumption, another process is
            writing it, or Weights & Biases refuses.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        config: Mapping[str, Any],
        save: Callable[[Path, Mapping[str, Any]], None],
        resume_at: int | None = None,
        keep: int = 0,
        best_by: str | None = None,
        wandb: str = "",
    ) -> None:
        self.folder, self.keep, self.best_by, self._save = Path(folder), keep, best_by, save
        if resume_at is None and (self.folder / METRICS).exists():
            raise ValueError(
                f"{folder} holds a run already; name another folder, or go on with that run"
                f" (resume {folder})"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        if self._lock is None:
            raise ValueError(f"{folder}: another process is training there; wait for its end")
        if resume_at is not None:
            self._set_aside_after(resume_at)
            self._drop_metrics_after(resume_at)
        with atomic_path(self.folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(_facts(config), indent=2) + "\n")
        self.events = _event_writer(self.folder / "events", resume_at)
        self.wandb = _wandb_run(wandb, self.folder, config) if wandb else None

    def _set_aside_after(self, iteration: int) -> None:
        """Rename the checkpoints of what comes after an iteration; best.pt is what was best until.

        They are of another course than that which begins now, and one of them may be what somebody
        wants back.
        """
        for file in checkpoints(self.folder):
            if int(file.stem) > iteration:
                file.replace(file.with_suffix(ASIDE))
        rows = self._rows_with(self.best_by) if self.best_by else []
        best = self.folder / BEST
        if not rows or min(rows)[1] <= iteration or not best.is_file():
            return
        best.replace(best.with_suffix(ASIDE))
        before = [row for row in rows if row[1] <= iteration]
        kept = {int(file.stem): file for file in checkpoints(self.folder)}
        if before and (source := kept.get(int(min(before)[1]))):
            with atomic_path(best) as temporary:
                shutil.copyfile(source, temporary)

    def _drop_metrics_after(self, iteration: int) -> None:
        if not (self.folder / METRICS).exists():
            return
        rows = [row for row in read_metrics(self.folder) if row["iteration"] <= iteration]
        with atomic_path(self.folder / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``.

        Raises:
            OSError: it could not be written; names the file.
        """
        file = self.folder / METRICS
        try:
            with open(file, "a") as stream:
                stream.write(json.dumps({"iteration": iteration, **values}) + "\n")
        except OSError as error:
            raise OSError(f"{file}: could not be written ({error.strerror})") from None
        if self.events is not None:
            for key, value in values.items():
                self.events.add_scalar(key, value, iteration)
        if self.wandb is not None:
            self.wandb.log({"iteration": iteration, **values})

    def samples(self, iteration: int, pixels: np.ndarray) -> None:
        """Write a sample grid, (H, W, 3) bytes."""
        save_png(self.folder / "samples" / f"{iteration:06d}.png", pixels)
        if self.events is not None:
            self.events.add_image("samples", pixels, iteration, dataformats="HWC")
        if self.wandb is not None:
            from wandb import Image

            self.wandb.log({"iteration": iteration, "samples": Image(pixels)})

    def checkpoint(self, iteration: int, content: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those beyond the number to keep.

        Raises:
            OSError: it could not be written; names the newest one that could.
        """
        path = self.folder / "checkpoints" / f"{iteration:06d}.pt"
        try:
            self._save(path, content)
        except OSError as error:
            last = newest_checkpoint(self.folder)
            raise OSError(f"{error}; the last good checkpoint is {last or 'none'}") from None
        if self._is_best(iteration):
            with atomic_path(self.folder / BEST) as temporary:
                shutil.copyfile(path, temporary)
        if self.keep:
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()
        return path

    def _is_best(self, iteration: int) -> bool:
        """Whether `best_by` was measured in this iteration and is the lowest so far."""
        rows = self._rows_with(self.best_by) if self.best_by else []
        return bool(rows) and min(rows)[1] == iteration

    def _rows_with(self, key: str) -> list[tuple[float, float]]:
        """Values and iterations of a metric."""
        return [(row[key], row["iteration"]) for row in self.rows() if key in row]

    def rows(self) -> list[dict[str, float]]:
        """All lines of ``metrics.jsonl`` so far; none before the first."""
        return read_metrics(self.folder) if (self.folder / METRICS).exists() else []

    def close(self) -> None:
        """Flush the event files and release the folder."""
        if self.events is not None:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def commit() -> str | None:
    """Name the commit of this code; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "config": dict(config),
        "command": sys.argv,
        "commit": commit(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }


def _event_writer(folder: Path, resume_at: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What the resumed run will write again is hidden.
    return SummaryWriter(str(folder), purge_step=None if resume_at is None else resume_at + 1)


def check_wandb(project: str) -> None:
    """Make sure that Weights & Biases is installed if a project of it is named.

    Raises:
        ValueError: it is not.
    """
    if project and "wandb" not in sys.modules and find_spec("wandb") is None:
        raise ValueError("the package wandb is not installed; pip install wandb, or leave this out")


def _wandb_run(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """Start or, in the same folder, go on with a run of Weights & Biases.

    Raises:
        ValueError: it refuses, e.g. for want of a key.
    """
    import wandb

    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    try:
        run = wandb.init(
            project=project,
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
    except wandb.Error as error:
        raise ValueError(f"Weights & Biases: {error} (WANDB_MODE=offline needs no key)") from None
    # By iteration, not by call: what a resumed run logs again lies where it was.
    run.define_metric("*", step_metric="iteration")
    return run


def read_metrics(folder: str | PathLike[str]) -> list[dict[str, float]]:
    """All lines of a run's ``metrics.jsonl`` in order; a last line cut off by a crash is left out.

    Raises:
        ValueError: the folder holds no metrics, or they are damaged.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise ValueError(f"{folder}: no {METRICS}; give the folder of a training run")
    rows = []
    # Split at line feeds alone, as they are written; a damaged file may hold anything.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            float(row["iteration"])
            if not all(isinstance(value, int | float) for value in row.values()):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}: line {number} is damaged; remove it") from None
        rows.append(row)
    return rows


def measured(folder: str | PathLike[str], iteration: int) -> bool:
    """Whether a run has logged figures of an iteration: a line without the time of training's.

    Raises:
        ValueError: the metrics are damaged.
    """
    rows = read_metrics(folder) if (Path(folder) / METRICS).exists() else []
    return any(row["iteration"] == iteration and "time" not in row for row in rows)


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        ValueError: the folder holds no run, or its settings are damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG}; give the folder of a training run")
    try:
        return dict(json.loads(path.read_bytes())["config"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: damaged, it holds no settings of a run") from None


def checkpoints(folder: str | PathLike[str]) -> list[Path]:
    """A run's checkpoints by iteration, oldest first."""
    found = (Path(folder) / "checkpoints").glob("*.pt")
    return sorted(
        (p for p in found if p.stem.isdecimal() and p.is_file()), key=lambda p: int(p.stem)
    )


def newest_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """The checkpoint of a run's highest iteration, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None
