"""Batches are bounded by pixels, and no figure depends on the bound."""

import numpy as np
import pytest
import torch
from PIL import Image

from Compression.content import ContentParser
from Compression.parsers import Parser
from Dataset.images import Images
from Evaluation import projecting, sampling
from Evaluation.feature_sets import image_features, sampled_features
from Evaluation.features import Extractor
from Evaluation.ppl import path_length
from Evaluation.projection import Projection
from Model import checkpoint
from Model.generator import Generator
from Util import memory

SIDE = 16


@pytest.fixture
def generator():
    network = Generator(SIDE, 8, 2, (6, 5, 4, 4, 4, 4)).requires_grad_(False).eval()
    for layer in network.styled_convs:
        layer.noise.weight.fill_(0.5)
    return network


@pytest.fixture
def batches(monkeypatch):
    """How many images the generators make at once, in turn."""
    seen = []
    forward = Generator.forward

    def counted(self, styles, **how):
        seen.append(len(styles[0]))
        return forward(self, styles, **how)

    monkeypatch.setattr(Generator, "forward", counted)
    return seen


def bound(monkeypatch, images, name="INFERENCE", side=SIDE):
    monkeypatch.setattr(memory, name, images * side**2)


def test_images_at_once():
    assert memory.at_once(256, memory.INFERENCE, 64) == 64
    assert memory.at_once(256, memory.INFERENCE) == 64
    assert memory.at_once(1024, memory.INFERENCE, 64) == 4
    assert memory.at_once(64, memory.INFERENCE, 50) == 50
    assert memory.at_once(4096, memory.SCORING, 8) == 1


def features(generator):
    extractor = Extractor(lambda images: images.flatten(1)[:, :5], "", "")
    return sampled_features(generator, extractor, 7, 64, 0)


def pairs(generator):
    return path_length(generator, lambda a, b: (a - b).abs().mean((1, 2, 3)), "paper", 7, 50, 0.1)


def pictures(generator):
    z = sampling.draw_z(generator, range(7), 0)
    return sampling.render(generator, sampling.from_z(generator, z))


@pytest.mark.parametrize(("figure", "each"), [(features, 1), (pairs, 2), (pictures, 1)])
def test_figures_do_not_depend_on_the_bound(generator, batches, monkeypatch, figure, each):
    free = figure(generator)
    assert batches == [7 * each]
    batches.clear()
    bound(monkeypatch, 4)
    np.testing.assert_allclose(figure(generator), free, rtol=1e-3, atol=1e-5)
    assert sum(batches) == 7 * each
    assert max(batches) == 4


def test_images_of_a_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    seen = []

    def network(images):
        seen.append(len(images))
        return images.flatten(1)[:, :5]

    how = (Images(tmp_path, SIDE), Extractor(network, "", ""), 64, 0, torch.device("cpu"))
    free = image_features(*how)
    bound(monkeypatch, 3)
    np.testing.assert_array_equal(image_features(*how), free)
    assert seen == [7, 3, 3, 1]


def test_pictures_that_are_projected_at_once(generator, tmp_path, monkeypatch):
    seen = []

    def project(generator, images, perceptual, **search):
        n = len(images)
        seen.append(n)
        noise = [maps.expand(n, -1, -1, -1) for maps in generator.fixed_noise]
        nothing = torch.zeros(n)
        w_plus = torch.zeros(n, generator.n_latent, generator.style_dim)
        return Projection(w_plus, noise, nothing, nothing.long())

    monkeypatch.setattr(projecting, "project", project)
    checkpoint.save(tmp_path / "g.pt", {"g_ema": generator})
    settings = projecting.ProjectionSettings(
        ckpt=tmp_path / "g.pt", n_sample=5, out=tmp_path / "out", perceptual="parser",
        parser_ckpt=projecting.bundled.PARSER, device="cpu",
    )  # fmt: skip
    bound(monkeypatch, 2, "GRADIENTS")
    projecting.project_pictures(settings, lambda *how: ContentParser(Halves()))
    assert seen == [2, 2, 1]


class Halves(Parser):
    """The left half of a picture is content."""

    class_names = ("right", "left")
    classes_excluded = (0,)
    input_size = SIDE

    def __init__(self):
        self.seen = []

    def classify(self, images):
        self.seen.append(len(images))
        left = (torch.arange(images.shape[-1]) < images.shape[-1] // 2).long()
        return left.expand(len(images), *images.shape[2:])


def test_pictures_that_are_parsed_at_once(monkeypatch):
    monkeypatch.setitem(memory.PARSING, "cpu", 3 * SIDE**2)
    parser = Halves()
    masks = ContentParser(parser)(torch.zeros(7, 3, SIDE, SIDE))
    assert parser.seen == [3, 3, 1]
    assert masks.mean() == 0.5
