"""Results: one JSON line a job, in a file per plan."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from Util.files import atomic_path, folder_lock

Result = Mapping[str, Any]


def results_file(folder: Path, plan: str) -> Path:
    """File of a plan's results."""
    return folder / f"{plan}.jsonl"


def references_file(folder: Path, plan: str) -> Path:
    """File of the figures of what students are seen beside, by seed and name, with settings."""
    return folder / f"{plan}_references.json"


def read_results(file: Path) -> list[dict[str, Any]]:
    """Read all results in the order in which they came; none where there is no file.

    Raises:
        ValueError: a line is damaged; names it.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["job"], str) or not row["points"]:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{file}: line {number} is no result; remove it") from None
        rows.append(row)
    return rows


def append_result(file: Path, result: Result) -> None:
    """Add a result; a reader sees the old lines or all of them, and several processes may add."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(file.parent):
        old = file.read_text("utf-8") if file.is_file() else ""
        with atomic_path(file) as temporary:
            temporary.write_text(old + json.dumps(result) + "\n", "utf-8")
