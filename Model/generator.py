"""The StyleGAN2 generator with any width per layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from Model.layers import (
    ConstantInput,
    EqualLinear,
    ModulatedConv2d,
    PixelNorm,
    StyledConv,
    ToRGB,
)
from Model.modulation import FrozenModulation, modulate, plan
from Model.precision import PRECISIONS, half_type, in_float32, inference
from Model.prepared import FloatSynthesis, TileSynthesis

Noise = Sequence[Tensor | None] | Literal["fixed"] | None


def resolution_log2(size: int) -> int:
    """Return the base-2 logarithm of an image side.

    Raises:
        ValueError: the side is not a power of two of at least 8.
    """
    log2 = int(math.log2(size)) if size > 0 else 0
    if 2**log2 != size or size < 8:
        raise ValueError(f"image size must be a power of two of at least 8, not {size}")
    return log2


def pyramid_width(resolution: int, channel_multiplier: int = 2) -> int:
    """Return the full-size networks' width at a resolution: 512 up to 32 px, then halving."""
    return 512 if resolution <= 32 else 16384 * channel_multiplier // resolution


def full_size_channels(size: int, channel_multiplier: int = 2) -> tuple[int, ...]:
    """Return the channels of the full-size generator (see `Generator`)."""
    widths = [pyramid_width(2**i, channel_multiplier) for i in range(2, resolution_log2(size) + 1)]
    return tuple(width for width in widths for _ in range(2))


def truncate(w: Tensor, truncation: float, centre: Tensor | None) -> Tensor:
    """Move w towards a centre: centre + psi * (w - centre) (StyleGAN, appendix B).

    Args:
        w: (N, style_dim) or (N, n_latent, style_dim).
        truncation: psi; 1 leaves w as it is.
        centre: (1, style_dim), required for any other.

    Raises:
        ValueError: truncation without a centre.
    """
    if truncation == 1:
        return w
    if centre is None:
        raise ValueError(
            f"truncation {truncation} needs its centre (truncation_latent), e.g. the mean w of"
            " 4096 z"
        )
    return centre + truncation * (w - centre)


@dataclass(frozen=True)
class Synthesis:
    """What the synthesis network has computed.

    Attributes:
        rgbs: running RGB sum of every resolution, (N, 3, r, r) for r = 4, 8, ..., size.
        features: activations (N, C, h, w) after every styled convolution, in layer order; empty
            unless asked for.
    """

    rgbs: list[Tensor]
    features: list[Tensor]

    @property
    def image(self) -> Tensor:
        """The last RGB sum: (N, 3, size, size), nominally in [-1, 1]."""
        return self.rgbs[-1]


class Generator(nn.Module):
    """StyleGAN2 generator (Karras et al., CVPR 2020): z -> mapping -> w -> synthesis -> image.

    Args:
        size: image side in pixels, a power of two >= 8.
        style_dim: size of z and w.
        n_mlp: layers of the mapping network, >= 1.
        channels: 2 * log2(size) - 2 widths: the constant input, then the outputs of ``conv1``,
            ``convs.0``, ``convs.1``, ... None gives the full-size network.
        channel_multiplier: width factor of the full-size network above 32 px.
        second_kernel: side of the filters of ``convs.1``, ``convs.3``, ..., the convolutions that
            do not upsample: 3, or 1 for a student that is not of the teacher's architecture (Xu et
            al., "Mind the Gap in Distilling StyleGANs", ECCV 2022).

    Attributes:
        n_latent: style inputs, 2 * log2(size) - 2: one per convolution and one for the last ToRGB.
        precision: torch.bfloat16 synthesises in it where no gradient is recorded (fast on CPUs with
            AVX512-BF16 or AMX, the more after `prepare`); styles, demodulation and RGB sums stay in
            float32. None: float32.
    """

    precision: torch.dtype | None = None
    latents: Tensor
    fan_ins: Tensor
    _prepared: FloatSynthesis | None = None
    _frozen: FrozenModulation | None = None

    def __init__(
        self,
        size: int,
        style_dim: int = 512,
        n_mlp: int = 8,
        channels: Sequence[int] | None = None,
        channel_multiplier: int = 2,
        second_kernel: int = 3,
    ) -> None:
        super().__init__()
        log2 = resolution_log2(size)
        self.size, self.style_dim, self.n_mlp = size, style_dim, n_mlp
        self.n_latent = 2 * log2 - 2
        widths = tuple(channels or full_size_channels(size, channel_multiplier))
        if len(widths) != self.n_latent or min(widths) < 1:
            raise ValueError(
                f"a {size} px generator needs {self.n_latent} positive channel counts, got {widths}"
            )
        if second_kernel not in (1, 3):
            raise ValueError(f"second convolutions have filters of 3 or 1, not {second_kernel} px")
        self.second_kernel = second_kernel

        mapping = (
            EqualLinear(style_dim, style_dim, lr_mul=0.01, activation=True) for _ in range(n_mlp)
        )
        self.style = nn.Sequential(PixelNorm(), *mapping)
        self.input = ConstantInput(widths[0])
        self.conv1 = StyledConv(widths[0], widths[1], style_dim)
        self.to_rgb1 = ToRGB(widths[1], style_dim, upsample=False)
        self.convs = nn.ModuleList(
            StyledConv(
                widths[i + 1],
                widths[i + 2],
                style_dim,
                upsample=i % 2 == 0,
                kernel_size=second_kernel if i % 2 else 3,
            )
            for i in range(self.n_latent - 2)
        )
        self.to_rgbs = nn.ModuleList(ToRGB(width, style_dim) for width in widths[3::2])
        self.noises = nn.Module()
        for name, values in zip(("latents", "fan_ins"), plan(*self._modulated), strict=True):
            self.register_buffer(name, values, persistent=False)
        for i, noise in enumerate(self.make_noise()):
            self.noises.register_buffer(f"noise_{i}", noise)

    @property
    def styled_convs(self) -> list[StyledConv]:
        """All styled convolutions in order: ``conv1``, ``convs.0``, ..."""
        return [self.conv1, *self.convs]

    @property
    def rgb_layers(self) -> list[ToRGB]:
        """The ToRGB of every resolution: ``to_rgb1``, ``to_rgbs.0``, ..."""
        return [self.to_rgb1, *self.to_rgbs]

    @property
    def _modulated(self) -> tuple[list[ModulatedConv2d], list[ModulatedConv2d]]:
        """The convolutions of `styled_convs` and of `rgb_layers`."""
        return [layer.conv for layer in self.styled_convs], [to.conv for to in self.rgb_layers]

    def backward_order(self) -> list[nn.Parameter]:
        """All parameters, those first whose gradients a backward pass completes first."""
        modules: list[nn.Module] = [self.style, self.input, self.conv1, self.to_rgb1]
        for i, rgb in enumerate(self.to_rgbs):
            modules += [*self.convs[2 * i : 2 * i + 2], rgb]
        return [p for module in modules for p in module.parameters()][::-1]

    @property
    def channels(self) -> tuple[int, ...]:
        """Widths of the constant input and of every styled convolution's output."""
        outputs = [layer.conv.weight.shape[1] for layer in self.styled_convs]
        return (self.input.input.shape[1], *outputs)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.input.input.device

    @property
    def fixed_noise(self) -> list[Tensor]:
        """The stored noise maps, (1, 1, h, w) each, in layer order."""
        return [getattr(self.noises, f"noise_{i}") for i in range(self.n_latent - 1)]

    def like(self, channels: Sequence[int], second_kernel: int | None = None) -> "Generator":
        """Make a generator with random weights that differs in its widths, or its filters, alone.

        Args:
            channels: see the class.
            second_kernel: see the class; None takes this generator's.
        """
        kernel = self.second_kernel if second_kernel is None else second_kernel
        return Generator(self.size, self.style_dim, self.n_mlp, channels, second_kernel=kernel)

    def make_noise(self, n: int = 1) -> list[Tensor]:
        """Draw (n, 1, h, w) standard normal noise maps, one list entry per styled convolution."""
        device = self.device
        sides = [4] + [2 ** (3 + i // 2) for i in range(self.n_latent - 2)]
        return [torch.randn(n, 1, side, side, device=device) for side in sides]

    def prepare(self, precision: torch.dtype | str | None = torch.bfloat16) -> "Generator":
        """Choose the precision of inference and do once what every image needs again.

        On a CPU, weights are packed: in float32 for minimal filtering, which takes four times their
        memory for the 3x3 layers that keep the size; in bfloat16 for the tiles of AMX, where there
        are any. From then on, synthesis raises `Model.prepared.StaleError` if parameters have
        changed. Copies are not prepared.

        Args:
            precision: "float32" or torch.float32, "bf16" or torch.bfloat16; None is float32 without
                packing.

        Returns:
            This generator.
        """
        dtype = PRECISIONS[precision] if isinstance(precision, str) else precision
        self.precision, self._prepared = None if dtype == torch.float32 else dtype, None
        ways = {torch.float32: FloatSynthesis, torch.bfloat16: TileSynthesis}
        if dtype in ways:
            self._prepared = ways[dtype].of(self.input, self.styled_convs, self.rgb_layers)
        return self

    def freeze(self) -> "Generator":
        """Keep what no latent changes where no gradient is recorded; for a network at rest.

        Takes some memory, a ninth of the convolutions' weights and as much as the styles' layers.
        Copies are not frozen.

        Returns:
            This generator.
        """
        self._frozen = FrozenModulation(*self._modulated)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None, "_frozen": None}

    @in_float32
    def mapping(self, z: Tensor) -> Tensor:
        """Map latents z (N, style_dim) to w (N, style_dim)."""
        return self.style(z)

    def w_plus(
        self,
        styles: Sequence[Tensor],
        *,
        inject_index: int | None = None,
        truncation: float = 1.0,
        truncation_latent: Tensor | None = None,
        input_is_latent: bool = False,
    ) -> Tensor:
        """Map latents to one w per layer.

        Args:
            styles: one or two z (N, style_dim), the second from layer ``inject_index`` on (style
                mixing: StyleGAN, section 3.1); with ``input_is_latent`` w instead of z, or one w+
                (N, n_latent, style_dim).
            inject_index: layer where the second style takes over, in [0, n_latent]; None draws it,
                so that each has a layer at least.
            truncation: psi; see `truncate`.
            truncation_latent: (1, style_dim), the centre of truncation, required unless psi is 1.
            input_is_latent: styles are already mapped.

        Returns:
            w+ (N, n_latent, style_dim).

        Raises:
            ValueError: no style or more than two, a w+ beside another, a layer that is none, or
                truncation without a centre.
        """
        latents = list(styles)
        if not input_is_latent and latents:  # in one pass
            numbers = [len(z) for z in latents]
            latents = list(self.mapping(torch.cat(latents)).split(numbers))
        latents = [truncate(w, truncation, truncation_latent) for w in latents]
        if len(latents) == 1:
            w = latents[0]
            return w if w.ndim == 3 else w[:, None].expand(-1, self.n_latent, -1)
        if len(latents) != 2:
            raise ValueError(f"expected one or two latents, got {len(latents)}")
        if any(w.ndim != 2 for w in latents):
            raise ValueError("two styles are z or w, (N, style_dim) each")
        if inject_index is None:  # style mixing
            inject_index = int(torch.randint(1, self.n_latent, ()))
        elif not 0 <= inject_index <= self.n_latent:
            raise ValueError(f"inject_index {inject_index} is not in 0 to {self.n_latent}")
        first = latents[0][:, None].expand(-1, inject_index, -1)
        second = latents[1][:, None].expand(-1, self.n_latent - inject_index, -1)
        return torch.cat([first, second], dim=1)

    def synthesis(
        self, w_plus: Tensor, noise: Noise = None, *, features: bool = False
    ) -> Synthesis:
        """Synthesise images (StyleGAN2, figure 7b: every resolution adds to the RGB sum).

        Args:
            w_plus: (N, n_latent, style_dim), one latent per layer.
            noise: None draws fresh layer noise, "fixed" takes the stored maps, a list gives
                n_latent - 1 maps (1 or N, 1, h, w), None entries drawn afresh.
            features: keep the activations.

        Raises:
            ValueError: not one w per layer, or not one noise map per styled convolution.
            StaleError: parameters have changed since `prepare`.
        """
        if w_plus.shape[1:] != (self.n_latent, self.style_dim):
            expected = f"(N, {self.n_latent}, {self.style_dim})"
            raise ValueError(f"expected w+ {expected}, got {tuple(w_plus.shape)}")
        if noise is None:
            noise = [None] * (self.n_latent - 1)
        maps = self.fixed_noise if noise == "fixed" else list(noise)
        if len(maps) != self.n_latent - 1:
            raise ValueError(f"expected {self.n_latent - 1} noise maps, got {len(maps)}")

        prepared = None if features else self._prepared
        if prepared and prepared.precision == self.precision and prepared.applies(w_plus):
            return Synthesis(prepared(w_plus, maps), [])
        with inference(self.device, self.precision):
            return self._synthesise(w_plus, maps, features)

    def _synthesise(
        self, w_plus: Tensor, maps: Sequence[Tensor | None], features: bool
    ) -> Synthesis:
        # By shape, since len() would make the batch size a constant of an exported graph.
        x, rgb = self.input(w_plus.shape[0]), None
        rgbs, kept, rgb_layers = [], [], iter(self.rgb_layers)
        factors, rgb_weights = self._modulation(w_plus)
        # Where all is known that a layer computes from its w, none looks at it.
        known = factors[0] is not None
        w = [w_plus] * self.n_latent if known else w_plus.unbind(1)
        for layer, conv in enumerate(self.styled_convs):
            x = conv(x, w[layer], maps[layer], factors[layer])
            if features:
                kept.append(x)
            if layer % 2 == 0:  # the last convolution of a resolution
                rgb = next(rgb_layers)(x, w[layer + 1], rgb, rgb_weights[layer // 2])
                rgbs.append(rgb)
        return Synthesis(rgbs, kept)

    def _modulation(self, w_plus: Tensor) -> tuple[Sequence[Any], Sequence[Any]]:
        """Compute what w+ sets in styled convolutions and RGBs; None leaves it to the layer.

        A compiler fuses the layers' own operators, float16 has its own way, and `modulate` takes
        filters of one size.
        """
        half = half_type(w_plus.device.type) == torch.float16
        if torch.compiler.is_compiling() or half or self.second_kernel != 3:
            return [None] * len(self.styled_convs), [None] * len(self.rgb_layers)
        if self._frozen and not torch.is_grad_enabled():
            return self._frozen(w_plus, self.latents, self.fan_ins)
        return modulate(w_plus, *self._modulated, self.latents, self.fan_ins)

    def forward(
        self,
        styles: Sequence[Tensor],
        *,
        inject_index: int | None = None,
        truncation: float = 1.0,
        truncation_latent: Tensor | None = None,
        input_is_latent: bool = False,
        noise: Sequence[Tensor | None] | None = None,
        randomize_noise: bool = True,
    ) -> Tensor:
        """Generate images from latents.

        The latents are those of `w_plus`, with its arguments. Without explicit ``noise`` (a list as
        in `synthesis`), ``randomize_noise`` draws it, and False takes the stored maps.

        Returns:
            (N, 3, size, size), nominally in [-1, 1].
        """
        w_plus = self.w_plus(
            styles,
            inject_index=inject_index,
            truncation=truncation,
            truncation_latent=truncation_latent,
            input_is_latent=input_is_latent,
        )
        fixed = noise is None and not randomize_noise
        return self.synthesis(w_plus, "fixed" if fixed else noise).image
