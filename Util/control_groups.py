"""What the container or job of this process may use of the machine: Linux's control groups.

A limit may stand at the process's own group or at any above it; in a container, its own is the root
that can be seen. Version 2 has one tree, version 1 one for each kind of limit (cgroups(7)).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        lines = []
    trees = {ROOT: "", ROOT / controller: ""}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            trees[ROOT] = path
        elif controller in controllers.split(","):
            trees[ROOT / controller] = path
    for tree, path in trees.items():
        own = tree / path.strip("/")
        yield from (own, *(above for above in own.parents if above.is_relative_to(tree)))


def _least(controller: str, of: Callable[[Path], float | None]) -> float | None:
    """Find the lowest of what the groups leave; None without a limit."""
    found = []
    for group in _groups(controller):
        try:
            found.append(of(group))
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
    return min((value for value in found if value is not None), default=None)


def memory_left() -> int | None:
    """Return the bytes that the groups leave, file caches included; None without a limit."""
    left = _least("memory", memory_of)
    return None if left is None else int(left)


def memory_of(group: Path) -> float | None:
    """Return what a group leaves of its memory.

    Raises:
        OSError: it tells nothing.
        ValueError: it has no limit.
    """
    limit, used = "memory.max", "memory.current"
    if not (group / limit).is_file():
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    left = int((group / limit).read_text()) - int((group / used).read_text())
    entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return left + {name: int(value) for name, value in entries}.get("inactive_file", 0)


def processors() -> int | None:
    """Return the cores' worth of time that the groups leave, rounded up; None without a limit."""
    share = _least("cpu", processors_of)
    return None if share is None else max(1, math.ceil(share))


def processors_of(group: Path) -> float | None:
    """Return a group's share of time, in cores; None: all.

    Raises:
        OSError: it tells nothing.
        ValueError: it has no limit.
    """
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota) / int(period) if int(quota) > 0 else None
