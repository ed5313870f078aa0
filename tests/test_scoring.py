import math

import numpy as np
import pytest
import torch

from Compression.scores import (
    SCORES,
    EmptyContentError,
    channel_scores,
    salt_and_pepper,
    sampling,
    weight_gradient_score,
)
from Compression.scores.activations import _Spread
from Model.generator import Generator
from tests.golden_fill import assert_golden, fill_from_numpy, load_golden
from tests.helpers import left_half
from Util import memory
from Util.streams import stream

NAMES = ["generator_32px", "generator_64px"]
CHANNELS = (6, 5, 5, 4)


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    arrays, spec = load_golden(request.param)
    network = Generator(spec["size"], spec["style_dim"], spec["n_mlp"], spec["channels"])
    fill_from_numpy(network, spec["seed"])
    return arrays, network


@pytest.fixture
def small():
    """An 8 px generator, with layer noise that matters."""
    torch.manual_seed(3)
    network = Generator(8, 8, 2, CHANNELS)
    for layer in network.styled_convs:
        layer.noise.weight.data.fill_(0.3)
    return network


def unpack(bits, images):
    count = len(images) * images.shape[2] * images.shape[3]
    values = np.unpackbits(bits)[:count].reshape(len(images), 1, *images.shape[2:])
    return torch.from_numpy(values).bool()


def assert_scores(actual, expected, rtol=1e-4):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def test_content_aware_golden(golden):
    arrays, network = golden
    images = network([torch.from_numpy(arrays["z1"])], randomize_noise=False)
    noise_on = unpack(arrays["score_noise_on"], images)
    assert not (noise_on & ~unpack(arrays["score_mask"], images)).any()
    salt_pepper = torch.from_numpy(arrays["score_salt_pepper"]).float().unsqueeze(1)
    noisy = torch.where(noise_on, salt_pepper, images)
    scores = weight_gradient_score(network, images, noisy)
    assert len(scores) == len(network.channels)
    for i, score in enumerate(scores):
        assert_golden(score, arrays, f"score_{i}")


@pytest.mark.parametrize("metric", ["l1_out", "l1_in", "l1_style"])
@pytest.mark.parametrize("batch_size", [1, 10])
def test_weight_baselines_golden(golden, metric, batch_size):
    arrays, network = golden
    latents = torch.from_numpy(arrays["z1"])
    scores = channel_scores(network, metric, latents=latents, batch_size=batch_size)
    assert [len(score) for score in scores] == list(network.channels)
    for i in range(metric == "l1_in", len(scores)):
        assert_golden(scores[i], arrays, f"{metric}_{i}")
    if metric == "l1_in":  # no golden for the constant input: its own L1 norm
        expected = network.input.input.detach().abs().sum(dim=(0, 2, 3))
        torch.testing.assert_close(scores[0], expected)


@pytest.mark.parametrize("metric", ["asv", "l1_map", "l1_norm_asv", "l2_norm_asv"])
@pytest.mark.parametrize("batch_size", [1, 10])
def test_activation_baselines_golden(golden, metric, batch_size):
    arrays, network = golden
    strengths = [layer.noise.weight.detach().clone() for layer in network.styled_convs]
    for layer in network.styled_convs:
        layer.noise.weight.data.zero_()
    latents = torch.from_numpy(arrays["z1"])
    scores = channel_scores(network, metric, latents=latents, batch_size=batch_size)
    for layer, strength in zip(network.styled_convs, strengths, strict=True):
        layer.noise.weight.data.copy_(strength)
    for i, score in enumerate(scores):
        if i == 0 and metric != "l1_map":  # the constant input: the golden values are rounding
            assert np.abs(arrays[f"{metric}_0"]).max() < 1e-6
            assert (score == 0).all()
        else:
            assert_golden(score, arrays, f"{metric}_{i}")


def test_score_by_its_definition(small):
    """Gradient of the summed distance, by a finite difference of the loss in one weight."""
    small.double()
    z = torch.randn(2, 8, dtype=torch.float64)
    noise = [m.double() for m in small.make_noise()]
    images = small([z], noise=noise)
    noisy = images.detach() + 0.1 * torch.randn_like(images)
    actual = weight_gradient_score(small, images, noisy)[1]
    weight = small.convs[0].conv.weight
    expected = torch.zeros(weight.shape[2], dtype=torch.float64)
    epsilon = 1e-6
    with torch.no_grad():
        for index in np.ndindex(*weight.shape):
            losses = []
            for step in (epsilon, -2 * epsilon):
                weight[index] += step
                losses.append((small([z], noise=noise) - noisy).abs().sum())
            weight[index] += epsilon
            expected[index[2]] += ((losses[0] - losses[1]) / (2 * epsilon)).abs()
    expected /= weight.numel() / weight.shape[2]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def slow_content_aware(network, n_sample, batch_size, seed, prob):
    """Whole batches, ordinary backward, one seeded draw after another."""
    z = torch.randn(n_sample, 8, generator=stream(seed, sampling.LATENTS))
    layer = stream(seed, sampling.LAYER_NOISE)
    pixel = stream(seed, sampling.PIXEL_NOISE)
    total = [torch.zeros(width) for width in network.channels]
    for batch in z.split(batch_size):
        maps = torch.randn(len(batch), 4**2 + 8**2 + 8**2, generator=layer).split([16, 64, 64], 1)
        noise = [m.reshape(len(batch), 1, s, s) for m, s in zip(maps, (4, 8, 8), strict=True)]
        images = network([batch], noise=noise)
        noisy = salt_and_pepper(images, left_half(images), prob, pixel)
        network.zero_grad()
        torch.nn.functional.l1_loss(images, noisy, reduction="sum").backward()
        weights = [network.conv1.conv, network.convs[0].conv, network.convs[1].conv]
        weights.append(network.to_rgbs[0].conv)
        for score, conv in zip(total, weights, strict=True):
            score += conv.weight.grad.abs().mean(dim=(0, 1, 3, 4))
    network.zero_grad()
    return total


@pytest.mark.parametrize("images_at_once", [1, 2, 100])
def test_content_aware_with_a_smaller_last_batch(small, images_at_once, monkeypatch):
    monkeypatch.setattr(memory, "SCORING", images_at_once * 8**2)
    done = []
    scores = channel_scores(
        small,
        "content_aware",
        parser=left_half,
        n_sample=7,
        batch_size=3,
        noise_prob=0.3,
        seed=5,
        progress=done.append,
    )
    assert sum(done) == 7
    assert_scores(scores, slow_content_aware(small, 7, 3, 5, 0.3))


def test_batch_size_is_part_of_the_content_score_alone(small):
    def scores(metric, batch_size):
        return channel_scores(
            small, metric, parser=left_half, n_sample=6, batch_size=batch_size, noise_prob=0.3
        )

    for metric in SCORES:
        one, all_at_once = scores(metric, 1), scores(metric, 6)
        if metric == "diversity_aware":  # see test_diversity_aware.py
            assert not any(torch.allclose(a, b) for a, b in zip(one, all_at_once, strict=True))
        elif metric == "content_aware":
            # |a + b| <= |a| + |b|: gradients of different images cancel within a batch.
            assert all((a >= b).all() for a, b in zip(one, all_at_once, strict=True))
            assert any((a > 1.1 * b).any() for a, b in zip(one, all_at_once, strict=True))
        else:
            assert_scores(one, all_at_once)


@pytest.mark.parametrize("metric", SCORES)
def test_seed(small, metric):
    def scores(seed):
        torch.rand(3)  # the global random state must not matter
        return channel_scores(
            small, metric, parser=left_half, n_sample=4, batch_size=2, noise_prob=0.5, seed=seed
        )

    first, again, other = scores(1), scores(1), scores(2)
    assert [len(score) for score in first] == list(CHANNELS)
    assert all(score.isfinite().all() and (score >= 0).all() for score in first)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("metric", SCORES)
def test_the_generator_comes_back_as_it_was(small, metric):
    small.style.requires_grad_(False)
    small.conv1.conv.weight.grad = torch.ones_like(small.conv1.conv.weight)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    flags = [parameter.requires_grad for parameter in small.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        channel_scores(small, metric, parser=left_half, n_sample=2, noise_prob=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in small.parameters()] == flags
    assert (small.conv1.conv.weight.grad == 1).all()
    assert small.convs[0].conv.weight.grad is None
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_dead_map_scores_zero():
    spread = _Spread(torch.zeros(2, 3, 4, 4))
    spread.add(torch.zeros(2, 3, 4, 4))
    for score in (spread.asv(), spread.l1_norm_asv(), spread.l2_norm_asv()):
        assert (score == 0).all()


def test_salt_and_pepper():
    images = torch.linspace(-0.5, 0.5, 2 * 3 * 200 * 200).view(2, 3, 200, 200).requires_grad_()
    mask = left_half(images)
    noisy = salt_and_pepper(images, mask, 0.1, torch.Generator().manual_seed(0))
    assert not noisy.requires_grad
    changed = noisy != images
    assert (changed == changed[:, :1]).all()  # all three channels together
    changed = changed[:, :1]
    assert not (changed & (mask == 0)).any()
    content = mask.sum().item()
    deviation = math.sqrt(content * 0.1 * 0.9)
    assert abs(changed.sum().item() - 0.1 * content) < 4 * deviation
    values = noisy[:, :1][changed]
    assert set(values.tolist()) == {-1.0, 1.0}
    assert abs(values.mean().item()) < 4 / math.sqrt(len(values))
    assert (noisy == noisy[:, :1])[changed.expand_as(noisy)].all()
    again = salt_and_pepper(images, mask, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)
    everything = salt_and_pepper(images, mask, 1.0, torch.Generator().manual_seed(0))
    assert ((everything.abs() == 1) == (mask == 1)).all()


def test_errors(small):
    def fails(match, error=ValueError, metric="content_aware", **kwargs):
        with pytest.raises(error, match=match):
            channel_scores(small, metric, **{"parser": left_half, "n_sample": 2} | kwargs)

    fails("unknown metric 'l3'; there are content_aware, diversity_aware", metric="l3")
    fails("n_sample is 0", n_sample=0)
    fails("batch_size is 0", batch_size=0)
    fails("seed is -1", seed=-1)
    fails("noise_prob is 1.5", noise_prob=1.5)
    fails("needs a parser", parser=None)
    fails("noise_prob is so low", noise_prob=1e-12)
    fails(
        "masks of all 2 images are empty",
        EmptyContentError,
        parser=lambda images: torch.zeros_like(images[:, :1]),
    )
    fails(r"mask makes \(2, 8, 8\) of images \(2, 3, 8, 8\)", parser=lambda images: images[:, 0])
    assert all(parameter.requires_grad for parameter in small.parameters())
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no gradient"):
        weight_gradient_score(small, images, images)
    with pytest.raises(ValueError, match="noisy_images"):
        weight_gradient_score(small, small([torch.zeros(2, 8)]), images)
