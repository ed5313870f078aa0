"""The number of threads: chosen by the user, else as many as there are idle cores."""

import os
import time

import pytest
import torch

from benchmarks.busy import busy_processes, speed
from Util import threads
from Util.device import pick_device

STATISTICS = """cpu  130 10 60 700 20 0 0 0 9 9
cpu0 100 10 50 300 20 1 2 3 9 9
cpu1 30 0 10 400 0 0 0 0 0 0
cpu10 7 7 7 7 7 7 7 7 7 7
intr 12345 0 0
"""


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch with two threads, and a user who has said nothing."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads.leave_busy_cores.cache_clear()
    yield
    threads.leave_busy_cores.cache_clear()
    torch.set_num_threads(before)


def test_the_times_of_this_process_cores_are_added_up():
    lines = STATISTICS.splitlines()
    assert threads.sum_times(lines, {"cpu0"}) == (320, 486)
    assert threads.sum_times(lines, {"cpu0", "cpu1"}) == (720, 926)
    assert threads.sum_times(lines, {"cpu5"}) == (0, 0)


@pytest.mark.parametrize(
    ("idle", "most", "expected"),
    [(0.1, 2, 1), (1.0, 2, 1), (1.4, 2, 1), (1.7, 2, 2), (7.0, 4, 4), (62.8, 64, 63)],
)
def test_threads_for_idle_cores(idle, most, expected):
    assert threads.threads_for(idle, most) == expected


def test_idle_cores_are_counted_or_unknown(monkeypatch, tmp_path):
    idle = threads.idle_cores(0.05)
    assert idle is None or 0 <= idle <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(threads, "STATISTICS", tmp_path / "none")
    assert threads.idle_cores(0) is None


def test_a_busy_core_takes_a_thread_once(two_threads, monkeypatch, capsys):
    monkeypatch.setattr(threads, "idle_cores", lambda: 1.1)
    pick_device("cpu")
    assert torch.get_num_threads() == 1
    assert "1 of 2 threads" in capsys.readouterr().err
    torch.set_num_threads(2)  # a later choice stays
    pick_device("cpu")
    assert torch.get_num_threads() == 2
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_the_number_of_the_environment_stays(two_threads, monkeypatch, name):
    monkeypatch.setattr(threads, "idle_cores", lambda: 0.0)
    monkeypatch.setenv(name, "2")
    pick_device("cpu")
    assert torch.get_num_threads() == 2


def test_a_given_number_is_taken(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "idle_cores", lambda: 0.0)
    pick_device("cpu", threads=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("idle", [2.0, None])
def test_idle_or_unknown_cores_change_nothing(two_threads, monkeypatch, capsys, idle):
    monkeypatch.setattr(threads, "idle_cores", lambda: idle)
    pick_device("cpu")
    assert torch.get_num_threads() == 2
    assert not capsys.readouterr().err


def test_the_benchmark_works_and_ends_its_busy_processes():
    others = children_of_this_process()
    with busy_processes(1):
        busy = children_of_this_process() - others
        assert busy
    assert not busy & children_of_this_process()
    images, count = speed("pictures", 0)
    assert images > 0
    assert count == 1


def children_of_this_process() -> set[str]:
    time.sleep(0.01)
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(file.read().split())
