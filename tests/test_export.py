"""ONNX files compute what PyTorch does, say what they are, and are whole or not there."""

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch

import export_onnx
from benchmarks import runtimes
from Model import bundled, checkpoint
from Model import onnx as export
from Model.complexity import macs, parameters
from Model.generator import Generator, full_size_channels
from Model.onnx import Form, describe, save_onnx
from Model.ops.dispatch import VARIABLE

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def small_generator(size: int, divisor: int = 64, ratio: float = 0.0) -> Generator:
    """A generator of narrow layers, pruned by a ratio, with noise that matters."""
    full = [max(c // divisor, 4) for c in full_size_channels(size)]
    channels = [c - int(c * ratio) for c in full]
    generator = Generator(size, style_dim=16, n_mlp=2, channels=channels)
    for layer in generator.styled_convs:
        torch.nn.init.normal_(layer.noise.weight)
        torch.nn.init.normal_(layer.activate.bias)
    return generator.eval().requires_grad_(False)


@pytest.fixture
def generator():
    return small_generator(8)


@pytest.fixture
def w_mean():
    return torch.randn(1, 16)


def session(file):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(file, **inputs):
    (result,) = session(file).run(None, {k: v.numpy() for k, v in inputs.items()})
    return torch.from_numpy(result)


def psi(value: float) -> torch.Tensor:
    return torch.full((1,), value)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "ratio"),
    [
        (256, 0.7),
        pytest.param(256, 0.0, marks=slow),
        pytest.param(1024, 0.0, marks=slow),
        pytest.param(1024, 0.7, marks=slow),
    ],
)
def test_images_are_pytorchs(tmp_path, w_mean, size, ratio):
    generator, file = small_generator(size, ratio=ratio), tmp_path / "g.onnx"
    found = save_onnx(file, generator, w_mean, Form(), {})
    assert found.largest < 1e-3
    z = torch.randn(2, 16)
    for batch in (z[:1], z):
        expected = generator(
            [batch], truncation=0.6, truncation_latent=w_mean, randomize_noise=False
        )
        torch.testing.assert_close(run(file, z=batch, psi=psi(0.6)), expected, rtol=1e-4, atol=1e-3)


def test_a_w_for_each_layer_and_noise_as_input(tmp_path, generator, w_mean):
    form = Form(input="w_plus", noise="input")
    save_onnx(tmp_path / "g.onnx", generator, w_mean, form, {})
    w_plus = torch.randn(3, generator.n_latent, 16)
    noise = generator.make_noise(3)
    maps = {f"noise_{i}": map_ for i, map_ in enumerate(noise)}
    found = run(tmp_path / "g.onnx", w_plus=w_plus, psi=psi(1.0), **maps)
    expected = generator([w_plus], input_is_latent=True, noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mapping_network_alone(tmp_path, generator, w_mean):
    save_onnx(tmp_path / "w.onnx", generator, w_mean, Form(output="w"), {})
    z = torch.randn(5, 16)
    torch.testing.assert_close(run(tmp_path / "w.onnx", z=z), generator.mapping(z))


def test_half_halves_the_file_and_stays_near(tmp_path, w_mean):
    generator = small_generator(8, divisor=4)
    for half in (False, True):
        found = save_onnx(tmp_path / f"{half}.onnx", generator, w_mean, Form(half=half), {})
    assert found.psnr > 45
    full, half = ((tmp_path / f"{name}.onnx").stat().st_size for name in (False, True))
    assert half < 0.6 * full
    half_model = session(tmp_path / "True.onnx")
    assert {i.type for i in (*half_model.get_inputs(), *half_model.get_outputs())} == {
        "tensor(float)"
    }


def test_standard_operators_whatever_the_variable_says(monkeypatch, generator, w_mean):
    monkeypatch.setenv(VARIABLE, "native")
    model = export.to_onnx(generator, w_mean, Form())
    assert os.environ[VARIABLE] == "native"
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    # Nor does it tell of the machine that exported.
    content = model.SerializeToString()
    assert b"layers.py" not in content
    assert os.path.dirname(os.path.dirname(__file__)).encode() not in content


def test_a_file_that_disagrees_is_not_left(tmp_path, monkeypatch, generator, w_mean):
    plain = export.to_onnx

    def wrong(*arguments):
        model = plain(*arguments)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.5)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return model

    monkeypatch.setattr(export, "to_onnx", wrong)
    (tmp_path / "g.onnx").write_text("before")
    with pytest.raises(ValueError, match=r"g\.onnx: not written.*differs"):
        save_onnx(tmp_path / "g.onnx", generator, w_mean, Form(output="w"), {})
    assert [p.name for p in tmp_path.iterdir()] == ["g.onnx"]
    assert (tmp_path / "g.onnx").read_text() == "before"


def test_the_bundled_model_says_what_it_is(tmp_path, capsys):
    assert export_onnx.main(["--ckpt", str(bundled.COMPRESSED), "--out", str(tmp_path)]) == 0
    assert "4,468,416 MACs" in capsys.readouterr().out
    model = onnx.load(tmp_path / "toon_faces_64px_compressed.onnx")
    about = {entry.key: entry.value for entry in model.metadata_props}
    generator = checkpoint.load_generator(bundled.COMPRESSED)
    assert about["macs"] == str(macs(generator))
    assert about["parameters"] == str(parameters(generator))
    assert about["size"] == "64"
    assert about["source"] == bundled.COMPRESSED.name
    assert about["licence"].startswith("CC BY 4.0")


def test_costs_are_those_of_what_the_file_holds(generator):
    whole, synthesis, mapping = (
        describe(generator, form, "", "")
        for form in (Form(), Form(input="w_plus"), Form(output="w"))
    )
    for name in ("macs", "parameters"):
        assert int(whole[name]) == int(synthesis[name]) + int(mapping[name])


@pytest.fixture
def models(tmp_path, generator):
    for name in ("a.pt", "a.pkl", "b.pt", "sub/a.pt"):
        checkpoint.save(tmp_path / name, {"g_ema": generator})
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ckpt none.pt", "--ckpt none.pt: no such file"),
        ("--ckpt a.pt b.pt --out new.onnx", "--out new.onnx: name a folder"),
        ("--ckpt a.pt a.pkl", "a.onnx: two checkpoints have the same name"),
        ("--ckpt a.pt sub/a.pt --out new", "--out new: two checkpoints have the same name"),
        ("--ckpt a.pt --out a.pt/x", "--out a.pt/x/a.onnx: "),
        ("--ckpt a.pt --output w --input w_plus", "--output w: "),
        ("--ckpt a.pt --output w --half", "--output w: "),
    ],
)
def test_bad_flags(models, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(models)
    assert export_onnx.main(flags.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(models.rglob("*.onnx"))


def test_missing_packages_are_named(models, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if "onnx" in name else found(name))
    assert export_onnx.main(["--ckpt", str(models / "a.pt")]) == 2
    error = capsys.readouterr().err
    assert "onnx, onnxscript, onnxruntime" in error
    assert "requirements-export.txt" in error
    assert error.count("\n") == 1


def test_runtimes_are_held_against_pytorch(monkeypatch, capsys):
    def missing(network):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(runtimes, "compiled", missing)
    # In one process with it, later tests crash.
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(runtimes.MODELS, "pruned", lambda: small_generator(8))
    settings = runtimes.RuntimeSettings(only=("pruned",), batches=(1, 3), rounds=5)
    rows = list(runtimes.compare("pruned", settings))
    assert {row["batch"] for row in rows} == {1, 3}
    assert {"ours", "PyTorch alone", "ONNX Runtime"} <= {row["runtime"] for row in rows}
    for row in rows:
        assert row["cpu"]["median"] > 0
        assert row["largest"] < (0.5 if "bf16" in row["runtime"] else 1e-3)
    assert "left out: torch.compile (no compiler)" in capsys.readouterr().err.splitlines()


def test_a_runtime_of_other_images_is_no_result():
    def plain(w_plus):
        return np.zeros((1, 3, 8, 8), np.float32)

    w_plus = torch.zeros(1, 4, 16)
    for wrong in (0.01, np.nan):
        found = {"PyTorch alone": plain, "X": lambda w_plus, wrong=wrong: plain(w_plus) + wrong}
        with pytest.raises(ValueError, match="X: differs from PyTorch's images"):
            runtimes.differences(found, w_plus)
