import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.plot_log import main as plot_main
from Util.run_log import read_metrics

SMALL = (
    "--size 8 --style_dim 8 --n_mlp 2 --channels 6,5,4,4 --batch_size 4 --workers 0 --device cpu"
)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    return tmp_path


def run(folder, flags, out="run"):
    return train.main([*f"--path {folder}/data --out {folder}/{out} {flags}".split()])


def test_training_from_scratch_writes_a_run(folder):
    assert (
        run(folder, f"{SMALL} --iter 4 --log_freq 2 --val_sample_freq 2 --model_save_freq 2") == 0
    )
    assert [row["iteration"] for row in read_metrics(folder / "run")] == [2, 4]
    written = {str(f.relative_to(folder / "run")) for f in (folder / "run").rglob("*.*")}
    assert written == {
        "config.json", "metrics.jsonl", "samples/000002.png", "samples/000004.png",
        "checkpoints/000002.pt", "checkpoints/000004.pt",
    }  # fmt: skip
    config = json.loads((folder / "run" / "config.json").read_text())["config"]
    assert config["channels"] == [6, 5, 4, 4]
    assert checkpoint.load_generator(folder / "run/checkpoints/000004.pt").channels == (6, 5, 4, 4)
    assert plot_main([str(folder / "run"), "--out", str(folder / "curve.png")]) == 0
    assert Image.open(folder / "curve.png").width > 400


def test_a_resumed_run_ends_like_an_uninterrupted_one(folder):
    assert run(folder, f"{SMALL} --iter 6") == 0
    assert run(folder, f"{SMALL} --iter 3", "part") == 0
    flags = f"--ckpt {folder}/part/checkpoints/000003.pt --load_train_state --iter 6"
    assert run(folder, f"{flags} --batch_size 4 --workers 0 --device cpu", "part") == 0
    whole, parts = (checkpoint.read(folder / p / "checkpoints/000006.pt") for p in ("run", "part"))
    for network in ("g", "g_ema", "d"):
        for key, value in whole[network].items():
            torch.testing.assert_close(parts[network][key], value, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["Output_Only", "Intermediate"])
def test_distillation_with_mask_and_parser_features(folder, mode):
    teacher = Generator(8, 8, 2, channels=(6, 5, 4, 4))
    student = Generator(8, 8, 2, channels=(3, 3, 2, 2))
    parser = BiSeNet(width=4, stem_stride=2, input_size=32)
    d = Discriminator(8, channels=(5, 4))
    checkpoint.save(folder / "teacher.pt", {"g_ema": teacher, "d": d})
    checkpoint.save(folder / "student.pt", {"g": student, "g_ema": student})
    checkpoint.save(folder / "parser.pt", {"parser": parser, "config": parser.config})
    flags = (
        f"--ckpt {folder}/student.pt --teacher_ckpt {folder}/teacher.pt --perceptual parser"
        f" --parser_ckpt {folder}/parser.pt --iter 2 --batch_size 2 --log_freq 1 --kd_mode {mode}"
    )
    assert run(folder, f"{flags} --workers 0 --device cpu") == 0
    last = read_metrics(folder / "run")[-1]
    assert last["kd_l1"] >= 0
    assert last["kd_lpips"] >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size 48", "power of two"),
        ("--batch_size 0", "--batch_size must be positive, not 0"),
        ("--mixing 2", "--mixing"),
        ("--content_aware_KD maybe", "'maybe' is neither True nor False"),
        ("--kd_mode both", "--kd_mode"),
        ("--channels 4,x", "integers separated by commas"),
        ("--size 16 --channels 4,4", "6 positive channel counts"),
        ("--ckpt nowhere.pt", "--ckpt nowhere.pt: no such file"),
        ("--size 8 --teacher_ckpt nowhere.pt", "--teacher_ckpt nowhere.pt: no such file"),
        ("--load_train_state", "--load_train_state goes with --ckpt"),
        ("--device tpu", "--device tpu"),
        ("--path none", "--path none: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, flags, message):
    try:
        code = run(folder, f"--size 8 --iter 1 --workers 0 {flags}")
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (folder / "run").exists()


def test_a_finished_run_is_not_overwritten(folder, capsys):
    assert run(folder, f"{SMALL} --iter 1") == 0
    assert run(folder, f"{SMALL} --iter 1") == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("", True), ("False", False), ("true", True)])
def test_flags_of_type_bool_are_what_they_say(text, value):
    argv = f"--path x --content_aware_KD {text}".split()
    assert train.parse_config(argv).content_aware_KD is value


def test_every_setting_has_a_flag_and_the_papers_defaults_hold():
    config = train.parse_config(["--path", "x"])
    assert config == TrainConfig(path="x")
    assert (config.lr, config.r1, config.path_regularize, config.mixing) == (0.002, 10, 2, 0.9)
    assert (config.kd_l1_lambda, config.kd_lpips_lambda, config.batch_size) == (3, 3, 16)
