"""Which device is chosen, on machines whose GPUs are made up."""

import os
from dataclasses import dataclass, field

import pytest
import torch

import train
from Compression import run as training_run
from train_hyperparams import TrainConfig
from Util import device, distributed
from Util.settings import SettingError


@dataclass
class Machine:
    gpus: int
    current: list[int] = field(default_factory=list)


@pytest.fixture
def machine(monkeypatch):
    """Call it with a number of GPUs and variables of the environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def make(gpus, **variables):
        made = Machine(gpus)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda d: made.current.append(d.index))
        return made

    return make


def launched(local, processes=2):
    """Variables of a launcher on one machine."""
    return {
        "RANK": local,
        "WORLD_SIZE": processes,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": processes,
    }


def chosen(**settings):
    config = TrainConfig(path=".", **settings)
    training_run.check(config)
    return str(training_run._device(config))


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, {}, "cpu"),
        (4, {}, "cuda:0"),
        (4, {"device": "cuda:1"}, "cuda:1"),
        (4, {"gpu_device_ids": (3,)}, "cuda:3"),
        (4, {"primary_device": "cuda:2"}, "cuda:2"),
        (4, {"gpu_device_ids": (3,), "primary_device": "cuda:3"}, "cuda:3"),
        (4, {"gpu_device_ids": (3,), "device": "cpu"}, "cpu"),
    ],
)
def test_one_process_takes_the_gpu_it_is_given_and_touches_no_other(
    machine, gpus, settings, expected
):
    made = machine(gpus)
    assert chosen(**settings) == expected
    assert made.current == ([] if expected == "cpu" else [int(expected[-1])])


@pytest.mark.parametrize("name", ["auto", "cuda:0", "cuda"])
@pytest.mark.parametrize("local", [0, 1])
def test_each_of_several_processes_takes_its_own_gpu_alone(machine, name, local):
    made = machine(2, **launched(local))
    assert device.pick_device(name) == torch.device("cuda", local)
    assert made.current == [local]


def test_listed_gpus_are_given_out_in_order(machine):
    assert [chosen(gpu_device_ids=(3, 1)) for local in (0, 1) if machine(4, **launched(local))] == [
        "cuda:3",
        "cuda:1",
    ]
    machine(4, **launched(2, 4))  # the list of a run that now goes on with more processes
    assert chosen(gpu_device_ids=(3, 1)) == "cuda:2"


def test_a_launcher_may_leave_open_how_many_processes_there_are(machine, monkeypatch):
    machine(4, **launched(2, 4))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert chosen() == "cuda:2"


def test_a_process_that_sees_one_gpu_takes_it(machine):
    made = machine(1, CUDA_VISIBLE_DEVICES="2", **launched(1))
    assert chosen(gpu_device_ids=(0, 1)) == "cuda:0"
    assert made.current == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_device_ids": (0, 4)}, r"gpu_device_ids .*there are 4 GPUs, 0 to 3"),
        ({"gpu_device_ids": (1, 1)}, "gpu_device_ids .*name each GPU once"),
        ({"gpu_device_ids": ()}, "gpu_device_ids .*at least one"),
        ({"gpu_device_ids": (3,), "primary_device": "cuda:2"}, "primary_device cuda:2: not the"),
        ({"device": "cuda:4"}, "cuda:4: there are 4 GPUs"),
    ],
)
def test_gpus_that_are_not_there_are_refused(machine, settings, message):
    machine(4)
    with pytest.raises(SettingError, match=message):
        chosen(**settings)


def test_a_process_without_a_gpu_of_its_own_says_so(machine):
    machine(2, **launched(2, 3))
    with pytest.raises(SettingError, match="cuda:2: there are 2 GPUs"):
        device.pick_device("auto")


@pytest.mark.parametrize("visible", [None, "4,6", "GPU-8f3a,GPU-77b1"])
def test_several_gpus_start_as_many_processes_and_what_is_visible_stays(
    machine, monkeypatch, visible
):
    machine(2, **({"CUDA_VISIBLE_DEVICES": visible} if visible else {}))
    started = {}

    def execute(program, argv):
        started.update(argv=argv, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        raise SystemExit

    monkeypatch.setattr(distributed.os, "execv", execute)
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(distributed, "cores", lambda: 9)
    flags = ["--path", ".", "--gpu_device_ids", "0,1"]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "--nproc_per_node=2" in started["argv"]
    assert started["argv"][-4:] == flags
    assert started["visible"] == visible
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_gpus_talk_by_nccl_and_agree_by_gloo(machine, monkeypatch):
    machine(2, **launched(1))
    given = {}

    def init(backend, **options):
        given.update(options, backend=backend)

    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    monkeypatch.setattr(distributed, "_password", lambda *_: "word")
    monkeypatch.setattr(distributed.distributed, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(distributed.distributed, "init_process_group", init)
    distributed.join(device.pick_device("auto"), 7)
    assert given["backend"] == "cpu:gloo,cuda:nccl"
    assert given["device_id"] == torch.device("cuda", 1)
    assert given["timeout"].total_seconds() == 7
