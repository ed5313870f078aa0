"""What a batch needs is known before it is computed."""

import re
from dataclasses import replace

import pytest
import torch

import train
from Compression import batch_memory
from Compression.batch_memory import Need, check_batch, need
from tests.test_train_cli import SMALL, run
from tests.test_training import config, make_trainer
from Util import distributed, memory
from Util.memory import imagined
from Util.settings import SettingError

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


def test_what_is_left_of_a_container(tmp_path):
    assert memory._left_in_container(tmp_path) is None
    for name, text in (("max", "max"), ("current", "300"), ("stat", "anon 100\ninactive_file 50")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._left_in_container(tmp_path) is None  # no limit
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_in_container(tmp_path) == 750
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "300"), ("stat", "cache 1")):
        (tmp_path / f"memory/memory.{name}").write_text(text)
    assert memory._left_in_container(tmp_path) == 600
