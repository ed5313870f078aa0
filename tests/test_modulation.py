"""All layers' styles, demodulations and RGB weights at once equal those of each layer."""

import copy

import pytest
import torch

from Model.generator import Generator
from Model.modulation import _Demodulation, modulate


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Generator(16, style_dim=8, n_mlp=2, channels=(6, 5, 4, 7, 3, 2)).double()


def layer_by_layer(generator, w_plus):
    """What every convolution and every RGB computes from its own w."""
    convs, rgbs = generator._modulated
    factors = [conv.factors(w_plus[:, i]) for i, conv in enumerate(convs)]
    styles = [rgb.style(w_plus[:, 2 * k + 1]) for k, rgb in enumerate(rgbs)]
    weights = [rgb.weight.view(3, -1) * s[:, None] for rgb, s in zip(rgbs, styles, strict=True)]
    return [*(t for three in factors for t in three), *weights]


def at_once(generator, w_plus):
    """The same in one go."""
    found = modulate(w_plus, *generator._modulated, generator.latents, generator.fan_ins)
    return [*(t for three in found[0] for t in three), *found[1]]


def test_equal_to_each_layer_with_first_and_second_derivatives(generator):
    w_plus = torch.randn(2, generator.n_latent, 8, dtype=torch.float64, requires_grad=True)
    parameters = [p for name, p in generator.named_parameters() if ".conv." in name]
    results = []
    for compute in (layer_by_layer, at_once):
        values = compute(generator, w_plus)
        loss = sum((v.cos() * (i + 1)).sum() for i, v in enumerate(values))
        (grad,) = torch.autograd.grad(loss, w_plus, create_graph=True)
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(grad.square().sum(), [w_plus, *parameters])
        results.append([*values, grad, *first, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_demodulation_against_differences():
    torch.manual_seed(0)
    shapes = [(1, 4, 3, 3, 3), (1, 2, 4, 3, 3)]
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    styles = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Demodulation.apply, (styles, *weights))
    assert torch.autograd.gradgradcheck(_Demodulation.apply, (styles, *weights))


def test_bfloat16_leaves_them_in_float32(generator):
    generator.float()
    w_plus = torch.randn(2, generator.n_latent, 8)
    expected = at_once(generator, w_plus)
    with torch.autocast("cpu", torch.bfloat16):
        found = at_once(generator, w_plus)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_frozen_network_computes_the_same_and_sees_changes(generator):
    w_plus = torch.randn(2, generator.n_latent, 8, dtype=torch.float64)
    frozen = copy.deepcopy(generator).freeze()
    assert copy.deepcopy(frozen)._frozen is None
    for _ in range(2):
        with torch.no_grad():
            factors, rows = frozen._modulation(w_plus)
            expected = at_once(generator, w_plus)
        found = [*(t for three in factors for t in three), *rows]
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one)
        for network in (generator, frozen):
            network.convs[0].conv.weight.data = network.convs[0].conv.weight.detach() * 2
            with torch.no_grad():
                network.to_rgb1.conv.modulation.bias.add_(1)
