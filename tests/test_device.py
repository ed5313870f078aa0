"""Devices and their precision: no script computes in TensorFloat-32 unless it is told to."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from Dataset.pictures import Resizing
from Evaluation import feature_statistics
from Evaluation.feature_sets import read_statistics
from Evaluation.features import make_extractor
from Evaluation.ppl import PathSettings
from Evaluation.settings import Result
from Model import bundled
from Util import device
from Util.device import pick_device, set_tf32, tf32_allowed

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "prune": "--device cpu --out new.pt",
    "train": "--device cpu --path . --out new",
    "train_parser": "--device cpu --path . --out new.pt",
    "get_fid": "--device cpu",
    "get_ppl": "--device cpu",
    "get_projected_image": "--device cpu",
    "get_generated_image": "--device cpu",
    "get_edited_image": "--device cpu",
    "export_onnx": "",
    "Compression.content_picture": "--device cpu",
    "web.build": "",
    "benchmarks.jobs": "",
    "benchmarks.operators": "--device cpu",
}
ALWAYS_FLOAT32 = {"export_onnx", "web.build", "benchmarks.jobs", "benchmarks.operators"}


class PickedError(BaseException):
    """The device has been picked; not to be caught by a script."""


@pytest.fixture(autouse=True)
def _switches():
    yield
    set_tf32(False)


@pytest.fixture
def after_picking(monkeypatch, tmp_path):
    """Run a script until it has its device; returns the `switches` then."""

    def picked():
        raise PickedError

    def run(script, *more):
        monkeypatch.setattr(device, "_keep_freed_memory", picked)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(PickedError):
            importlib.import_module(script).main([*SCRIPTS[script].split(), *more])
        return switches()

    return run


def switches():
    """How products of float32 are computed on a GPU: matrix products, convolutions."""
    backends = torch.backends
    return [kind.fp32_precision == "tf32" for kind in (backends.cuda.matmul, backends.cudnn.conv)]


def test_all_scripts_are_here():
    made = {file.stem for file in ROOT.glob("*.py") if "\ndef main(" in file.read_text()}
    assert made - {"demo"} <= set(SCRIPTS)  # the demo prunes and trains by the library


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_compute_in_float32_unless_told_otherwise(after_picking, script):
    set_tf32(True)
    assert after_picking(script) == [False, False]
    if script not in ALWAYS_FLOAT32:
        assert after_picking(script, "--tf32") == [True, True]


def test_nothing_else_chooses_a_gpu():
    """A device of another origin would come without its precision."""
    own = {"Util/device.py", "Util/distributed.py"}
    for folder in ("Compression", "Evaluation", "Dataset", "Model", "Util", "benchmarks", "web"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.relative_to(ROOT).as_posix() not in own:
                assert not re.search(
                    r"torch\.device\(.cuda|\.cuda\(\)|\.to\(.cuda", file.read_text()
                )


@pytest.mark.parametrize("before", ["backends", "backends.cudnn", "backends.cudnn.conv", "matmul"])
def test_the_switches_are_set_whatever_was_set_before(before):
    if before == "matmul":
        torch.set_float32_matmul_precision("medium")
    else:
        operator = torch
        for name in before.split("."):
            operator = getattr(operator, name)
        operator.fp32_precision = "tf32"
    for on in (False, True, False):
        set_tf32(on)
        assert switches() == [on, on]
        # Other packages ask by the older switches, which raise where the two sets contradict.
        backends = torch.backends
        assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32) == (on, on)
        assert torch.get_float32_matmul_precision() == ("high" if on else "highest")
        assert backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")
        with backends.cudnn.flags(deterministic=True):
            pass


def test_only_a_gpu_has_tf32():
    pick_device("cpu", tf32=True)
    assert not tf32_allowed(torch.device("cpu"))
    assert tf32_allowed(torch.device("cuda"))
    pick_device("cpu")
    assert not tf32_allowed(torch.device("cuda"))


def test_features_in_tf32_are_not_compared_with_those_in_float32(monkeypatch, tmp_path):
    how = ("parser", None, bundled.PARSER, None, torch.device("cpu"))
    plain = make_extractor(*how)
    monkeypatch.setattr("Evaluation.features.tf32_allowed", lambda device: True)
    rounded = make_extractor(*how)
    assert rounded.protocol == f"{plain.protocol}; in TensorFloat-32"
    features = torch.randn(8, 3).numpy()
    made = feature_statistics.statistics_of(features, {"protocol": rounded.protocol})
    feature_statistics.save(tmp_path / "s.npz", made)
    resizing = Resizing(16, "bilinear", None)
    read_statistics(tmp_path / "s.npz", rounded, False, resizing)
    with pytest.raises(ValueError, match=r"was made by: .*; in TensorFloat-32; these settings"):
        read_statistics(tmp_path / "s.npz", plain, False, resizing)


def test_an_evaluation_tells_that_it_rounds(capsys):
    for tf32 in (False, True):
        Result({}, "", ["PPL: 1"], PathSettings(json=True, tf32=tf32)).show()
        out, err = capsys.readouterr()
        assert ("TensorFloat-32" in err) == tf32
        assert json.loads(out)["settings"]["tf32"] == tf32


def test_numbers_that_are_not_finite_are_null_in_json(capsys):
    figures = {"fid": 1.5, "files": ("a",), "models": {"m": {"l1": float("nan")}}}
    figures["pictures"] = [{"psnr": float("inf"), "name": "a"}]
    Result(figures, "", [], PathSettings(json=True)).show()
    line = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    expected = {"fid": 1.5, "files": ["a"], "models": {"m": {"l1": None}}}
    assert line["figures"] == expected | {"pictures": [{"psnr": None, "name": "a"}]}
