"""What a run tells of itself: times, memory, TensorBoard's steps, Weights & Biases."""

import sys
import types

import pytest
import torch

from Compression import run as training_run
from tests.test_train_cli import SMALL, run
from tests.test_training import config, images, make_trainer
from Util import run_log
from Util.clock import Clock
from Util.run_log import TIMING, read_metrics
from Util.settings import SettingError


def test_a_line_tells_times_norms_memory_and_what_is_left(folder):
    assert run(folder, f"{SMALL} --iter 6 --log_freq 3 --amp fp16 --g_reg_every 2") == 0
    first, last = read_metrics(folder / "run")
    norms = {f"grad_norm_{p}" for p in ("discriminator", "r1", "generator", "path_length")}
    assert norms | {"amp_scale", "amp_skipped_generator", *TIMING} <= set(first)
    assert first["seconds_left"] > last["seconds_left"] == 0
    assert 0 < first["seconds_generator"] < 60
    assert last["time"] >= first["time"] > 1.7e9
    assert first["grad_norm_generator"] > 0


def test_only_the_iterations_before_a_line_are_timed():
    trainer = make_trainer(config(d_reg_every=2, g_reg_every=1, log_freq=5))
    timed = []
    for real in images(5):
        trainer.iterate(real)
        timed.append(trainer.clock.running)
    assert timed == [False, False, False, True, True]
    assert set(trainer.clock.flush()) >= {"seconds_generator", "seconds_path"}
    assert trainer.clock.flush() == {}


def test_the_clock_reads_events_of_a_gpu_only_when_asked(monkeypatch):
    log, now = [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, other):
            log.append("read")
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    clock = Clock(torch.device("cuda"))
    for _ in range(2):
        with clock.part("generator"):
            next(now)
    assert log == []
    assert clock.flush() == {"seconds_generator": 2.0}
    assert log == ["wait", "read", "read"]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path, monkeypatch):
    seen = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda where, purge_step: seen.append(purge_step)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for resume_at in (None, 7):
        run_log._event_writer(tmp_path, resume_at)
    assert seen == [None, 8]


@pytest.fixture
def wandb(monkeypatch):
    """Weights & Biases, without it."""
    module, calls = types.ModuleType("wandb"), []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(("axis", step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        if settings["project"] == "refused":
            raise module.Error("no key")
        return Run()

    module.init, module.Image, module.Error = (
        init,
        lambda pixels: "image",
        type("E", (Exception,), {}),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_weights_and_biases_gets_the_log(folder, wandb):
    assert run(folder, f"{SMALL} --iter 2 --log_freq 1 --wandb faces") == 0
    kinds = [call[0] for call in wandb]
    assert kinds == ["init", "axis", "log", "log", "log", "finish"]
    settings = wandb[0][1]
    assert (settings["project"], settings["name"], settings["resume"]) == ("faces", "run", "allow")
    assert settings["config"]["iter"] == 2
    assert wandb[2][1] == read_metrics(folder / "run")[0]
    assert wandb[4][1] == {"iteration": 2, "samples": "image"}


def test_weights_and_biases_that_refuses_or_is_missing_is_one_line(
    folder,
    wandb,
    monkeypatch,
    capsys,
):
    assert run(folder, f"{SMALL} --iter 2 --wandb refused") == 2
    assert "no key" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(run_log, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="wandb the package wandb is not installed; pip install"):
        training_run.check(config(path=str(folder / "data"), wandb="faces"))
