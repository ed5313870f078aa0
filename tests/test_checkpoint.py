import os
import pickle

import pytest
import torch

from Model import checkpoint
from Model.checkpoint import CheckpointError, load_discriminator, load_face_parser, load_generator
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator

CHANNELS = (6, 5, 4, 4, 3, 3)


@pytest.fixture
def networks():
    return {
        "g": Generator(16, style_dim=8, n_mlp=2, channels=CHANNELS),
        "g_ema": Generator(16, style_dim=8, n_mlp=2, channels=CHANNELS),
        "d": Discriminator(16, channels=(6, 5, 4)),
    }


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_sizes_are_read_off_the_tensors(tmp_path, networks):
    checkpoint.save(tmp_path / "a" / "model.pt", networks)
    generator = load_generator(tmp_path / "a" / "model.pt")
    assert (generator.size, generator.style_dim, generator.n_mlp) == (16, 8, 2)
    assert (generator.channels, generator.second_kernel) == (CHANNELS, 3)
    equal_states(generator, networks["g_ema"])
    equal_states(load_generator(str(tmp_path / "a" / "model.pt"), key="g"), networks["g"])
    discriminator = load_discriminator(tmp_path / "a" / "model.pt")
    assert discriminator.channels == (6, 5, 4)
    equal_states(discriminator, networks["d"])


def test_the_size_of_filters_is_read_off_too(networks):
    small = networks["g"].like(CHANNELS, second_kernel=1)
    loaded = load_generator({"g_ema": small.state_dict()})
    assert loaded.second_kernel == 1
    equal_states(loaded, small)


def test_files_without_noise_or_with_latent_avg_or_with_one_network_load(tmp_path, networks):
    state = networks["g_ema"].state_dict()
    bare = {k: v for k, v in state.items() if not k.startswith("noises.")}
    torch.save({"g_ema": bare, "latent_avg": torch.zeros(8)}, tmp_path / "old.pt")
    first, second = (load_generator(tmp_path / "old.pt") for _ in range(2))
    equal_states(first, second)
    torch.testing.assert_close(first.conv1.conv.weight, networks["g_ema"].conv1.conv.weight)
    assert first.fixed_noise[-1].std() > 0.5


def test_filling_noise_leaves_the_random_state_alone(networks, monkeypatch):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reseeded = []  # the streams of GPUs, which a run draws its latents from
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    load_generator({"g_ema": networks["g_ema"].state_dict()})
    assert not reseeded
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def broken(networks, change):
    state = networks["g_ema"].state_dict()
    change(state)
    return {"g_ema": state}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("convs.1.conv.modulation.bias"), "lacks tensor convs.1.conv.modulation"),
        (lambda s: s.pop("input.input"), "no tensor input.input"),
        (lambda s: s.pop("convs.2.conv.weight"), "positive channel counts|unexpected|lacks"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (
            lambda s: s.update({"conv1.activate.bias": torch.zeros(9)}),
            r"has shape \(9,\), expected",
        ),
        (lambda s: s.update({"input.input": torch.zeros(3)}), "not 4-D"),
        (lambda s: s.update({"conv1.activate.bias": 3}), "is no tensor"),
    ],
)
def test_damaged_generators_are_refused(networks, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load_generator(broken(networks, change))
    assert "\n" not in str(error.value)


def test_the_wrong_size_or_network_is_refused(tmp_path, networks):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"g_ema": networks["g_ema"]})
    with pytest.raises(CheckpointError, match="makes 16 px images, but 32 px were asked for"):
        load_generator(path, size=32)
    with pytest.raises(CheckpointError, match=r"model\.pt: no network 'd' in it; it holds g_ema"):
        load_discriminator(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_generator(tmp_path / "none.pt")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    writer({"g_ema": Attack(str(trace))}, path)
    with pytest.raises(CheckpointError) as error:
        load_generator(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_generator(path)
    assert "\n" not in str(error.value)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="expected a dict"):
        load_generator(path)


def test_every_tensor_is_saved_from_the_cpu(tmp_path, monkeypatch):
    layer = torch.nn.Linear(2, 3, bias=False)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape) or cpu(self))
    content = {"g": layer, "g_optim": adam.state_dict(), "rng": [{"cpu": torch.zeros(4)}], "n": 1}
    checkpoint.save(tmp_path / "model.pt", content)
    assert sorted(moved) == sorted([(), (4,), (3, 2), (3, 2), (3, 2)])  # step, and two moments
    read = checkpoint.read(tmp_path / "model.pt")
    torch.testing.assert_close(read["g_optim"], adam.state_dict(), rtol=0, atol=0)
    assert read["n"] == 1


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"value": 1})

    def fail(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"value": 2})
    assert checkpoint.read(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_face_parser_loads_bare_or_with_its_config(tmp_path):
    network = BiSeNet(n_classes=5, width=4, stem_stride=2, input_size=64)
    checkpoint.save(tmp_path / "ours.pt", {"parser": network, "config": network.config})
    loaded = load_face_parser(tmp_path / "ours.pt")
    assert loaded.config == network.config
    assert not loaded.training
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert load_face_parser(tmp_path / "bare.pth").input_size == 512
    with pytest.raises(CheckpointError, match="right kind of network"):
        load_face_parser({"parser": {"x": torch.zeros(1)}})
