import copy

import pytest
import torch

from Compression.initialisation import INITIALISATIONS
from Compression.scores.sampling import draw_sampling
from Compression.surgery import prune_generator
from Model.generator import Generator


@pytest.fixture
def networks():
    torch.manual_seed(0)
    full = Generator(8, 8, 2, (6, 6, 6, 6))
    for layer in full.styled_convs:
        layer.activate.bias.data.normal_()
    keep = [torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)] * 4
    return full, prune_generator(full, keep), keep


def initialised(name, networks):
    full, pruned, keep = networks
    small = copy.deepcopy(pruned)
    sampling = draw_sampling(full, n_sample=4, batch_size=2)
    INITIALISATIONS[name].function(small, full, keep, sampling)
    return small


def matrices(generator):
    return {
        name: (p if p.ndim == 2 else p[0].flatten(1)).detach()
        for name, p in generator.named_parameters()
        if name.endswith("conv.weight") or name.endswith("modulation.weight")
    }


def test_svs_takes_the_roots_and_rescaled_their_norms(networks):
    before = matrices(networks[1])
    roots, norms = (matrices(initialised(name, networks)) for name in ("svs", "rescaled"))
    for name, weight in before.items():
        s = torch.linalg.svdvals(weight)
        torch.testing.assert_close(
            torch.linalg.svdvals(roots[name]), s.sqrt(), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(norms[name].norm(), roots[name].norm())
        ratio = torch.linalg.svdvals(norms[name]) / s
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-3)


def test_svs_divides_biases_and_leaves_the_rest(networks):
    old, new = networks[1], initialised("svs", networks)
    bias = old.conv1.activate.bias
    torch.testing.assert_close(new.conv1.activate.bias, bias / (bias.norm() + 1e-8).sqrt())
    bias = old.conv1.conv.modulation.bias
    torch.testing.assert_close(new.conv1.conv.modulation.bias, bias / (bias.norm() + 1e-8).sqrt())
    torch.testing.assert_close(new.input.input, old.input.input)
    torch.testing.assert_close(new.style[1].weight, old.style[1].weight)


def test_mapping_only_and_scratch(networks):
    full, pruned, _ = networks
    mapping, scratch = (initialised(name, networks) for name in ("mapping_only", "scratch"))
    torch.testing.assert_close(mapping.style[1].weight, full.style[1].weight)
    assert not torch.equal(scratch.style[1].weight, full.style[1].weight)
    for network in (mapping, scratch):
        assert network.channels == pruned.channels
        assert not torch.equal(network.conv1.conv.weight, pruned.conv1.conv.weight)
