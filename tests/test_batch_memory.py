"""What a batch needs is known before it is computed."""

import os
import re
from dataclasses import replace

import pytest
import torch

import train
from Compression import batch_memory
from Compression.batch_memory import Need, check_batch, need
from Dataset.loading import default_workers
from tests.test_train_cli import SMALL, run
from tests.test_training import config, make_trainer
from Util import control_groups, distributed, memory
from Util.memory import imagined
from Util.settings import SettingError
from Util.workers import cores

GIB = 2**30


def test_the_meter_counts_what_is_held():
    weights = torch.nn.Linear(1000, 1000)
    state = torch.get_rng_state()
    with imagined(weights) as (copied, meter), torch.no_grad():
        assert meter.held == 0  # what there was before is not counted
        x = torch.randn(2**20, 1000)  # 4 GiB that nobody has to have
        y = copied(x)
        assert meter.held == 2 * 4000 * 2**20
        del x
        y.sum().item()
        y[0].add_(1)  # in place, and views: nothing new
        assert meter.held < 2 * 4000 * 2**20
        copied.weight.data.zero_()
        (y * 2).numpy()
    assert meter.peak == 2 * 4000 * 2**20
    assert weights.weight.count_nonzero() > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def counted():
    """A trainer, as it was before and after its iteration was counted, and what was found."""
    trainer = make_trainer(config())
    before = {k: v.clone() for k, v in trainer.generator.state_dict().items()}
    state = torch.get_rng_state()
    found = need(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in trainer.generator.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in trainer.generator.parameters())
    assert not trainer.d_optim.state
    return trainer, found


def test_counting_leaves_the_trainer_alone(counted):
    trainer, found = counted
    parameters = [*trainer.generator.parameters(), *trainer.discriminator.parameters()]
    assert found.fixed == 3 * 4 * sum(p.numel() for p in parameters)
    assert found.images == 4
    assert found.fixed < found.peak < 2**20
    assert found.free == pytest.approx(memory.free_bytes(trainer.device), rel=0.5)


def test_the_largest_batch_that_fits():
    found = Need(images=16, peak=9 * GIB, fixed=GIB, free=5 * GIB)
    assert not found.fits
    assert found.largest == 8
    assert str(found).startswith("a batch of 16 images takes at least 9 GiB of 5 GiB that are free")
    assert Need(16, 9 * GIB, GIB, GIB // 2).largest == 0
    assert Need(16, 9 * GIB, GIB, 9 * GIB).fits
    unknown = Need(16, 9 * GIB, GIB, None)
    assert unknown.fits
    assert unknown.largest == 16


@pytest.mark.parametrize(
    ("processes", "part", "remedy"),
    [
        (1, 0, "take 8 or less"),
        (4, 0, "take --batch_gpu 8 or a batch of 32 or less"),
        (1, 12, "take --batch_gpu 4"),
        (2, 4, "fewer at a time do not fit either"),
    ],
)
def test_the_advice_is_for_a_process(processes, part, remedy):
    found = Need(16, 9 * GIB, GIB, 5 * GIB, processes, part)
    assert found.remedy == remedy
    who = "a batch of 16 images" if processes == 1 and not part else "each process with 16 images"
    assert str(found).startswith(who)


def test_a_process_counts_its_own_share_and_talks_to_no_other(monkeypatch):
    alone = need(make_trainer(config()))
    backend = distributed.distributed
    monkeypatch.setattr(backend, "is_initialized", lambda: True)
    monkeypatch.setattr(backend, "get_world_size", lambda: 2)
    monkeypatch.setattr(backend, "get_rank", lambda: 0)
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(backend, name, lambda *args, **kwargs: pytest.fail("it talks"))
    trainer = make_trainer(replace(config(), batch_size=8))
    found = need(trainer)
    assert (found.images, found.processes) == (4, 2)
    assert found.peak == alone.peak
    assert trainer.updates[0].gradients._buckets  # of the copy they were left out
    assert need(make_trainer(replace(config(), batch_size=32, batch_gpu=4))).together == 4


@pytest.mark.parametrize(
    ("share", "outcome"), [(3, ""), (1.2, "warning: a batch of 4"), (0.7, "take 2 or less")]
)
def test_a_batch_that_cannot_fit_is_refused(counted, monkeypatch, share, outcome):
    trainer, found = counted
    held = Need(4, found.peak, found.fixed, int(found.fixed + share * (found.peak - found.fixed)))
    monkeypatch.setattr(batch_memory, "need", lambda trainer: held)
    monkeypatch.setattr(batch_memory, "free_bytes", lambda device: 0)
    lines = []
    if share < 1:
        with pytest.raises(SettingError, match=f"batch_size a batch of 4 .* {outcome}"):
            check_batch(trainer, lines.append)
    else:
        check_batch(trainer, lines.append)
        assert "".join(lines).startswith(outcome)
        assert bool(lines) == bool(outcome)


def test_a_small_batch_is_not_counted_and_a_failure_to_count_stops_nothing(counted, monkeypatch):
    trainer, _ = counted

    def fail(trainer):
        raise NotImplementedError("no shape")

    monkeypatch.setattr(batch_memory, "need", fail)
    lines = []
    check_batch(trainer, lines.append)
    assert not lines
    check_batch(trainer, lines.append, always=True)
    assert lines == ["memory: not counted (NotImplementedError)"]


def test_training_refuses_before_anything_is_written(folder, monkeypatch, capsys):
    free = 40 * 2**20
    monkeypatch.setattr(batch_memory, "free_bytes", lambda device: free)
    big = f"{SMALL} --iter 1".replace("--batch_size 4", "--batch_size 5000")
    assert run(folder, big) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: --batch_size a batch of 5000 images takes at least")
    assert not (folder / "run").exists()
    largest = int(re.search(r"take (\d+) or less", line)[1])
    trainer = make_trainer(replace(config(), batch_size=largest))
    assert 0.9 * free < need(trainer).peak <= free


def test_a_dry_run_tells_the_memory(folder, capsys):
    assert train.main(f"--path {folder}/data {SMALL} --dry_run".split()) == 0
    assert re.search(r"^memory: a batch of 4 images takes at least", capsys.readouterr().out, re.M)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A tree of control groups in which this process has no place yet."""
    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def test_what_is_left_of_a_container(groups):
    assert control_groups.memory_left() is None
    write(groups, memory_max="max", memory_current="300", memory_stat="anon 1\ninactive_file 50")
    assert control_groups.memory_left() is None  # no limit
    write(groups, memory_max="1000\n")
    assert control_groups.memory_left() == 750
    (groups / "memory.max").unlink()
    write(groups / "memory", memory_stat="cache 1")
    write(groups / "memory", memory_limit_in_bytes="900", memory_usage_in_bytes="300")
    assert control_groups.memory_left() == 600


def test_a_job_has_the_least_of_its_group_and_those_above(groups, tmp_path):
    (tmp_path / "own").write_text("0::/slurm/job\n")
    write(groups / "slurm", memory_max="900", memory_current="500", memory_stat="", cpu_max="max 1")
    write(groups / "slurm/job", memory_max="800", memory_current="300", memory_stat="")
    assert control_groups.memory_left() == 400
    assert control_groups.processors() is None
    write(groups / "slurm/job", cpu_max="250000 100000")
    assert control_groups.processors() == 3
    (tmp_path / "own").write_text("4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n")
    write(groups / "cpu/job", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    write(groups / "memory/job", memory_limit_in_bytes="90", memory_usage_in_bytes="30")
    write(groups / "memory/job", memory_stat="inactive_file 9")
    assert (control_groups.processors(), control_groups.memory_left()) == (2, 69)
    write(groups / "cpu/job", cpu_cfs_quota_us="-1")
    assert control_groups.processors() is None


def test_a_container_has_as_many_cores_as_it_has_time(monkeypatch):
    monkeypatch.setattr(control_groups, "processors", lambda: 1)
    assert cores() == default_workers() == 1
    monkeypatch.setattr(control_groups, "processors", lambda: 10**6)
    assert cores() == len(os.sched_getaffinity(0))
