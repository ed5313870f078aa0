"""The cost of a generator: parameters, and multiply-accumulates for one image.

The convention is that of the published numbers ("Content-Aware GAN Compression", Liu et al., CVPR
2021, where multiply-accumulates are called FLOPs). It counts

- the linear layers of the mapping network and of the modulation: inputs times outputs;
- the convolutions: weights times positions, where a transposed convolution of stride 2 takes every
  *input* position, because each input value meets each weight once.

It leaves out filters (blur, RGB upsampling), demodulation, and everything element by element: for
the full-size 256 px generator about 0.6 % more.
"""

from dataclasses import dataclass

from torch import nn

from Model.generator import Generator
from Model.layers import EqualLinear, ModulatedConv2d


@dataclass(frozen=True)
class LayerCost:
    """Costs of one layer for one image.

    Attributes:
        name: the layer's name in a checkpoint; ``style`` is the whole mapping network.
        side: side in px of the layer's output map; 0 for the mapping network.
        in_channels: width of its input; 0 for the constant input.
        out_channels: width of its output.
        macs: multiply-accumulates, see the module.
        parameters: numbers that training changes.
    """

    name: str
    side: int
    in_channels: int
    out_channels: int
    macs: int
    parameters: int


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _convolution_cost(
    name: str, layer: nn.Module, conv: ModulatedConv2d, in_side: int, out_side: int
) -> LayerCost:
    """Return the cost of a styled convolution or a ToRGB around its modulated convolution."""
    macs = conv.weight.numel() * in_side**2 + conv.modulation.weight.numel()
    _, out_channels, in_channels, _, _ = conv.weight.shape
    return LayerCost(name, out_side, in_channels, out_channels, macs, _parameters(layer))


def layer_costs(generator: Generator) -> list[LayerCost]:
    """List the costs of every layer in the order of computation; works on the meta device too."""
    mapping = sum(m.weight.numel() for m in generator.style if isinstance(m, EqualLinear))
    dim, width = generator.style_dim, generator.channels[0]
    costs = [
        LayerCost("style", 0, dim, dim, mapping, _parameters(generator.style)),
        LayerCost("input", 4, 0, width, 0, _parameters(generator.input)),
    ]
    side = 4
    for i, layer in enumerate(generator.styled_convs):
        in_side = side
        side *= 2 if layer.conv.upsample else 1
        name = f"convs.{i - 1}" if i else "conv1"
        costs.append(_convolution_cost(name, layer, layer.conv, in_side, side))
        if i % 2 == 0:  # the last convolution of a resolution
            name, to_rgb = f"to_rgbs.{i // 2 - 1}" if i else "to_rgb1", generator.rgb_layers[i // 2]
            costs.append(_convolution_cost(name, to_rgb, to_rgb.conv, side, side))
    return costs


def macs(generator: Generator) -> int:
    """Count multiply-accumulates for one image: 45,124,673,536 for full-size 256 px."""
    return sum(cost.macs for cost in layer_costs(generator))


def parameters(generator: Generator) -> int:
    """Count the numbers that training changes; noise maps and filters are not among them."""
    return _parameters(generator)
