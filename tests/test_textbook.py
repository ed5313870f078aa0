"""The benchmarks' baseline computes what the original and this project do."""

import pytest
import torch

from benchmarks import textbook
from Compression.content import ContentParser
from Compression.scores import weight_gradient_score
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator
from Model.ops import make_kernel, upfirdn2d
from tests.golden_fill import assert_golden


def test_images_equal_the_original(golden):
    generator, arrays = golden
    theirs = textbook.textbook_generator(generator)
    made = theirs.synthesis(theirs.w_plus([torch.as_tensor(arrays["z1"])]), "fixed")
    assert_golden(made.image, arrays, "image")
    assert_golden(made.rgbs[0], arrays, "rgb_0")


def test_logits_equal_ours():
    discriminator = Discriminator(32, channels=(6, 5, 4, 3)).requires_grad_(False)
    images = torch.randn(4, 3, 32, 32)
    logits = textbook.TextbookDiscriminator(discriminator)(images)
    torch.testing.assert_close(logits, discriminator(images))
    assert logits.std() > 1e-3


@pytest.mark.parametrize(("up", "down", "pad"), [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1))])
def test_resampling_equals_ours(up, down, pad):
    x, kernel = torch.randn(2, 3, 7, 6), make_kernel([1, 3, 3, 2], gain=2)
    theirs = textbook.upfirdn2d(x, kernel, up, down, pad)
    torch.testing.assert_close(theirs, upfirdn2d(x, kernel, up, down, pad))


@pytest.fixture
def parser():
    network = BiSeNet(n_classes=4, width=8, stem_stride=1, input_size=64).requires_grad_(False)
    return ContentParser(network, classes_excluded=(0, 2))


def test_masks_equal_ours(parser):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    masks = textbook.content_masks(parser, images)
    torch.testing.assert_close(masks, parser(images), rtol=0, atol=0)
    assert 0 < masks.mean() < 1


def test_scores_equal_ours(parser, monkeypatch):
    generator = Generator(32, 8, 2, (6,) * 8)
    z = torch.randn(3, 8)
    images = generator([z])
    masks = parser(images)
    noisy = textbook.salt_and_pepper(images, masks, prob=0.5, seed=0)
    changed = (noisy != images).any(dim=1, keepdim=True)
    assert not (changed & (masks < 0.5)).any()
    assert changed.sum() == pytest.approx(0.5 * masks.sum().item(), rel=0.2)
    expected = weight_gradient_score(generator, images, noisy.detach())
    scores = textbook.content_aware_scores(textbook.textbook_generator(generator), parser, z, 0.5)
    for ours, theirs in zip(expected, scores, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5 * ours.max().item())
