"""The StyleGAN2 generator with any width per layer."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from Model.layers import ConstantInput, EqualLinear, PixelNorm, StyledConv, ToRGB
from Model.precision import in_float32

Noise = Sequence[Tensor | None] | Literal["fixed"] | None


def resolution_log2(size: int) -> int:
    """Base-2 logarithm of an image side.

    Raises:
        ValueError: the side is not a power of two of at least 8.
    """
    log2 = int(math.log2(size)) if size > 0 else 0
    if 2**log2 != size or size < 8:
        raise ValueError(f"image size must be a power of two of at least 8, not {size}")
    return log2


def pyramid_width(resolution: int, channel_multiplier: int = 2) -> int:
    """Width of StyleGAN2's full-size networks at a resolution: 512 up to 32 px, then halving."""
    return 512 if resolution <= 32 else 16384 * channel_multiplier // resolution


def full_size_channels(size: int, channel_multiplier: int = 2) -> tuple[int, ...]:
    """Channel tuple of the full-size generator (see `Generator`)."""
    widths = [pyramid_width(2**i, channel_multiplier) for i in range(2, resolution_log2(size) + 1)]
    return tuple(width for width in widths for _ in range(2))


class Generator(nn.Module):
    """StyleGAN2 generator: z -> mapping -> w -> synthesis -> image.

    Args:
        size: image side in pixels, a power of two >= 8.
        style_dim: size of z and w.
        n_mlp: layers of the mapping network, >= 1.
        channels: 2 * log2(size) - 2 widths: the constant input, then the outputs of ``conv1``,
            ``convs.0``, ``convs.1``, ... None gives the full-size network.
        channel_multiplier: width factor of the full-size network above 32 px.

    Attributes:
        n_latent: style inputs, 2 * log2(size) - 2: one per convolution and one for the last ToRGB.
    """

    def __init__(
        self,
        size: int,
        style_dim: int = 512,
        n_mlp: int = 8,
        channels: Sequence[int] | None = None,
        channel_multiplier: int = 2,
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

        mapping = (
            EqualLinear(style_dim, style_dim, lr_mul=0.01, activation=True) for _ in range(n_mlp)
        )
        self.style = nn.Sequential(PixelNorm(), *mapping)
        self.input = ConstantInput(widths[0])
        self.conv1 = StyledConv(widths[0], widths[1], style_dim)
        self.to_rgb1 = ToRGB(widths[1], style_dim, upsample=False)
        self.convs = nn.ModuleList(
            StyledConv(widths[i + 1], widths[i + 2], style_dim, upsample=i % 2 == 0)
            for i in range(self.n_latent - 2)
        )
        self.to_rgbs = nn.ModuleList(ToRGB(width, style_dim) for width in widths[3::2])
        self.noises = nn.Module()
        for i, noise in enumerate(self.make_noise()):
            self.noises.register_buffer(f"noise_{i}", noise)

    @property
    def styled_convs(self) -> list[StyledConv]:
        """All styled convolutions in order: ``conv1``, ``convs.0``, ..."""
        return [self.conv1, *self.convs]

    @property
    def channels(self) -> tuple[int, ...]:
        """Widths of the constant input and of every styled convolution's output."""
        outputs = [layer.conv.weight.shape[1] for layer in self.styled_convs]
        return (self.input.input.shape[1], *outputs)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.input.input.device

    @property
    def fixed_noise(self) -> list[Tensor]:
        """The stored noise maps, (1, 1, h, w) each, in layer order."""
        return [getattr(self.noises, f"noise_{i}") for i in range(self.n_latent - 1)]

    def make_noise(self, n: int = 1) -> list[Tensor]:
        """Draw (n, 1, h, w) standard normal noise maps, one list entry per styled convolution."""
        device = self.device
        sides = [4] + [2 ** (3 + i // 2) for i in range(self.n_latent - 2)]
        return [torch.randn(n, 1, side, side, device=device) for side in sides]

    @in_float32
    def mapping(self, z: Tensor) -> Tensor:
        """Map latents z (N, style_dim) to w (N, style_dim)."""
        return self.style(z)

    @torch.no_grad()
    def mean_latent(self, n: int) -> Tensor:
        """Mean w of ``n`` random z, (1, style_dim): the centre of truncation."""
        z = torch.randn(n, self.style_dim, device=self.device)
        return self.mapping(z).mean(dim=0, keepdim=True)

    def synthesis(
        self, w_plus: Tensor, noise: Noise = None, return_rgbs: bool = False
    ) -> Tensor | list[Tensor]:
        """Synthesise images.

        Args:
            w_plus: (N, n_latent, style_dim), one latent per layer.
            noise: None draws fresh layer noise, "fixed" takes the stored maps, a list gives
                n_latent - 1 maps (1 or N, 1, h, w), None entries drawn afresh.
            return_rgbs: return every resolution's running RGB sum instead of the last.

        Returns:
            (N, 3, size, size), nominally in [-1, 1]; or the list of (N, 3, r, r), r = 4, ..., size.
        """
        maps: Sequence[Tensor | None]
        if noise is None:
            maps = [None] * (self.n_latent - 1)
        else:
            maps = self.fixed_noise if noise == "fixed" else list(noise)
        if len(maps) != self.n_latent - 1:
            raise ValueError(f"expected {self.n_latent - 1} noise maps, got {len(maps)}")

        x = self.conv1(self.input(w_plus.shape[0]), w_plus[:, 0], maps[0])
        rgbs = [self.to_rgb1(x, w_plus[:, 1])]
        for i, to_rgb in enumerate(self.to_rgbs):
            layer = 2 * i + 1
            x = self.convs[2 * i](x, w_plus[:, layer], maps[layer])
            x = self.convs[2 * i + 1](x, w_plus[:, layer + 1], maps[layer + 1])
            rgbs.append(to_rgb(x, w_plus[:, layer + 2], rgbs[-1]))
        return rgbs if return_rgbs else rgbs[-1]

    def broadcast_latents(
        self, latents: Sequence[Tensor], inject_index: int | None = None
    ) -> Tensor:
        """Repeat one w over all layers, or mix two at a layer (style mixing).

        Args:
            latents: one or two (N, style_dim), or a single (N, n_latent, style_dim), kept as it is.
            inject_index: first layer of the second latent, in [1, n_latent - 1]; None draws it.

        Returns:
            w+ (N, n_latent, style_dim).
        """
        if len(latents) == 1:
            w = latents[0]
            return w if w.ndim == 3 else w[:, None].expand(-1, self.n_latent, -1)
        if len(latents) != 2:
            raise ValueError(f"expected one or two latents, got {len(latents)}")
        if inject_index is None:
            inject_index = int(torch.randint(1, self.n_latent, ()))
        first = latents[0][:, None].expand(-1, inject_index, -1)
        second = latents[1][:, None].expand(-1, self.n_latent - inject_index, -1)
        return torch.cat([first, second], dim=1)

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
        return_rgbs: bool = False,
    ) -> Tensor | list[Tensor]:
        """Generate images from latents.

        Args:
            styles: one or two z (N, style_dim), the second from layer ``inject_index`` on; with
                ``input_is_latent`` w instead of z, or one w+ (N, n_latent, style_dim).
            inject_index: layer where the second style takes over; None draws it.
            truncation: psi; below 1 moves w towards ``truncation_latent``, which is then required.
            truncation_latent: (1, style_dim), usually ``mean_latent(4096)``.
            input_is_latent: styles are already mapped.
            noise: explicit layer noise; overrides ``randomize_noise``.
            randomize_noise: draw layer noise; False takes the stored maps.
            return_rgbs: return every resolution's running RGB sum.

        Returns:
            See `synthesis`.
        """
        latents = list(styles) if input_is_latent else [self.mapping(z) for z in styles]
        if truncation < 1:
            if truncation_latent is None:
                raise ValueError(
                    "truncation below 1 needs truncation_latent, e.g. mean_latent(4096)"
                )
            latents = [truncation_latent + truncation * (w - truncation_latent) for w in latents]
        w_plus = self.broadcast_latents(latents, inject_index)
        maps: Noise = noise
        if noise is None and not randomize_noise:
            maps = "fixed"
        return self.synthesis(w_plus, maps, return_rgbs)
