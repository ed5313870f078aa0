import re

import numpy as np
import pytest
import torch
from PIL import Image

import prune
from Compression.channel_pictures import heat, without_channel
from Compression.pruning import PruneSettings
from Compression.surgery import prune_generator
from Model import bundled, checkpoint
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator
from tests.helpers import error_of
from Util.device import pick_device

CHANNELS = (10, 10, 8, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny generator, a tiny parser, and a parser that finds only background."""
    folder = tmp_path_factory.mktemp("prune")
    torch.manual_seed(0)
    generator = Generator(8, 8, 2, CHANNELS)
    raw = Generator(8, 8, 2, CHANNELS)
    content = {"g": raw, "g_ema": generator, "d": Discriminator(8, channels=(6, 6))}
    checkpoint.save(folder / "full.pt", {**content, "config": {"iterations": 7}})
    checkpoint.save(folder / "generator_only.pt", {"g_ema": generator})
    network = BiSeNet(19, width=4, stem_stride=1, input_size=32)
    network.train()(torch.randn(4, 3, 32, 32))
    checkpoint.save(folder / "parser.pt", {"parser": network, "config": network.config})
    network = BiSeNet(2, width=4, stem_stride=1, input_size=32)
    network.conv_out.conv_out.weight.data.zero_()  # argmax of equal logits: class 0
    checkpoint.save(folder / "blind.pt", {"parser": network, "config": network.config})
    return folder


def run(files, *flags, ckpt="full.pt", parser="parser.pt", device="cpu"):
    arguments = ["--ckpt", str(files / ckpt), "--n_sample", "5", "--batch_size", "2"]
    arguments += ["--device", device]
    if parser:
        arguments += ["--parser_ckpt", str(files / parser)]
    return prune.main([*arguments, *map(str, flags)])


def test_prunes(files, tmp_path, capsys, terminal):
    out = tmp_path / "new" / "pruned.pt"
    assert run(files, "--noise_prob", 0.5, "--seed", 3, "--out", out) == 0
    captured = capsys.readouterr()
    assert "5/5" in captured.err  # the progress bar
    assert re.search(r"channels of input +10 +3 +3.33x", captured.out)
    assert re.search(r"channels of convs.1 +8 +3 +2.67x", captured.out)
    assert re.search(r"parameters +[\d,]+ +[\d,]+ +\d\.\d\dx", captured.out)
    assert re.search(r"MACs per image +[\d,]+ +[\d,]+ +\d\.\d\dx", captured.out)
    assert f"saved {out}" in captured.out
    assert "removed" not in captured.out
    assert [path.name for path in out.parent.iterdir()] == ["pruned.pt"]

    saved = checkpoint.read(out)
    assert set(saved) == {"g", "g_ema", "d", "config"}
    assert saved["config"] == {
        "recipe": "",
        "metric": "content_aware",
        "content": "all,-background,-cloth",
        "init": "pruned",
        "second_kernel": 3,
        "remove_ratio": 0.7,
        "macs": None,
        "allocation": "uniform",
        "seed": 3,
        "n_sample": 5,
        "batch_size": 2,
        "noise_prob": 0.5,
        "source": "full.pt",
        "parser": "parser.pt",
        "channels_before": [10, 10, 8, 8],
        "channels_after": [3, 3, 3, 3],
    }
    teacher = checkpoint.read(files / "full.pt")
    for name, value in teacher["d"].items():
        assert torch.equal(saved["d"][name], value)
    for name, value in saved["g"].items():
        assert torch.equal(saved["g_ema"][name], value)
    network = checkpoint.load_generator(out)
    assert network.channels == (3, 3, 3, 3)
    kept = [torch.equal(network.input.input[0, 0], c) for c in teacher["g_ema"]["input.input"][0]]
    assert sum(kept) == 1


def test_pictures_of_channels(files, tmp_path, capsys):
    assert run(files, "--metric", "l1_out", "--info_pictures", "--out", tmp_path / "a.pt") == 0
    assert f"saved {tmp_path}/a_channels.png" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "a_channels.png"))
    assert picture.shape[0] == 5 * 128 + 4 * 4  # images, and two channels of 4 px and of 8 px


@pytest.mark.parametrize("group", range(4))
def test_a_channel_is_removed_from_all_layers_that_read_it(files, group):
    full = checkpoint.load_generator(files / "full.pt").eval()
    keep = [torch.ones(width, dtype=torch.bool) for width in full.channels]
    keep[group][2] = False
    pruned = prune_generator(full, keep)
    for layer, mask in zip(pruned.rgb_layers, keep[1::2], strict=True):
        layer.conv.weight.data *= (mask.sum() / len(mask)).sqrt()  # ToRGB's gain
    z = torch.randn(3, 8)
    removed = without_channel(full, group, 2)
    expected, found = (net([z], randomize_noise=False) for net in (pruned, removed))
    torch.testing.assert_close(found, expected)
    assert (found - full([z], randomize_noise=False)).abs().max() > 1e-3


def test_heat_goes_from_black_over_red_to_white():
    colours = heat(torch.tensor([0, 1 / 3, 2 / 3, 1, 7]).view(-1, 1, 1, 1)).flatten(1)
    expected = [[-1, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(colours, torch.tensor(expected).float())


def test_same_seed_same_network(files, tmp_path):
    networks = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.pt"
        assert run(files, "--metric", "random", "--seed", seed, "--out", out, parser=None) == 0
        networks.append(checkpoint.read(out)["g_ema"])
    a, b, c = networks
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_details_and_generated_name(files, tmp_path, capsys):
    flags = ["--metric", "l1_out", "--remove_ratio", 0.5, "--info_print", "--out", tmp_path]
    assert run(files, *flags, "--generated_img_size", 8, ckpt="generator_only.pt", parser=None) == 0
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"l1_out_0\.5_8px_\d{8}-\d{6}\.pt", path.name)
    assert "d" not in checkpoint.read(path)
    assert checkpoint.read(path)["config"]["parser"] == ""
    output = capsys.readouterr().out
    for layer in ("style", "input", "conv1", "to_rgb1", "convs.0", "convs.1", "to_rgbs.0"):
        assert re.search(rf"^{layer} ", output, re.MULTILINE)
    assert "10>10       5>5" in output
    assert "widths: 0.5 of every layer removed" in output


def test_default_folder(files, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "PRUNED_FOLDER", tmp_path / "pruned_model")
    assert run(files, "--metric", "random", "--remove_ratio", 0, parser=None) == 0
    (path,) = (tmp_path / "pruned_model").iterdir()
    assert re.fullmatch(r"random_0_8px_\d{8}-\d{6}\.pt", path.name)
    assert checkpoint.load_generator(path).channels == CHANNELS


def test_bundled_files_are_the_defaults(tmp_path, monkeypatch, capsys, terminal):
    assert bundled.MODEL.is_file()
    assert bundled.PARSER.is_file()
    monkeypatch.setattr(bundled, "PRUNED_FOLDER", tmp_path)
    assert prune.main(["--n_sample", "20"]) == 0
    assert "20/20" in capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    config = checkpoint.read(path)["config"]
    assert config["source"] == bundled.MODEL.name
    assert config["parser"] == bundled.PARSER.name
    defaults = PruneSettings()
    assert (defaults.n_sample, defaults.batch_size, defaults.noise_prob) == (400, 10, 0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--remove_ratio", "1"], "--remove_ratio must be below 1, not 1.0"),
        (["--remove_ratio", "nan"], "--remove_ratio must be a finite number, not nan"),
        (["--n_sample", "0"], "--n_sample must be at least 1, not 0"),
        (["--batch_size", "x"], "--batch_size: invalid int value: 'x'"),
        (["--noise_prob", "0"], "--noise_prob must be above 0, not 0.0"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--metric", "l3"], "--metric l3: unknown; take content_aware"),
        (["--device", "tpu"], "--device tpu: unknown"),
        (["--generated_img_size", "256"], "--generated_img_size 256 contradicts"),
        (["--noise_prob", "1e-12"], "noise_prob is so low"),
    ],
)
def test_bad_flags(files, tmp_path, capsys, flags, message):
    line = error_of(capsys, lambda: run(files, *flags, "--out", tmp_path))
    assert line.startswith("prune.py: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_bad_files(files, tmp_path, capsys, monkeypatch):
    def error(*flags, **kwargs):
        return error_of(capsys, lambda: run(files, *flags, "--out", tmp_path, **kwargs))

    assert "--ckpt " in (line := error(ckpt="nothing.pt"))
    assert "nothing.pt: no such file" in line
    assert "no network 'g_ema'" in error(ckpt="parser.pt")
    assert "--parser_ckpt " in (line := error(parser="nothing.pt"))
    assert "nothing.pt: no such file" in line
    assert "--parser_ckpt " in error(parser="full.pt")
    assert "content masks of all 5 images are empty" in error(parser="blind.pt")
    monkeypatch.setattr(bundled, "PUBLISHED_PARSER", files / "79999_iter.pth")
    line = error(parser=None)
    assert "79999_iter.pth is missing" in line
    assert "face-parsing.PyTorch" in line
    assert list(tmp_path.iterdir()) == []


def test_bad_target(files, capsys):
    full = files / "full.pt"
    before = full.read_bytes()
    for out, message in ((full, "is the checkpoint to prune"), (full / "a.pt", "is no folder")):
        line = error_of(capsys, lambda out=out: run(files, "--metric", "random", "--out", out))
        assert message in line
    assert full.read_bytes() == before


def test_help(capsys):
    with pytest.raises(SystemExit) as info:
        prune.main(["--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    for metric in prune.SCORES:
        assert re.search(rf"^  {metric} +\w", text, re.MULTILINE)
    assert "python3 prune.py" in text


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device cuda: PyTorch finds no GPU"):
        pick_device("cuda")
    for name in ("tpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ValueError, match="unknown; take auto"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2: there are 2 GPUs"):
        pick_device("cuda:2")
