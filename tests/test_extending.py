"""A published idea is one file and one line in a table: flags, help, log and plots follow."""

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import prune
import train
from Compression.distillation import TERMS, TermKind
from Compression.initialisation import INITIALISATIONS, Initialisation
from Compression.scores import SCORES, Score
from Evaluation.metrics import METRICS, Metric
from Model import bundled, checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from Util.plot_log import panels_of
from Util.run_log import BEST, read_config, read_metrics
from Util.settings import Settings, setting

FACES = os.path.relpath(bundled.PARSER)  # the repository's path may have spaces


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    networks = {"g_ema": Generator(8, 8, 2, (6, 6, 6, 6)), "d": Discriminator(8, channels=(4, 4))}
    checkpoint.save(tmp_path / "full.pt", networks)
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):  # enough for the covariance of 112 features
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{i}.png")
    return tmp_path


@dataclass(frozen=True, kw_only=True)
class ToyScoreSettings(Settings):
    toy_first: int = setting(0, "first channel that counts", low=0)


def toy_score(generator, sampling):
    first = sampling.options.toy_first
    return [torch.arange(width).float().roll(first) for width in generator.channels]


@dataclass(frozen=True, kw_only=True)
class ToyTermSettings(Settings):
    toy_power: float = setting(2.0, "of the difference", above=0)


def make_toy_term(sources):
    power = sources.options.toy_power

    def toy(student, teacher, mask):
        return (student.made.image - teacher.made.image.detach()).abs().pow(power).mean()

    return toy


def test_a_score_from_the_command_line(folder, monkeypatch, capsys):
    monkeypatch.setitem(SCORES, "toy", Score(toy_score, "a toy", options=ToyScoreSettings))
    flags = f"--ckpt {folder}/full.pt --metric toy --remove_ratio 0.5 --device cpu"
    assert prune.main([*flags.split(), "--toy_first", "1", "--out", f"{folder}/p.pt"]) == 0
    pruned = checkpoint.load_generator(folder / "p.pt")
    full = checkpoint.load_generator(folder / "full.pt")
    # Scores 5 0 1 2 3 4: channels 0, 4 and 5 stay.
    torch.testing.assert_close(pruned.input.input, full.input.input[:, [0, 4, 5]])
    config = checkpoint.read(folder / "p.pt")["config"]
    assert (config["metric"], config["toy_first"]) == ("toy", 1)
    with pytest.raises(SystemExit):
        prune.main(["--help"])
    text = capsys.readouterr().out
    assert "first channel that counts" in text
    assert "a toy" in text


def test_an_initialisation_from_the_command_line(folder, monkeypatch):
    def zeros(pruned, full, keep, sampling):
        pruned.input.input.data.zero_()

    monkeypatch.setitem(INITIALISATIONS, "zeros", Initialisation(zeros, "zeros"))
    flags = f"--ckpt {folder}/full.pt --metric random --init zeros --device cpu"
    assert prune.main([*flags.split(), "--out", f"{folder}/p.pt"]) == 0
    assert not checkpoint.load_generator(folder / "p.pt").input.input.any()


def trained(folder, flags):
    common = (
        f"--path {folder}/data --ckpt {folder}/full.pt --out {folder}/run --iter 4 --batch_size 4"
        " --workers 0 --device cpu --log_freq 2 --model_save_freq 2"
    )
    return train.main([*common.split(), *flags.split()])


def test_a_term_from_the_command_line(folder, monkeypatch):
    monkeypatch.setitem(TERMS, "toy", TermKind(make_toy_term, "a toy", options=ToyTermSettings))
    flags = (
        f"--teacher_ckpt {folder}/full.pt --content_aware_KD False --kd_lpips_lambda 0"
        " --kd toy=0.5 --toy_power 3"
    )
    assert trained(folder, flags) == 0
    rows = read_metrics(folder / "run")
    assert all(row["kd_toy"] >= 0 for row in rows)
    assert read_config(folder / "run")["toy_power"] == 3
    panels = panels_of(rows)
    assert ("distance to the teacher", ["kd_l1", "kd_toy"]) in panels
    assert "gradient norms" in dict(panels)
    assert "measured on samples" not in dict(panels)
    # A resumed run keeps the term and its settings.
    assert train.main(["--resume", str(folder / "run"), "--iter", "6"]) == 0
    assert json.loads((folder / "run/config.json").read_text())["config"]["toy_power"] == 3
    assert "kd_toy" in read_metrics(folder / "run")[-1]


def test_a_metric_during_training(folder, monkeypatch):
    def toy_metric(generated, real, name, seed):
        return {name: float(generated.mean())}

    monkeypatch.setitem(METRICS, "toy", Metric(toy_metric, "a toy", ("toy", "toy")))
    flags = f"--fid_n_sample 150 --fid_features parser --parser_ckpt {FACES} --fid_metrics toy,fid"
    assert trained(folder, flags) == 0
    rows = read_metrics(folder / "run")
    name = "toy_parser_distance"
    measured = {row["iteration"]: row[name] for row in rows if name in row}
    assert set(measured) == {2, 4}
    assert "frechet_parser_distance" in rows[-1]
    best = checkpoint.read(folder / "run" / BEST)["train_state"]["iteration"]
    assert best == min(measured, key=measured.get)
