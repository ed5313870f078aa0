"""Runs of train.py in several CPU processes under PyTorch's launcher.

As ``torchrun --nproc_per_node`` does it, but forked: none of the processes has to import PyTorch.
"""

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train

LIMIT = 300
"""Seconds that a test waits at most, on a machine that may be busy."""


@dataclass
class Job:
    """A launcher and its processes.

    Attributes:
        launcher: its process number.
        folder: of output and process numbers.
    """

    launcher: int
    folder: Path

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def process(self, rank: int) -> int:
        """Wait for a process to start; return its number."""
        file = self.folder / f"pid{rank}"
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
        return int(file.read_text())

    def end(self) -> int:
        """Wait for the launcher; return its exit code, negative for a signal."""
        until = time.monotonic() + LIMIT
        while time.monotonic() < until:
            number, status = os.waitpid(self.launcher, os.WNOHANG)
            if number:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.killpg(self.launcher, signal.SIGKILL)
        os.waitpid(self.launcher, 0)
        raise AssertionError(f"not ended after {LIMIT} s: {self.output}")


def wait_for(condition):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def start(folder, flags, n=2, sabotage=lambda rank: None, restarts=0, work=train.main):
    """Start ``n`` processes that do ``work(flags)``; each calls ``sabotage(its rank)`` first."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("pid*"):
        old.unlink()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
        max_restarts=restarts,
        shutdown_timeout=4,
        logs_specs=DefaultLogsSpecs(),
    )

    def process(argv):
        rank = int(os.environ["RANK"])
        # Those of the launcher, which is no ancestor of torchrun's processes' code.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        (folder / f"pid{rank}").write_text(f"{os.getpid()}\n")
        sabotage(rank)
        sys.exit(work(argv))

    if launcher := os.fork():
        return Job(launcher, folder)
    code = 1
    try:
        os.setpgid(0, 0)
        with open(folder / "output", "ab") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        elastic_launch(config, process)(flags.split())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def attempt() -> int:
    """How often the launcher has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
