"""A checkpoint without its optimisers."""

import pytest
import torch

from Model import checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from Model.slim import main


@pytest.fixture
def run(tmp_path):
    """Folder of a training run with two checkpoints; the newer one's network is smaller."""
    for name, width in ("000001", 8), ("000002", 4):
        generator = Generator(8, style_dim=8, n_mlp=1, channels=[width] * 4)
        discriminator = Discriminator(8, channels=[4, 4])
        optimizer = torch.optim.Adam([*generator.parameters(), *discriminator.parameters()])
        sum(p.sum() for p in generator.parameters()).backward()
        optimizer.step()
        content = {"g": generator, "g_ema": generator, "d": discriminator}
        content |= {"g_optim": optimizer.state_dict(), "train_state": {"iteration": int(name)}}
        content["config"] = {"recipe": "cagc"}
        checkpoint.save(tmp_path / f"run/checkpoints/{name}.pt", content)
    return tmp_path / "run"


def test_networks_and_their_making_stay(run, tmp_path, capsys):
    target = tmp_path / "out/student.pt"
    assert main([str(run), str(target)]) == 0
    newest = run / "checkpoints/000002.pt"
    whole, left = checkpoint.read(newest), checkpoint.read(target)
    assert set(left) == {"g", "g_ema", "d", "config"}
    assert left.pop("config") == whole["config"]
    torch.testing.assert_close(left, {key: whole[key] for key in left}, rtol=0, atol=0)
    out = capsys.readouterr().out
    assert "g: generator, 8 px, latents of 8, 1 mapping layers, channels 4, 4, 4, 4" in out
    assert f"saved {target}" in out
    assert str(newest) in out


def test_the_moving_average_alone(run, tmp_path):
    target = tmp_path / "student.pt"
    assert main([str(run / "checkpoints/000001.pt"), str(target), "--keep", "g_ema"]) == 0
    assert set(checkpoint.read(target)) == {"g_ema", "config"}
    assert checkpoint.load_generator(target).channels == (8,) * 4


@pytest.mark.parametrize(
    ("source", "target", "flags", "message"),
    [
        ("none.pt", "out.pt", (), "none.pt: no such file"),
        ("run", "run/checkpoints/000002.pt", (), "000002.pt: cannot be the result"),
        ("run", "run", (), "run: cannot be the result"),
        ("judge.pt", "out.pt", ("--keep", "g,g_ema"), "judge.pt: no network g, g_ema in it"),
        ("broken.pt", "out.pt", (), "broken.pt: g"),
        ("run", "out.pt", ("--keep", "h"), "--keep h: unknown"),
        ("run", "out.pt", ("--keep", ""), "--keep names no network"),
    ],
)
def test_it_refuses_in_one_line(run, tmp_path, capsys, source, target, flags, message):
    checkpoint.save(tmp_path / "judge.pt", {"d": Discriminator(8, channels=[4, 4])})
    checkpoint.save(tmp_path / "broken.pt", {"g": {"input.input": torch.zeros(1, 4, 4, 4)}})
    before = (run / "checkpoints/000002.pt").read_bytes()
    assert main([str(tmp_path / source), str(tmp_path / target), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out.pt").exists()
    assert (run / "checkpoints/000002.pt").read_bytes() == before
