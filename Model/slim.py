"""Write a checkpoint's networks without its optimisers, as they are published."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from Model import checkpoint
from Model.errors import CheckpointError
from Util.cli import check_target, run_conversion
from Util.settings import SettingError, Settings, setting

EPILOG = """examples:
  python -m Model.slim runs/NAME student.pt                        # of a run's newest checkpoint
  python -m Model.slim runs/NAME/best.pt student.pt --keep g_ema   # for making images alone

What is left goes wherever a checkpoint does, train.py --ckpt among them; only --resume needs the
optimisers."""

NETWORKS = ("g", "g_ema", "d")
ALONGSIDE = ("latent_avg", "config")
"""Small, and part of what the networks are: mean w, and how they were made."""


@dataclass(frozen=True, kw_only=True)
class SlimSettings(Settings):
    """What is kept."""

    keep: tuple[str, ...] = setting(
        NETWORKS,
        "networks to keep, of those that there are: generator, its moving average (which makes the"
        " images), discriminator",
        choices=NETWORKS,
    )


def slim(source: Path, target: Path, settings: SlimSettings) -> list[str]:
    """Write the networks to keep; each has been loaded once.

    Returns:
        One line for each network and the file, with its size and the source's in MB.

    Raises:
        SettingError: no network is to be kept.
        CheckpointError: the source is no checkpoint, or has none of the networks.
        ValueError: the target is a folder or the source itself.
    """
    if not settings.keep:
        raise SettingError("keep", f"names no network; take some of {', '.join(NETWORKS)}")
    file = checkpoint.file_of(source)
    check_target(file, target)
    content = checkpoint.read(file)
    kept = [key for key in settings.keep if key in content]
    if not kept:
        wanted, found = ", ".join(settings.keep), ", ".join(map(str, content)) or "nothing"
        raise CheckpointError(f"{file}: no network {wanted} in it; it holds {found}")
    left = {key: content[key] for key in (*kept, *ALONGSIDE) if key in content}
    lines = checkpoint.summary(left, str(file))
    checkpoint.save(target, left)
    before, after = (path.stat().st_size / 1e6 for path in (file, target))
    return [*lines, f"saved {target}, {after:.1f} MB of {before:.1f} MB ({file})"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_conversion(
        SlimSettings,
        slim,
        argv,
        prog="python -m Model.slim",
        description=__doc__,
        epilog=EPILOG,
        source=("IN", "checkpoint or run folder"),
    )


if __name__ == "__main__":
    sys.exit(main())
