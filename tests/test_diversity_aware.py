"""DCP's score against its equations, written as loops over images, directions and channels."""

import numpy as np
import pytest
import torch

from Compression.scores import channel_scores, sampling
from Compression.scores.diversity_aware import DiversitySettings
from Evaluation.directions import principal_components
from Model.generator import Generator
from Util import memory
from Util.streams import stream

CHANNELS = (6, 5, 5, 4)


@pytest.fixture
def small():
    """An 8 px generator in double precision, with layer noise that matters."""
    torch.manual_seed(3)
    network = Generator(8, 8, 2, CHANNELS)
    for layer in network.styled_convs:
        layer.noise.weight.data.fill_(0.3)
    return network.double()


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    """Random numbers and components in the networks' precision."""
    plain = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: plain(*a, **k).double())


def score(network, **how):
    settings = {k: how.pop(k) for k in list(how) if k.startswith("dcp_")}
    options = DiversitySettings(**{"dcp_directions": 3, "dcp_latents": 50, **settings})
    return channel_scores(network, "diversity_aware", options=options, **how)


def slow(network, n_sample, batch_size, seed, alpha, directions, stop, latents=50):
    """One image, one direction and one channel at a time; ordinary backward."""
    found = principal_components(network, seed, latents)
    z = torch.randn(n_sample, 8, generator=stream(seed, sampling.LATENTS))
    choice = stream(seed, sampling.DIRECTIONS)
    noise = stream(seed, sampling.LAYER_NOISE)
    total = [np.zeros(width) for width in network.channels]
    for batch in z.split(batch_size):
        drawn = torch.multinomial(found.shares, directions, replacement=True, generator=choice)
        answers = []
        for j in drawn.tolist():
            network.zero_grad()
            for one in batch:
                pictures = []
                for step in (0.0, alpha):
                    w = network.mapping(one[None]) + step * found.components[j]
                    row = torch.randn(4**2 + 8**2 + 8**2, generator=noise).split([16, 64, 64])
                    maps = [m.view(1, 1, s, s) for m, s in zip(row, (4, 8, 8), strict=True)]
                    pictures.append(network([w], input_is_latent=True, noise=maps))
                if stop:
                    pictures[1] = pictures[1].detach()
                (pictures[0] - pictures[1]).abs().sum().backward()
            convs = [layer.conv for layer in network.styled_convs] + [network.to_rgbs[-1].conv]
            answers.append([c.weight.grad.numpy().copy() for c in convs])
        for group, width in enumerate(network.channels):
            for c in range(width):
                g = [np.abs(a[group][0, :, c]).mean() for a in answers]
                total[group][c] += sum((value - sum(g) / len(g)) ** 2 for value in g)
    network.zero_grad()
    return total


@pytest.mark.parametrize("stop", [False, True])
def test_score_by_its_definition(small, stop):
    how = {"n_sample": 5, "batch_size": 2, "seed": 4}
    expected = slow(small, 5, 2, 4, 2.0, 3, stop)
    actual = score(small, **how, dcp_alpha=2.0, dcp_stop_gradient=stop)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-4)


def test_how_many_images_go_at_once_changes_nothing(small, monkeypatch):
    whole = score(small, n_sample=4, batch_size=4)
    monkeypatch.setattr(memory, "SCORING", 2 * 8**2)
    for a, b in zip(whole, score(small, n_sample=4, batch_size=4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_order_of_latents_within_a_batch_does_not_matter(small):
    for layer in small.styled_convs:  # the noise follows the place in the batch
        layer.noise.weight.data.zero_()
    z = torch.randn(4, 8)
    first = score(small, latents=z, batch_size=4)
    turned = score(small, latents=z[[2, 0, 3, 1]], batch_size=4)
    other_batches = score(small, latents=z[[2, 0, 3, 1]], batch_size=2)
    for a, b, c in zip(first, turned, other_batches, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        assert not torch.allclose(a, c, rtol=1e-2)


def test_options_change_the_score(small):
    first = score(small, n_sample=4, batch_size=2)
    for change in (
        {"dcp_alpha": 10.0}, {"dcp_directions": 4}, {"dcp_latents": 60}, {"dcp_stop_gradient": True}
    ):  # fmt: skip
        other = score(small, n_sample=4, batch_size=2, **change)
        assert not any(torch.allclose(a, b) for a, b in zip(first, other, strict=True)), change
