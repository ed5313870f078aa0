import json

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from Evaluation.comparison import content_l1
from Model.checkpoint import load_generator
from Model.complexity import macs
from Model.generator import Generator
from Util.pictures import grid, side_by_side


def test_the_main_job_runs_on_the_bundled_model(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--n", "20", "--iter", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("This renders 20 pictures of toon faces (")
    assert "44,162,048" in printed  # MACs of the teacher
    assert "L1 to teacher inside the content" in (tmp_path / "table.txt").read_text()
    compressed = load_generator(tmp_path / "run/checkpoints/000002.pt")
    uniform = [width - int(0.7 * width) for width in load_generator(demo.TEACHER).channels]
    assert compressed.channels[0] > uniform[0] == 20
    assert macs(compressed) <= macs(Generator(64, 128, 4, channels=uniform)) == 4_468_416
    for name in ("comparison.png", "training_curve.png"):
        assert Image.open(tmp_path / name).width > 400


def test_a_folder_that_is_no_run_stays(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("x")
    assert demo.main(["--out", str(tmp_path), "--n", "20", "--iter", "2"]) == 2
    assert "run is no run of the demo; name another folder" in capsys.readouterr().err
    assert (tmp_path / "run/thesis.txt").read_text() == "x"


def test_another_training_stays(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    settings = {"config": {"ckpt": f"{tmp_path}/pruned.pt", "path": "faces"}}
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    assert demo.main(["--out", str(tmp_path), "--n", "20", "--iter", "2"]) == 2
    assert "run is no run of the demo; name another folder" in capsys.readouterr().err
    assert (tmp_path / "run/config.json").exists()


def test_content_l1_is_the_mean_inside_the_mask():
    student, teacher = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    teacher[..., :2] = 0.5
    mask = torch.zeros(1, 1, 4, 4)
    assert content_l1(student, teacher, mask) == 0
    mask[..., :2] = 1
    assert content_l1(student, teacher, mask) == pytest.approx(0.5)
    assert content_l1(student, teacher, torch.ones(1, 1, 4, 4)) == pytest.approx(0.75)


def test_a_grid_shows_every_image_in_order():
    images = torch.stack([torch.full((3, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    pixels = grid(images, columns=2, gap=1)
    assert pixels.shape == (5, 5, 3)
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 255, 128, 128])
    assert (pixels[3:, :2] == 255).all()


def test_rows_of_networks_and_masks_share_a_picture():
    rows = {"a": torch.zeros(3, 3, 4, 4), "mask": torch.ones(3, 1, 4, 4)}
    picture = side_by_side(rows, scale=2, margin=50)
    assert picture.shape == (2 * 8 + 4, 50 + 2 * 14, 3)
    assert (picture[-1, 50:] == 255).all()
