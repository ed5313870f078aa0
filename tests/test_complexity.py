import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from Model.complexity import layer_costs, macs, parameters
from Model.generator import Generator, full_size_channels
from Model.layers import ModulatedConv2d
from tests.golden_fill import load_golden

MACS = {256: (45_124_673_536, 4_123_578_080), 1024: (74_266_894_336, 6_990_183_648)}
PARAMETERS = {256: (30.03e6, 5.57e6), 1024: (30.37e6, 5.65e6)}
PRUNED_256 = (*[154] * 10, 77, 77, 39, 39)


def on_meta(size, channels=None, **kwargs):
    """A generator without memory; its noise maps and weights are shapes only."""
    with torch.device("meta"):
        return Generator(size, channels=channels, **kwargs)


def pruned_channels(size, ratio=0.7):
    return [c - int(c * ratio) for c in full_size_channels(size)]


@pytest.mark.parametrize("size", [256, 1024])
def test_published_numbers(size):
    full, pruned = on_meta(size), on_meta(size, pruned_channels(size))
    assert (macs(full), macs(pruned)) == MACS[size]
    for network, expected in zip((full, pruned), PARAMETERS[size], strict=True):
        assert parameters(network) == pytest.approx(expected, abs=5e3)


def test_smaller_filters_spare_eight_of_nine_weights():
    widths = pruned_channels(256)
    spared = sum(8 * widths[i] * widths[i + 1] * 4 ** (i // 2 + 2) for i in range(2, 14, 2))
    small = on_meta(256, widths, second_kernel=1)
    assert macs(small) == MACS[256][1] - spared == 1_516_889_824


def test_published_channels():
    assert tuple(pruned_channels(256)) == PRUNED_256


@pytest.mark.parametrize("name", ["generator_32px", "generator_64px"])
def test_golden(name):
    arrays, spec = load_golden(name)
    shape = {"style_dim": spec["style_dim"], "n_mlp": spec["n_mlp"]}
    assert macs(on_meta(spec["size"], spec["channels"], **shape)) == arrays["macs"]
    for ratio in ("0.5", "0.7"):
        channels = arrays[f"pruned_channels_{ratio}"].tolist()
        assert macs(on_meta(spec["size"], channels, **shape)) == arrays[f"pruned_macs_{ratio}"]


def test_layers_sum_up():
    network = on_meta(32, (12, 12, 10, 10, 8, 8, 6, 6), style_dim=16, n_mlp=3)
    costs = layer_costs(network)
    assert sum(cost.macs for cost in costs) == macs(network)
    assert sum(cost.parameters for cost in costs) == parameters(network)
    names = [cost.name for cost in costs]
    assert names[:6] == ["style", "input", "conv1", "to_rgb1", "convs.0", "convs.1"]
    assert names[-1] == "to_rgbs.2"
    assert set(names) - {"style", "input"} <= dict(network.named_modules()).keys()
    assert [cost.side for cost in costs[1:]] == [4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32]
    last = costs[-1]
    assert (last.in_channels, last.out_channels, last.macs) == (6, 3, 6 * 3 * 32**2 + 16 * 6)


@pytest.mark.parametrize("channels", [None, PRUNED_256])
def test_flop_counter(channels):
    """PyTorch's counter finds our MACs, twice (it counts additions too), and three things more:
    the filters (blur and RGB upsampling), demodulation, as many as there are weights, and styles by
    the w of all layers, of which each layer takes its own (`Model.modulation`).
    """
    network = on_meta(256, channels)
    with FlopCounterMode(display=False) as counter:
        network([torch.zeros(1, 512, device="meta")])
    demodulation = sum(
        module.weight.numel()
        for module in network.modules()
        if isinstance(module, ModulatedConv2d) and module.demodulate
    )
    # 16 taps per output value, three channels of RGB at every doubled resolution. The counter
    # takes an upsampling's 16 taps per *input* value, and the blur's per output value.
    widths, sides = network.channels[2::2], [8 * 2**i for i in range(6)]
    blur = sum(16 * c * side**2 for c, side in zip(widths, sides, strict=True))
    upsample = sum(16 * 3 * (side // 2) ** 2 for side in sides)
    styled = sum(m.weight.shape[2] for m in network.modules() if isinstance(m, ModulatedConv2d))
    styles = (network.n_latent - 1) * network.style_dim * styled
    more = demodulation + blur + upsample + styles
    assert counter.get_total_flops() == 2 * (macs(network) + more)
    assert more / macs(network) < 0.025
