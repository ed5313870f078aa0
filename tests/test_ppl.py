import json
import os

import numpy as np
import pytest
import torch

import get_ppl
from Evaluation import ppl
from Evaluation.ppl import PathPairs, PathSettings, pair_distances, perceptual_path_length
from Model import bundled, checkpoint
from Model.generator import Generator
from Util.settings import SettingError

FACES = os.path.relpath(bundled.PARSER)  # the repository's path may have spaces


@pytest.fixture
def generator():
    network = Generator(8, 8, 2, (6, 5, 4, 4)).requires_grad_(False)
    for layer in network.styled_convs:
        layer.noise.weight.fill_(0.5)
    return network


def test_trimming_and_both_protocols_by_hand():
    distances = np.arange(201) * 1e-6  # 1st and 99th percentile: 2 and 198
    distances[[0, 200]] = 0, 1e9
    assert perceptual_path_length(distances, 1e-4, "paper") == pytest.approx(100e-6)
    assert perceptual_path_length(distances, 1e-4, "standard") == pytest.approx(100e-6 / 1e-8)


def test_of_a_linear_generator_by_hand(generator, monkeypatch):
    # Images that are w itself: the squared distance of a pair is (eps * |w1 - w0|) ** 2.
    monkeypatch.setattr(Generator, "forward", lambda self, w, **_: w[0])
    seen = {}
    monkeypatch.setattr(Generator, "mapping", lambda self, z: seen.setdefault(len(seen), 3 * z))
    a, b = PathPairs(generator, 1e-2, seed=5, shared_noise=True).images([0, 1, 2])
    torch.testing.assert_close(b - a, 1e-2 * (seen[1] - seen[0]), rtol=1e-3, atol=1e-6)
    t = (a - seen[0]) / (seen[1] - seen[0])
    assert t.std(dim=1).max() < 1e-4  # on the line, within it, elsewhere for every pair
    assert 0 <= t.min() < t.max() <= 1
    assert t.mean(dim=1).unique().numel() == 3


def test_path_ends_lie_at_w_itself(generator, monkeypatch):
    monkeypatch.setattr(Generator, "forward", lambda self, w, **_: w[0])
    seen = {}
    monkeypatch.setattr(Generator, "mapping", lambda self, z: seen.setdefault(len(seen), 3 * z))
    a, b = PathPairs(generator, 1e-2, seed=5, shared_noise=True, full=False).images([0, 1, 2])
    torch.testing.assert_close(a, seen[0])
    torch.testing.assert_close(b, seen[0] + 1e-2 * (seen[1] - seen[0]))


def test_the_protocols_that_are_named_are_measured(tmp_path, generator, capsys):
    checkpoint.save(tmp_path / "g.pt", {"g_ema": generator})
    flags = f"--ckpt {tmp_path}/g.pt --perceptual parser --parser_ckpt {FACES} --json"
    more = "--device cpu --n_sample 7 --protocols ends,standard"
    assert get_ppl.main(f"{flags} {more}".split()) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line["figures"]) == ["ends", "standard"]
    assert line["figures"]["ends"] != line["figures"]["standard"]
    assert get_ppl.main(f"{flags} --protocols z".split()) == 2
    assert "--protocols" in capsys.readouterr().err


def test_only_the_standard_protocol_shares_the_noise(generator):
    for shared, agree in ((True, True), (False, False)):
        a, b = PathPairs(generator, 1e-7, seed=0, shared_noise=shared).images([0, 1])
        assert torch.allclose(a, b, atol=1e-4) is agree


def test_a_pair_does_not_depend_on_its_batch(generator):
    pairs = PathPairs(generator, 0.1, seed=0, shared_noise=False)

    def distance(a, b):
        return (a - b).square().mean(dim=(1, 2, 3))

    whole, parts = (pair_distances(pairs, distance, b) for b in ([range(5)], [[0], [1, 2], [3, 4]]))
    torch.testing.assert_close(torch.cat(whole), torch.cat(parts))


def test_the_script_measures_exactly_n_sample_pairs(tmp_path, generator, capsys, monkeypatch):
    checkpoint.save(tmp_path / "g.pt", {"g_ema": generator})
    counts = []
    trim = ppl.perceptual_path_length
    monkeypatch.setattr(
        ppl, "perceptual_path_length", lambda d, *args: counts.append(len(d)) or trim(d, *args)
    )
    flags = f"--ckpt {tmp_path}/g.pt --perceptual parser --parser_ckpt {FACES} --device cpu"
    figures = []
    for size in (3, 50):
        assert get_ppl.main(f"{flags} --n_sample 7 --batch_size {size} --json".split()) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        figures.append(line["figures"])
    assert counts == [7] * 4
    assert line["protocol"]["distance"] == "parser distance"
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)
    assert figures[0]["paper"] > 0


def test_rounded_products_are_refused(monkeypatch):
    monkeypatch.setattr(ppl, "tf32_allowed", lambda device: True)
    with pytest.raises(SettingError, match="tf32 rounds by more than"):
        ppl.measure(PathSettings())
