"""NICKEL's loss against its equations, written as loops."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from benchmarks.counting import Operators
from Compression import distillation
from Compression.distillation import high_band
from Compression.distillation.high_band import HighBandSettings
from Model.discriminator import Discriminator
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.settings import SettingError


def haar(x):
    """One level: every block of four values, one after another."""
    low = np.zeros((x.shape[0] // 2, x.shape[1] // 2))
    high = np.zeros((3, *low.shape))
    for i, j in np.ndindex(*low.shape):
        a, b, c, d = (
            x[2 * i, 2 * j],
            x[2 * i, 2 * j + 1],
            x[2 * i + 1, 2 * j],
            x[2 * i + 1, 2 * j + 1],
        )
        low[i, j] = (a + b + c + d) / 2
        high[:, i, j] = [(a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]
    return low, high


def test_high_bands_by_their_definition():
    x = torch.randn(2, 3, 16, 16).double()
    bands = high_band.high_bands(x)
    assert [tuple(b.shape) for b in bands] == [(2, 3, 3, s, s) for s in (8, 4, 2, 1)]
    for n, c in np.ndindex(2, 3):
        low = x[n, c].numpy()
        for band in bands:
            low, high = haar(low)
            np.testing.assert_allclose(band[n, c].numpy(), high, atol=1e-12)


def test_the_transform_is_orthonormal_so_only_the_mean_is_lost():
    x = torch.randn(1, 1, 16, 16).double()
    energy = sum(band.square().sum() for band in high_band.high_bands(x))
    lost = (x.sum() / 16).square()
    torch.testing.assert_close(energy + lost, x.square().sum())


def test_distance_is_the_sum_of_the_levels_means_and_ignores_brightness():
    a, b = torch.randn(2, 2, 3, 16, 16).unbind(0)
    pairs = zip(high_band.high_bands(a), high_band.high_bands(b), strict=True)
    expected = sum((x - y).square().mean().item() for x, y in pairs)
    assert high_band.distance(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert high_band.distance(a + 3, a).item() == pytest.approx(0, abs=1e-10)


def test_half_precision_leaves_the_transform_alone():
    a = torch.randn(1, 2, 16, 16).mul(0.01).add(3)
    b = torch.randn(1, 2, 16, 16).mul(0.01).add(3)
    expected = high_band.distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(high_band.distance(a, b), expected, rtol=0, atol=0)


def test_the_host_waits_for_nothing():
    a, b = torch.randn(2, 2, 3, 16, 16).unbind(0)
    with Operators() as operators:
        high_band.distance(a, b)
    assert operators.waits == 0


def test_features_are_the_discriminators_own():
    network, x = Discriminator(32, channels=(7, 6, 5, 4)), torch.randn(2, 3, 32, 32)
    for side, width, blocks in ((32, 4, 1), (16, 5, 2)):
        found = high_band.features_at(network, x, side)
        assert found.shape == (2, width, side, side)
        expected = x
        for block in list(network.convs)[:blocks]:
            expected = block(expected)
        torch.testing.assert_close(found, expected)


def make(teacher, discriminator, side=16):
    config = TrainConfig(
        teacher_ckpt="x",
        kd=("high_band=10",),
        kd_l1_lambda=0,
        kd_lpips_lambda=0,
        options=(HighBandSettings(high_band_side=side),),
    )
    sources = distillation.Sources(config, teacher, torch.device("cpu"), discriminator)
    return distillation.make_terms(sources)


def test_gradient_reaches_the_discriminator_alone():
    torch.manual_seed(1)
    teacher = Generator(16, 8, 2, (6, 6, 6, 6, 5, 5)).requires_grad_(False)
    network = Discriminator(16, channels=(6, 6, 5)).double()
    (term,) = make(teacher, network)
    assert term.parts.call is None
    teacher.double()
    w_plus = teacher.w_plus([torch.randn(2, 8).double()])
    target = distillation.Pass(teacher, w_plus, teacher.fixed_noise, True, nullcontext)
    loss = term.parts.critic(network, target)
    expected = high_band.distance(network.convs[0](target.made.image), target.made.features[4])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    weight = network.convs[0][0].weight
    before, values = weight[0, 1, 0, 0].item(), []
    for step in (1e-3, -1e-3):
        weight.data[0, 1, 0, 0] = before + step
        values.append(term.parts.critic(network, target).item())
    assert weight.grad[0, 1, 0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-2)
    assert network.final_linear[1].weight.grad is None


@pytest.mark.parametrize(
    ("size", "side", "width", "message"),
    [
        (8, 64, 5, "compares features of 64 px, but the networks make 8 px"),
        (16, 16, 4, "at 16 px the teacher has 5 and the discriminator 4"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(size, side, width, message):
    n = {8: 4, 16: 6}[size]
    teacher = Generator(size, 8, 2, [5] * n)
    with pytest.raises(SettingError, match=message):
        make(teacher, Discriminator(size, channels=[width] * (n // 2)), side)
