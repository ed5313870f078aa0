"""Upsample, filter, downsample (StyleGAN2's resampling operator)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.ops.dispatch import Impl, gradient_wanted, use_native


def make_kernel(taps: Sequence[float] = (1, 3, 3, 1), gain: float = 1.0) -> Tensor:
    """Return a 1-D filter's outer product with itself, of sum ``gain``: (K, K) float32."""
    row = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(row, row)
    return kernel * (gain / kernel.sum())


def filtered_size(
    x: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]
) -> tuple[int, int]:
    """Return height and width of a filter operation's result (see `upfirdn2d`).

    Raises:
        ValueError: the filter is larger than the padded input.
    """
    more = sum(pad) - kernel.shape[0]
    height, width = x.shape[2] * up + more, x.shape[3] * up + more
    if height < 0 or width < 0:
        raise ValueError(
            f"upfirdn2d: a {tuple(kernel.shape)} filter does not fit {tuple(x.shape[2:])} values "
            f"upsampled by {up} and padded by {pad}"
        )
    return height // down + 1, width // down + 1


def upfirdn2d(
    x: Tensor,
    kernel: Tensor,
    up: int = 1,
    down: int = 1,
    pad: tuple[int, int] = (0, 0),
    impl: Impl = "auto",
) -> Tensor:
    """Upsample with zeros, pad, convolve with ``kernel`` and keep every ``down``th sample.

    Neither the zeros nor the dropped samples are ever computed. The compiled operator filters by
    columns, then by rows, if the filter is an outer product; the reference runs depth-wise
    convolutions, transposed for upsampling and strided for downsampling. Differentiable twice in x.

    Args:
        x: (N, C, H, W) values.
        kernel: (K, K) filter; a true convolution, so it is applied flipped. Only the reference
            computes a gradient for it, so a filter that needs one is not filtered natively.
        up: upsampling factor, >= 1.
        down: downsampling factor, >= 1.
        pad: zeros (before, after) on both axes after upsampling; negative values crop.
        impl: see `Model.ops`.

    Returns:
        (N, C, (H * up + sum(pad) - K) // down + 1, same for W).
    """
    height, width = filtered_size(x, kernel, up, down, pad)
    if not kernel.requires_grad and use_native("upfirdn2d", impl, x):
        return torch.ops.stylegan.upfirdn2d(x, kernel, up, down, pad[0], height, width, False)
    if not kernel.requires_grad and gradient_wanted(x):
        return _Filter.apply(x, kernel, up, down, pad)
    return _reference(x, kernel, up, down, pad)


class _Filter(torch.autograd.Function):
    """The reference with its gradient: itself, with the filter turned and up and down swapped.

    PyTorch's gradient of a depth-wise convolution is one operator too, but not its second one,
    which runs a convolution for each channel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]
    ) -> Tensor:
        y = _reference(x, kernel, up, down, pad)
        ctx.save_for_backward(kernel)
        ctx.size, before = x.shape[2:], kernel.shape[0] - 1 - pad[0]
        reached = [
            up * (n - 1) + kernel.shape[0] - m * down
            for n, m in zip(ctx.size, y.shape[2:], strict=True)
        ]
        ctx.turned = down, up, (before, max(reached) - before)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (kernel,) = ctx.saved_tensors
        up, down, pad = ctx.turned
        dx = upfirdn2d(gradients[0], kernel.flip((0, 1)), up, down, pad, impl="reference")
        # One side may have had more samples that the last filter did not reach.
        return dx[:, :, : ctx.size[0], : ctx.size[1]], None, None, None, None


def _reference(x: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]) -> Tensor:
    channels, taps = x.shape[1], kernel.shape[0]
    kernel = kernel.to(x.dtype)
    if up == 1:
        if pad[0] != pad[1] or pad[0] < 0:
            x = _pad_or_crop(x, *pad)
            pad = (0, 0)
        weight = kernel.flip((0, 1)).expand(channels, 1, taps, taps)
        return F.conv2d(x, weight, stride=down, padding=pad[0], groups=channels)

    # The transposed convolution yields every sample that any input reaches. Output sample 0 of the
    # definition is its sample `skip`; `excess` more than wanted follow the last one.
    skip = taps - 1 - pad[0]
    excess = taps - up - pad[1]
    crop = min(skip, excess)
    weight = kernel.expand(channels, 1, taps, taps)
    y = F.conv_transpose2d(x, weight, stride=up, padding=max(crop, 0), groups=channels)
    y = _pad_or_crop(y, max(crop, 0) - skip, max(crop, 0) - excess)
    return y[:, :, ::down, ::down] if down > 1 else y


def _pad_or_crop(x: Tensor, before: int, after: int) -> Tensor:
    """Add zeros to both axes, or crop where negative: F.pad, which can not crop its own zeros."""
    if before > 0 or after > 0:
        x = F.pad(x, (max(before, 0), max(after, 0)) * 2)
    if before < 0 or after < 0:
        kept = [slice(max(-before, 0), side - max(-after, 0)) for side in x.shape[2:]]
        x = x[:, :, kept[0], kept[1]]
    return x
