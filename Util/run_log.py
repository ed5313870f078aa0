"""The folder of a training run: settings, metrics, samples, checkpoints."""

import json
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from Model.files import atomic_path


class RunLog:
    """Writes one run's files.

    ``config.json`` holds every setting, versions and the command line; ``metrics.jsonl`` one object
    a line; ``samples/`` and ``checkpoints/`` are named by iteration.

    Args:
        folder: made if missing.
        config: the run's settings, plain values.
        resume: append to the metrics that are there.

    Raises:
        ValueError: the folder holds a run and this is not its resumption.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], resume: bool) -> None:
        self.folder = Path(folder)
        if not resume and (self.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"--out {folder} holds a run already; name another folder, or go on with it by"
                " --load_train_state and its newest checkpoint as --ckpt"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "config": dict(config),
            "command": sys.argv,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        }
        with atomic_path(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")

    def metrics(self, values: Mapping[str, float | int]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(dict(values)) + "\n")

    def sample_path(self, iteration: int) -> Path:
        """Where the sample grid of an iteration goes."""
        return self.folder / "samples" / f"{iteration:06d}.png"

    def checkpoint_path(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration goes."""
        return self.folder / "checkpoints" / f"{iteration:06d}.pt"


def read_metrics(folder: str | PathLike[str]) -> list[dict[str, float]]:
    """All lines of a run's ``metrics.jsonl``, in order; of a repeated iteration the last counts."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    by_iteration = {row["iteration"]: row for row in map(json.loads, lines)}
    return [by_iteration[i] for i in sorted(by_iteration)]
