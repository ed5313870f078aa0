"""Synthesis with weights that are packed once, on CPUs (doc/operators.md).

Every layer is one compiled operator, and all images share the weights. `FloatSynthesis` computes in
float32, `TileSynthesis` in bfloat16 on AMX.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from Model.layers import EPSILON, ConstantInput, ModulatedConv2d, StyledConv, ToRGB
from Model.ops import Epilogue
from Model.ops.dispatch import packing_available, tiles_available
from Model.precision import half_type

SLOPE, GAIN = Epilogue().negative_slope, Epilogue().scale
"""Of the activation."""


class StaleError(RuntimeError):
    """A generator's parameters have changed since it was prepared."""


class Source(NamedTuple):
    """A tensor that something was computed from, and what told its values then."""

    owner: Mapping[str, Tensor | None]
    name: str
    tensor: Tensor
    address: int
    version: int

    def unchanged(self) -> bool:
        """Return whether the same tensor is there, and nothing was written to it."""
        return (
            self.owner[self.name] is self.tensor
            and self.tensor.data_ptr() == self.address
            and version(self.tensor) == self.version
        )


def version(tensor: Tensor) -> int:
    """Count what was written to a tensor in place; inference mode's count nothing: 0."""
    return 0 if tensor.is_inference() else tensor._version


def _sources(module: nn.Module) -> Iterator[Source]:
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, tensor in owner.items():
                if tensor is not None:
                    yield Source(owner, name, tensor, tensor.data_ptr(), version(tensor))


class _Styles:
    """The affine maps from one w to the styles of the layers that read it, as one."""

    def __init__(self, convolutions: Sequence[ModulatedConv2d]) -> None:
        affine = [(conv.modulation, conv.scale) for conv in convolutions]
        weights = [map.weight * (scale / map.weight.shape[1] ** 0.5) for map, scale in affine]
        self.weight = torch.cat(weights).T.contiguous()
        self.bias = torch.cat([map.bias * scale for map, scale in affine])

    def __call__(self, w: Tensor) -> Tensor:
        """Map (N, style_dim) to (N, sum of the layers' inputs)."""
        return torch.addmm(self.bias, w, self.weight)


def separated(kernel: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors of a (4, 4) filter, each turned: (4,) by column and (4,) by row; None without any."""
    k = kernel.double().flip(0, 1)
    if k.shape != (4, 4) or not k.sum():
        return None
    column, row = k.sum(1) / k.sum(), k.sum(0)
    same = torch.allclose(torch.outer(column, row), k, rtol=0, atol=1e-6 * float(k.abs().max()))
    return (column, row) if same else None


def blurred(weight: Tensor, column: Tensor) -> Tensor:
    """Blur a transposed convolution with stride 2 by column.

    Its row 2i is W0 x_i + W2 x_(i-1), its row 2i + 1 is W1 x_i. So the blur's rows 2i and 2i + 1
    are sums over x_(i-1), x_i and x_(i+1).

    Args:
        weight: (O, I, 3, 3).
        column: (4,) taps, turned.

    Returns:
        (O, I, 18). For even rows, then for odd ones: the weights that reach even columns (of three
        rows, two each), and those that reach odd ones (of three rows).
    """
    a, b, c, d = column.tolist()
    even, odd = ((0, a, b), (b, c, d), (d, 0, 0)), ((0, 0, a), (a, b, c), (c, d, 0))
    rows = torch.einsum("pyk,oikx->oipyx", weight.new_tensor((even, odd)), weight)
    parts = [part.flatten(2) for r in rows.unbind(2) for part in (r[..., ::2], r[..., 1:2])]
    return torch.cat(parts, dim=2)


class _Layer:
    """A styled convolution: what its epilogue needs.

    The activation's gain is in demodulation, bias and noise, since leaky ReLU is homogeneous.
    """

    def __init__(self, layer: StyledConv) -> None:
        weight = layer.conv.weight[0]
        self.outputs, self.inputs = weight.shape[:2]
        self.up = 2 if layer.conv.upsample else 1
        self.power = (weight.square().sum((2, 3)) / GAIN**2).T.contiguous()
        self.epsilon = torch.tensor(EPSILON / GAIN**2)
        self.bias = layer.activate.bias * GAIN
        self.strength = layer.noise.weight * GAIN

    def gain(self, style: Tensor) -> Tensor:
        """Demodulation (N, O) of styles (N, I)."""
        return torch.addmm(self.epsilon, style.square(), self.power).rsqrt_()

    def noise(self, given: Tensor | None, batch: int, side: int) -> Tensor:
        """Noise for an input of that side; drawn if none is given."""
        shape = batch, 1, self.up * side, self.up * side
        return torch.randn(shape) if given is None else given


class _FloatLayer(_Layer):
    """A styled convolution in float32; the weights are transformed."""

    def __init__(self, layer: StyledConv) -> None:
        super().__init__(layer)
        self.kernel = layer.conv.blur.kernel if layer.conv.upsample else None
        self.weight = torch.ops.stylegan.packed_weights(layer.conv.weight[0], layer.conv.upsample)

    def __call__(
        self, x: Tensor, style: Tensor, noise: Tensor | None, side: int, next_style: Tensor | None,
        *rgb: object,
    ) -> Tensor:  # fmt: skip
        """Map activations (N, I, side, side) to activations, none if `next_style` is None.

        ``rgb`` are maps to add the activations to, their weights (N, 3, O), and three biases.
        """
        noise = self.noise(noise, len(style), side)
        epilogue = self.bias, noise, self.strength, self.gain(style), SLOPE, 1.0
        layer = x, self.weight, self.outputs, style
        if self.kernel is not None:
            return torch.ops.stylegan.packed_up_conv3x3(*layer, self.kernel, *epilogue)
        return torch.ops.stylegan.packed_conv3x3(*layer, *epilogue, *rgb, next_style is None)


class _TileLayer(_Layer):
    """A styled convolution in bfloat16; the weights are in tiles."""

    def __init__(self, layer: StyledConv) -> None:
        super().__init__(layer)
        weight = layer.conv.weight[0]
        self.filter: list[float] = []
        taps, groups = weight.flatten(2), [9]
        if layer.conv.upsample and (factors := separated(layer.conv.blur.kernel)):
            taps, groups = blurred(weight, factors[0]), [6, 3, 6, 3]
            self.filter = factors[1].tolist()
        self.weight = torch.ops.stylegan.tiles_pack(taps, groups)
        self.factor = self.strength.item()

    def __call__(
        self, x: Tensor, style: Tensor, noise: Tensor | None, side: int, next_style: Tensor | None,
        *rgb: object,
    ) -> Tensor:  # fmt: skip
        """Map what is scaled by `style` to what is scaled by `next_style`; None: nothing reads it.

        ``rgb`` are maps to add the activations to, their weights (N, 3, O), and three biases.
        """
        noise = self.noise(noise, len(style), side)
        size = (len(style), self.inputs, side, side)
        return torch.ops.stylegan.tiles_conv3x3(
            x, size, self.weight, self.gain(style), self.bias, noise, self.factor, SLOPE,
            next_style, self.filter, *rgb,
        )  # fmt: skip


class _RGBLayer:
    """A ToRGB: three weights for each activation, added to the upsampled last RGB."""

    def __init__(self, layer: ToRGB) -> None:
        self.weight = layer.conv.weight.view(3, -1)
        self.bias = layer.bias.flatten().tolist()
        self.upsample = layer.upsample if hasattr(layer, "upsample") else None

    def __call__(self, last: Tensor | None, style: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Maps to add to, modulated weights and biases."""
        if last is None or self.upsample is None:
            maps = torch.zeros(len(style), 3, 4, 4)
        else:
            maps = self.upsample(last)
        return maps, self.weight * style[:, None], self.bias


class FloatSynthesis:
    """The synthesis network of a generator with packed weights (see `Generator.prepare`)."""

    precision: torch.dtype | None = None
    layer_type: type[_FloatLayer] | type[_TileLayer] = _FloatLayer

    @staticmethod
    def available() -> bool:
        """Return whether the operators are there, and to be taken."""
        return packing_available()

    @staticmethod
    def fits(convs: Sequence[StyledConv]) -> bool:
        """Return whether the operators can compute these layers."""
        return all(c.conv.blur.kernel.shape == (4, 4) for c in convs if c.conv.upsample)

    @classmethod
    def of(
        cls, constant: ConstantInput, convs: Sequence[StyledConv], rgbs: Sequence[ToRGB]
    ) -> "FloatSynthesis | None":
        """Pack the weights of a synthesis network; None where the operators can not run."""
        parts = (constant, *convs, *rgbs)
        tensors = [source.tensor for part in parts for source in _sources(part)]
        fits = (
            all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
            and all(c.conv.weight.shape[-1] == 3 for c in convs)
            and cls.fits(convs)
            and cls.available()
        )
        with torch.no_grad():
            return cls(constant, convs, rgbs) if fits else None

    def __init__(
        self, constant: ConstantInput, convs: Sequence[StyledConv], rgbs: Sequence[ToRGB]
    ) -> None:
        self.sources = [s for part in (constant, *convs, *rgbs) for s in _sources(part)]
        self.constant = constant.input
        self.layers = [self.layer_type(layer) for layer in convs]
        self.rgb_layers = [_RGBLayer(layer) for layer in rgbs]
        # One w is read by a convolution and, at every other, by the ToRGB of the one before.
        readers = [[layer.conv] for layer in convs] + [[]]
        for i, rgb in enumerate(rgbs):
            readers[2 * i + 1].append(rgb.conv)
        self.styles = [_Styles(convolutions) for convolutions in readers]

    def applies(self, w_plus: Tensor) -> bool:
        """Return whether it may run here: an image or more, no gradient, autocast or tracing."""
        return (
            len(w_plus) > 0
            and not torch.is_grad_enabled()
            and half_type("cpu") is None
            and not torch.compiler.is_compiling()
            and w_plus.dtype == torch.float32
            and self.available()
        )

    def first(self, style: Tensor) -> Tensor:
        """What the first layer reads, for styles (N, C)."""
        return self.constant.expand(len(style), -1, -1, -1)

    def __call__(self, w_plus: Tensor, noise: Sequence[Tensor | None]) -> list[Tensor]:
        """Compute the running RGB sum (N, 3, r, r) of every resolution, for N >= 1.

        Args:
            w_plus: (N, n_latent, style_dim).
            noise: maps as for `Generator.synthesis`; None is drawn afresh.

        Raises:
            StaleError: the generator's parameters have changed.
        """
        if not all(source.unchanged() for source in self.sources):
            raise StaleError("the generator has changed since it was prepared: prepare() it again")
        styles = [style(w) for style, w in zip(self.styles, w_plus.unbind(1), strict=True)]
        x = self.first(styles[0])
        rgbs: list[Tensor] = []
        side = 4
        for i, layer in enumerate(self.layers):
            style, following = styles[i][:, : layer.inputs], styles[i + 1]
            last = i + 1 == len(self.layers)
            rgb: tuple[object, ...] = (None, None, ())
            if i % 2 == 0:
                rgb = self.rgb_layers[i // 2](
                    rgbs[-1] if rgbs else None, following[:, -layer.outputs :]
                )
                rgbs.append(rgb[0])
            x = layer(
                x, style, noise[i], side, None if last else following[:, : layer.outputs], *rgb
            )
            side *= layer.up
        return rgbs


class TileSynthesis(FloatSynthesis):
    """The same in bfloat16. A layer writes its activations times the style of the next one.

    So styles cost no pass over memory.
    """

    precision = torch.bfloat16
    layer_type = _TileLayer

    @staticmethod
    def available() -> bool:
        """Return whether the operators are there, and to be taken."""
        return tiles_available()

    @staticmethod
    def fits(convs: Sequence[StyledConv]) -> bool:
        """Return whether the operators can compute these layers."""
        return all(separated(c.conv.blur.kernel) for c in convs if c.conv.upsample)

    def first(self, style: Tensor) -> Tensor:
        """What the first layer reads, for styles (N, C)."""
        return torch.ops.stylegan.tiles_input(super().first(style), style)
