"""The reconstruction against plain evaluations: loops, float64, one filter at a time."""

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from Compression.initialisation.reconstruction import ReconstructionSettings, reconstruction
from Compression.initialisation.refit import (
    LayerFit,
    filters,
    fit_to_rgb,
    neighbourhoods,
    pre_activation,
    store,
)
from Compression.scores.positions import Positions, content_weight
from Compression.scores.sampling import INITIALISATION, draw_sampling, layer_noise
from Compression.selection import select_channels
from Compression.surgery import prune_generator
from Model.generator import Generator
from Model.layers import StyledConv, ToRGB
from tests.helpers import left_half

SLOPE = 0.2


def layer_with(upsample, channels=3, made=2, style_dim=5):
    layer = StyledConv(channels, made, style_dim, upsample=upsample)
    layer.activate.bias.data.normal_()
    layer.noise.weight.data.fill_(0.3)
    return layer


@pytest.mark.parametrize("upsample", [False, True])
@torch.no_grad()
def test_neighbourhoods_times_filters_are_the_convolution(upsample):
    torch.manual_seed(0)
    layer, x, w = layer_with(upsample), torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    side = 8 if upsample else 4
    noise = torch.randn(2, 1, side, side)
    at = Positions(side, torch.tensor([[0, 5, 9], [3, side**2 - 1, 6]]), torch.ones(2, 3))
    style = layer.conv.style(w)
    rows = neighbourhoods(layer.conv, x, style, at).view(2, 3, -1)
    y = (rows @ filters(layer.conv).T) * layer.conv.demodulation(style)[:, None]
    y = y + at.take(noise) * layer.noise.weight + layer.activate.bias
    torch.testing.assert_close(y, at.take(pre_activation(layer(x, w, noise))), rtol=1e-4, atol=1e-5)


def problem(seed, n=3, positions=40, inputs=2, outputs=2):
    """A fit of random rows to the activations of other filters, with some noise."""
    torch.manual_seed(seed)
    width = 9 * inputs
    power = torch.rand(n, inputs) + 0.5
    power = power / power.mean(dim=0)
    rows = torch.randn(n * positions, width)
    truth = F.normalize(torch.randn(outputs, width), dim=1)
    gain = 1 / (power @ truth.view(outputs, 9, inputs).square().sum(dim=1).T).sqrt()
    noise = 0.3 * torch.randn(n, positions, 1)
    target = (rows @ truth.T).view(n, positions, outputs) * gain[:, None] + noise
    target = target + 0.3 * torch.randn_like(target)
    weight = torch.rand(n, positions) + 0.1
    start = F.normalize(truth + 0.5 * torch.randn_like(truth), dim=1)
    bias = 0.1 * torch.randn(outputs)
    return {
        **{"rows": rows, "target": target, "noise": noise, "weight": weight},
        **{"power": power, "start": start, "bias": bias, "ridge": 1e-3},
    }


def leaky(value):
    return value if value > 0 else SLOPE * value


def plain_error(p, u, bias, o):
    """Weighted squared error of the activations of one filter u, by loops."""
    total, inputs = 0.0, p["power"].shape[1]
    weights = p["weight"].double() / p["weight"].double().sum()
    n, positions = weights.shape
    for i in range(n):
        length = sum(
            p["power"][i, c].item() * u[tap * inputs + c].item() ** 2
            for tap in range(9)
            for c in range(inputs)
        )
        for k in range(positions):
            x = p["rows"][i * positions + k].double()
            y = (x @ u).item() / math.sqrt(length) + p["noise"][i, k, 0].item() + bias
            t = p["target"][i, k, o].item()
            total += weights[i, k].item() * (leaky(t) - leaky(y)) ** 2
    return total


def plain_solution(p, o):
    """Three solves with demodulation held, each with the lambda that makes the filter unit."""
    inputs = p["power"].shape[1]
    x, weights = p["rows"].double(), p["weight"].double().flatten()
    weights = weights / weights.sum()
    positions = p["weight"].shape[1]
    moments = x.T @ (x * weights[:, None])
    least = p["ridge"] * moments.diagonal().mean()
    y = (p["target"][:, :, o] - p["noise"][:, :, 0] - p["bias"][o]).double().flatten()
    u = p["start"][o].double()
    for _ in range(3):
        lengths = (p["power"].double() @ u.view(9, inputs).square().sum(dim=0)).sqrt()
        goal = x.T @ (y * lengths.repeat_interleave(positions) * weights)

        def solved(ridge, goal=goal):
            return torch.linalg.solve(moments + ridge * torch.eye(len(goal)), goal)

        low, high = least.item(), max(goal.norm().item(), 2 * least.item())
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if solved(middle).norm() > 1 else (low, middle)
        u = solved(high)
        u = u / u.norm()
    return u


@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_the_plain_solution_where_that_is_better(seed):
    p = problem(seed)
    fit = LayerFit(**p)
    fit.solve()
    for o in range(2):
        start = p["start"][o].double()
        found, bias = plain_solution(p, o), p["bias"][o].item()
        before, after = (plain_error(p, u, bias, o) for u in (start, found))
        wanted = found if after < before else start
        torch.testing.assert_close(fit.filters[o].double(), wanted, rtol=1e-3, atol=1e-4)
        assert fit.error[o].item() == pytest.approx(min(before, after), rel=1e-3)


def test_refinement_follows_the_gradient_and_never_raises_an_error():
    p = problem(5)
    fit = LayerFit(**p)
    error = fit.error.clone()
    slope = torch.where(fit.y + fit.noise + fit.bias < 0, SLOPE, 1.0)
    residual = fit.activation - F.leaky_relu(fit.y + fit.noise + fit.bias, SLOPE)
    found = fit._descent(residual * slope * fit.weight)
    for o in range(2):  # minus half of the derivative, by central differences
        for i in range(0, 18, 5):
            step = torch.zeros(18, dtype=torch.double)
            step[i] = 1e-4
            u, bias = p["start"][o].double(), p["bias"][o].item()
            difference = plain_error(p, u + step, bias, o) - plain_error(p, u - step, bias, o)
            assert found[i, o].item() == pytest.approx(-difference / 4e-4, rel=2e-2, abs=1e-4)
    fit.solve()
    for _ in range(4):
        fit.refine(1)
        assert (fit.error <= error + 1e-7).all()
        error = fit.error.clone()
    for o in range(2):
        again = plain_error(p, fit.filters[o].double(), fit.bias[o].item(), o)
        assert again == pytest.approx(error[o].item(), rel=1e-3)
    assert fit.filters.norm(dim=1).tolist() == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize("dead", [[], [1]])
@torch.no_grad()
def test_a_stored_fit_is_what_the_layer_computes(dead):
    """A filter that was zero, as after pruning by magnitude, gets one of length 1."""
    torch.manual_seed(0)
    layer, x, w = layer_with(upsample=True), torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    layer.conv.weight[0, dead] = 0
    noise, every = torch.randn(2, 1, 8, 8), torch.arange(64).expand(2, -1)
    at = Positions(8, every, torch.rand(2, 64) + 0.1)
    style = layer.conv.style(w)
    scale = style.square().mean(dim=0).sqrt()
    target = torch.randn(2, 64, 2)
    fit = LayerFit(
        neighbourhoods(layer.conv, x, style / scale, at),
        target,
        at.take(noise) * layer.noise.weight,
        at.weight,
        (style / scale).square(),
        filters(layer.conv) * scale.repeat(9),
        layer.activate.bias,
        1e-3,
    )
    norms = layer.conv.weight[0].flatten(1).norm(dim=1)
    norms[dead] = 1
    fit.solve()
    fit.refine(3)
    store(layer, fit, scale)
    made = at.take(layer(x, w, noise)) / 2**0.5
    error = ((made - F.leaky_relu(target, SLOPE)).square() * at.weight[..., None]).sum(dim=(0, 1))
    torch.testing.assert_close(error / at.weight.sum(), fit.error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.conv.weight[0].flatten(1).norm(dim=1), norms)


@torch.no_grad()
def test_to_rgb_is_weighted_ridge_regression():
    torch.manual_seed(0)
    layer = ToRGB(4, 5)
    rows, target, weight = torch.randn(50, 4), torch.randn(50, 3), torch.rand(50) + 0.1
    prior, bias = torch.randn(3, 4), layer.bias.view(3, 1).clone().double()
    fit_to_rgb(layer, prior, rows, target, weight, ridge=0.05)
    x = torch.cat([rows, torch.ones(50, 1)], dim=1).double()
    root = (weight.double() / weight.double().sum()).sqrt()[:, None]
    pull = 0.05 * (x * root).square().sum() / 5
    # Ridge regression as ordinary least squares with rows that pull to the prior.
    pulled = torch.cat([x * root, pull.sqrt() * torch.eye(5, dtype=torch.double)])
    start = torch.cat([prior.double(), bias], dim=1)
    goal = torch.cat([target.double() * root, pull.sqrt() * start.T])
    wanted = torch.linalg.lstsq(pulled, goal).solution
    torch.testing.assert_close(layer.conv.weight[0, :, :, 0, 0].double().T, wanted[:-1])
    torch.testing.assert_close(layer.bias.flatten().double(), wanted[-1])


def objective(generator, full, sampling):
    """Weighted squared error of the pictures that the reconstruction looks at."""
    draws = sampling.stream(INITIALISATION)
    z = torch.randn(sampling.options.init_n_sample, full.style_dim, generator=draws)
    noise = layer_noise(full, len(z), draws)
    made, target = (g.synthesis(g.w_plus([z]), noise).image.double() for g in (generator, full))
    weight = content_weight(target, left_half, sampling.options.init_outside)
    return ((made - target).square() * weight).sum().item()


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("second_kernel", [3, 1])
@torch.no_grad()
def test_never_worse_than_the_kept_weights(seed, ratio, second_kernel):
    torch.manual_seed(seed)
    full = Generator(8, 8, 2, (8, 8, 6, 6))
    for layer in full.styled_convs:
        layer.activate.bias.data.normal_()
        layer.noise.weight.data.fill_(0.1)
    keep = select_channels([torch.rand(width) for width in full.channels], ratio)
    pruned = prune_generator(full, keep, second_kernel)
    options = ReconstructionSettings(init_n_sample=12)
    sampling = replace(draw_sampling(full, parser=left_half, seed=seed), options=options)
    before = objective(pruned, full, sampling)
    mapping = pruned.style.state_dict()
    lines = reconstruction(pruned, full, keep, sampling)
    after = objective(pruned, full, sampling)
    assert after <= before * (1 + 1e-6)
    assert after < 0.9 * before  # and by far better, on these
    for name, value in full.style.state_dict().items():
        assert torch.equal(mapping[name], value)
    for line in lines[1:]:
        if line.startswith("conv"):
            *_, r2_before, r2_after = line.split()
            assert float(r2_after) >= float(r2_before)


@torch.no_grad()
def test_nothing_removed_is_reconstructed_exactly():
    torch.manual_seed(0)
    full = Generator(8, 8, 2, (6, 6, 6, 6))
    keep = [torch.ones(6, dtype=torch.bool)] * 4
    pruned = prune_generator(full, keep)
    options = ReconstructionSettings(init_n_sample=12, init_outside=1.0)
    reconstruction(pruned, full, keep, replace(draw_sampling(full), options=options))
    z = torch.randn(2, 8)
    a, b = (g([z], randomize_noise=False) for g in (pruned, full))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_large_maps_are_computed_again_to_the_same_end(monkeypatch):
    torch.manual_seed(0)
    full = Generator(16, 8, 2, (8, 8, 6, 6, 5, 5))
    keep = select_channels([torch.rand(width) for width in full.channels], 0.5)
    options = ReconstructionSettings(init_n_sample=12)
    sampling = replace(draw_sampling(full, parser=left_half), options=options)
    module, results = sys.modules[reconstruction.__module__], []
    for largest in (128, 4, 0):
        monkeypatch.setattr(module, "LARGEST_KEPT", largest)
        pruned = prune_generator(full, keep)
        reconstruction(pruned, full, keep, sampling)
        results.append(pruned.state_dict())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
