"""Runs the jobs of a plan in order, some side by side; what is done is not done again."""

import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from types import FrameType
from typing import Any

import torch

from studies.jobs import (
    Places,
    check_unchanged,
    clean,
    prepare,
    run_job,
    settings_of,
)
from studies.plan import Job, Plan, read_plan
from studies.results import append_result, read_results, results_file
from Util.files import lock_folder
from Util.run_log import commit
from Util.stopping import StoppedError


@dataclass(frozen=True)
class Progress:
    """How far a plan is.

    Attributes:
        done: names of the jobs with a result.
        seconds: of the processor that a job took, the mean of those done; None before the first.
    """

    done: frozenset[str]
    seconds: float | None


def progress(plan: Plan, places: Places) -> Progress:
    """Read how far a plan is off its results."""
    rows = read_results(results_file(places.results, plan.name))
    spent = [sum(row["seconds"].values()) for row in rows if row.get("seconds")]
    mean = sum(spent) / len(spent) if spent else None
    return Progress(frozenset(row["job"] for row in rows), mean)


def chosen_jobs(plan: Plan, only: str) -> list[Job]:
    """Give the jobs whose name, arm or group fits a pattern such as ``cagc*``; all for none.

    Raises:
        ValueError: none fits.
    """
    jobs = [
        job
        for job in plan.jobs
        if not only or any(fnmatchcase(n, only) for n in (job.name, job.arm.name, job.arm.group))
    ]
    if not jobs:
        arms = ", ".join(arm.name for arm in plan.arms)
        raise ValueError(f"--only {only}: fits no job; the arms are {arms}")
    return jobs


def describe_jobs(plan: Plan, jobs: Sequence[Job], places: Places, processes: int) -> str:
    """List jobs with their state, and estimate the time of those that are left."""
    known = progress(plan, places)
    lines = []
    for job in jobs:
        begun = "begun" if places.job(plan, job).is_dir() else "to do"
        lines.append(f"{'done' if job.name in known.done else begun:<6} {job.name}")
    left = sum(job.name not in known.done for job in jobs)
    if not left:
        lines.append("nothing left")
    elif known.seconds is None:
        lines.append(f"{left} jobs left; no job is done yet, so the time is unknown")
    else:
        hours = left * known.seconds / processes / 3600
        lines.append(
            f"{left} jobs left, about {known.seconds:.0f} s of one core each:"
            f" {hours:.1f} h in {processes} processes"
        )
    return "\n".join(lines)


def facts(code: str | None) -> dict[str, Any]:
    """What a result depends on besides its settings: the commit of the code, and more."""
    return {
        "commit": code,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def run_jobs(plan: Plan, jobs: Sequence[Job], places: Places) -> int:
    """Run jobs one after the other; those done, or run by another process, are passed over.

    Returns:
        The number of jobs that failed; each has been reported.

    Raises:
        StoppedError: a signal.
    """
    failed, file = 0, results_file(places.results, plan.name)
    code = commit()  # of what runs, whatever is committed meanwhile
    for job in jobs:
        folder = places.job(plan, job)
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        if lock is None:
            continue
        try:
            done = [row for row in read_results(file) if row["job"] == job.name]
            if done:
                check_unchanged(job, done[0]["settings"], settings_of(plan, job), str(file))
                clean(plan, job, places)
                continue
            result = run_job(plan, job, places)
            append_result(file, result | facts(code))
            clean(plan, job, places)
            print(_report(result), flush=True)
        except (ValueError, OSError, ArithmeticError) as error:
            failed += 1
            print(f"{job.name}: failed: {error}", file=sys.stderr, flush=True)
        except RuntimeError as error:  # a loss that is not finite, or a mistake in the code
            failed += 1
            traceback.print_exc()
            print(f"{job.name}: failed: {error}", file=sys.stderr, flush=True)
        finally:
            os.close(lock)
    return failed


def _report(result: dict[str, Any]) -> str:
    """Say in a line what a job found at its end."""
    figures = result["points"][-1]["figures"]
    shown = " ".join(f"{k} {v:.4g}" for k, v in figures.items() if ":" not in k)
    spent = " + ".join(f"{k} {v:.0f}" for k, v in result["seconds"].items())
    return f"{time.strftime('%H:%M:%S')} {result['job']}: {shown} ({spent} s)"


def _work(plan_name: str, only: str, places: Places, threads: int) -> None:
    """Run a plan's jobs in a process of its own."""
    torch.set_num_threads(threads)
    plan = read_plan(plan_name)
    try:
        failed = run_jobs(plan, chosen_jobs(plan, only), places)
    except (StoppedError, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(1 if failed else 0)


def run_study(plan_name: str, only: str, places: Places, processes: int) -> int:
    """Run what is left of a plan.

    Args:
        plan_name: see `studies.plan.read_plan`.
        only: see `chosen_jobs`.
        places: of the files.
        processes: that run side by side; they share the threads.

    Returns:
        The exit code: 0 if all jobs have a result, 1 if some failed or are another study's, 130
        after a signal.
    """
    plan = read_plan(plan_name)
    chosen_jobs(plan, only)
    prepare(plan, places)
    os.environ["TQDM_MININTERVAL"] = "60"  # read by the processes: bars of several would mix
    threads = max(1, torch.get_num_threads() // processes)
    context = get_context("spawn")
    arguments = (plan_name, only, places, threads)
    workers = [context.Process(target=_work, args=arguments) for _ in range(processes)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.pid and worker.is_alive():
                os.kill(worker.pid, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    codes = {worker.exitcode or 0 for worker in workers}
    if codes & {130, -signal.SIGTERM, -signal.SIGINT}:
        return 130
    done = progress(plan, places).done
    if left := [job.name for job in chosen_jobs(plan, only) if job.name not in done]:
        print(f"no result yet of {', '.join(left)}", file=sys.stderr)
    return 1 if left or any(codes) else 0
