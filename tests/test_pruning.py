import math

import pytest
import torch

from Compression.selection import select_channels
from Compression.surgery import prune_generator
from Model.complexity import macs
from Model.generator import Generator
from tests.golden_fill import assert_golden, fill_from_numpy, load_golden

NAMES = ["generator_32px", "generator_64px"]


def golden_network(name):
    arrays, spec = load_golden(name)
    network = Generator(spec["size"], spec["style_dim"], spec["n_mlp"], spec["channels"])
    fill_from_numpy(network, spec["seed"])
    return arrays, network


def random_keep(network, ratio=0.5, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return select_channels([torch.rand(c, generator=stream) for c in network.channels], ratio)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_golden(name, ratio):
    arrays, network = golden_network(name)
    groups = range(len(network.channels))
    keep = select_channels([torch.from_numpy(arrays[f"score_{i}"]) for i in groups], ratio)
    for i in groups:
        assert torch.equal(keep[i], torch.from_numpy(arrays[f"keep_{ratio}_{i}"]))
    pruned = prune_generator(network, keep)
    assert pruned.channels == tuple(arrays[f"pruned_channels_{ratio}"].tolist())
    assert macs(pruned) == arrays[f"pruned_macs_{ratio}"]
    image = pruned([torch.from_numpy(arrays["z1"])], randomize_noise=False)
    assert_golden(image, arrays, f"pruned_image_{ratio}")


def silence(network, keep):
    """Set the styles of the removed channels to zero wherever they are read, in place."""
    layers = [*network.styled_convs, network.to_rgb1, *network.to_rgbs]
    groups = [*range(len(network.styled_convs)), *range(1, len(keep), 2)]
    for layer, group in zip(layers, groups, strict=True):
        layer.conv.modulation.weight.data[~keep[group]] = 0
        layer.conv.modulation.bias.data[~keep[group]] = 0
    return network


def test_equals_the_full_network_with_removed_channels_zeroed():
    _, network = golden_network("generator_32px")
    for layer in (network.to_rgb1, *network.to_rgbs):
        layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    keep = random_keep(network)
    pruned = prune_generator(network, keep)
    full = silence(network, keep)
    w_plus = torch.randn(3, full.n_latent, full.style_dim)
    # The one difference: the gain of every ToRGB's convolution, but not of its bias.
    for to_rgb, mask in zip((full.to_rgb1, *full.to_rgbs), keep[1::2], strict=True):
        to_rgb.conv.weight.data *= math.sqrt(len(mask) / mask.sum())
    expected = full.synthesis(w_plus, "fixed").rgbs
    actual = pruned.synthesis(w_plus, "fixed").rgbs
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_the_gain_is_one_factor_where_all_rgb_inputs_shrink_alike():
    network = Generator(16, 16, 2, (8, 8, 8, 8, 8, 8))
    keep = random_keep(network)
    pruned = prune_generator(network, keep)
    z = torch.randn(2, 16)
    full = silence(network, keep)
    torch.testing.assert_close(
        pruned([z], randomize_noise=False),
        math.sqrt(2) * full([z], randomize_noise=False),
        rtol=1e-4,
        atol=1e-4,
    )


def test_removing_nothing_copies():
    _, network = golden_network("generator_32px")
    network.eval()
    pruned = prune_generator(network, random_keep(network, ratio=0.0))
    assert not pruned.training
    mine, theirs = network.state_dict(), pruned.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0)
        assert theirs[name].data_ptr() != value.data_ptr()


def test_filters_of_the_networks_own_are_kept():
    _, network = golden_network("generator_32px")
    for name, buffer in network.named_buffers():
        if name.endswith("kernel"):
            buffer.copy_(torch.full_like(buffer, 1 / 4))
    pruned = prune_generator(network, random_keep(network, ratio=0.0))
    z = torch.randn(2, network.style_dim)
    made = [g([z], randomize_noise=False) for g in (network, pruned)]
    torch.testing.assert_close(made[1], made[0])


def test_surgery_leaves_the_rest_alone():
    _, network = golden_network("generator_32px")
    network.requires_grad_(False).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    pruned = prune_generator(network, random_keep(network))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.requires_grad and p.dtype == torch.float64 for p in pruned.parameters())
    for name, value in pruned.state_dict().items():
        if name.startswith(("style.", "noises.")):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_pruned_network_can_be_pruned_again():
    _, network = golden_network("generator_32px")
    once = prune_generator(network, random_keep(network))
    twice = prune_generator(once, random_keep(once))
    assert twice.channels == (3, 3, 3, 3, 2, 2, 2, 2)


def test_selection():
    scores = [torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.arange(10.0)]
    keep = select_channels(scores, 0.5)
    assert keep[0].tolist() == [True, False, True, False]
    assert keep[1].tolist() == [False] * 5 + [True] * 5
    assert select_channels([torch.ones(4)], 0.5)[0].tolist() == [False, False, True, True]
    assert select_channels([torch.ones(512)], 0.7)[0].sum() == 154
    for ratio in (0.0, 0.29, 0.999999, 1 - 2**-53):
        for width in (1, 2, 3, 5, 100, 512):
            kept = select_channels([torch.rand(width)], ratio)[0].sum()
            assert kept == width - int(width * ratio) >= 1


def test_selection_errors():
    for ratio in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="remove_ratio is"):
            select_channels([torch.ones(4)], ratio)
    with pytest.raises(ValueError, match="group 1 have shape"):
        select_channels([torch.ones(4), torch.ones(2, 2)], 0.5)
    with pytest.raises(ValueError, match="group 0 are not all finite"):
        select_channels([torch.tensor([1.0, math.nan])], 0.5)


def test_surgery_errors():
    network = Generator(8, 8, 2, (4, 4, 3, 3))
    keep = [torch.ones(c, dtype=torch.bool) for c in network.channels]
    with pytest.raises(ValueError, match="3 masks; the generator has 4"):
        prune_generator(network, keep[:3])
    with pytest.raises(ValueError, match=r"mask 2 is torch\.bool of shape"):
        prune_generator(network, [keep[0], keep[1], keep[0], keep[3]])
    with pytest.raises(ValueError, match=r"mask 0 is torch\.float32"):
        prune_generator(network, [keep[0].float(), *keep[1:]])
    with pytest.raises(ValueError, match="keeps no channel"):
        prune_generator(network, [keep[0], ~keep[1], *keep[2:]])
