"""The distance of LPIPS, of the feature maps that a network makes of two batches of pictures."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from Model.ops.dispatch import Impl, use_native

EPSILON = 1e-10
"""Added to a feature vector's length before it is divided by it."""


def feature_distance(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Sum over layers of the mean over positions of  sum_c w_c (u_c - v_c)^2.

    u = a / (|a| + 1e-10) by position, and v likewise of b (Zhang et al., CVPR 2018, eq. 1). In the
    gradient the small number counts in the divisor alone. Differentiable once.

    Args:
        a: maps (N, C, H, W) of each layer.
        b: maps of the same shapes.
        weights: (1, C, 1, 1) of each layer, without a gradient; None stands for 1.
        impl: see `Model.ops`; native for float32 and float64 on a CPU, where it reads the maps and
            writes nothing but the result.

    Returns:
        (N,), >= 0.

    Raises:
        ValueError: the shapes of both sides differ, or a layer has no values.
    """
    weights = weights or ()
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not x.numel():
            raise ValueError(f"feature_distance: maps of {tuple(x.shape)} and {tuple(y.shape)}")
    native = _pays(impl, a[0]) and use_native("feature_distance", impl, a[0], *a, *b, *weights)
    function = _Compiled if native else _OnLists
    return function.apply(len(a), *weights, *a, *b)


def _pays(impl: Impl, x: Tensor) -> bool:
    return impl == "native" or (
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    )


class _Compiled(torch.autograd.Function):
    """By the compiled operator, layer by layer."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors)
        operator = torch.ops.stylegan.feature_distance
        found = [operator(a, b, weight, EPSILON) for a, b, weight in _layers(count, tensors)]
        return torch.stack(found).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, operator = ctx.count, torch.ops.stylegan.feature_distance_backward
        wanted = any(ctx.needs_input_grad[-2 * count : -count]), any(ctx.needs_input_grad[-count:])
        found = [
            operator(grads[0], a, b, weight, EPSILON, *wanted)
            for a, b, weight in _layers(count, ctx.saved_tensors)
        ]
        by_side = zip(wanted, zip(*found, strict=True), strict=True)
        maps = [x if wants else None for wants, gradients in by_side for x in gradients]
        return (*[None] * (len(ctx.needs_input_grad) - len(maps)), *maps)


def _layers(count: int, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Both sides' maps and the weights of every layer, of what `feature_distance` applies to."""
    weights: Sequence[Tensor | None] = tensors[: -2 * count] or [None] * count
    return list(zip(tensors[-2 * count : -count], tensors[-count:], weights, strict=True))


class _OnLists(torch.autograd.Function):
    """By PyTorch's operators on lists, which for 5 layers are a third of those of a loop."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        weights, maps = tensors[: -2 * count], tensors[-2 * count :]
        norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in maps]
        torch._foreach_add_(norms, EPSILON)
        units = torch._foreach_div(maps, norms)
        differences = units[:count]
        torch._foreach_sub_(differences, units[count:])
        squares = torch._foreach_mul(differences, differences)
        if weights:
            sums = [F.conv2d(x, w) for x, w in zip(squares, weights, strict=True)]
        else:
            sums = [x.sum(1, keepdim=True) for x in squares]
        ctx.count = count
        ctx.save_for_backward(*tensors)
        ctx.norms, ctx.differences = norms, differences
        return torch.stack([x.mean((1, 2, 3)) for x in sums]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, grad = ctx.count, grads[0].view(-1, 1, 1, 1)
        weights, maps = ctx.saved_tensors[: -2 * count], ctx.saved_tensors[-2 * count :]
        # With D = 2 w (u - v) / positions, dL/da = (D - u (u D)) / m, m what a is divided by.
        shares = [2 / (x.shape[2] * x.shape[3]) for x in maps[:count]]
        factors = torch._foreach_mul(weights, shares) if weights else shares
        along = torch._foreach_mul(ctx.differences, factors)
        torch._foreach_mul_(along, [grad] * count)
        found: list[Tensor | None] = []
        for side in range(2):
            half = slice(side * count, (side + 1) * count)
            if not any(ctx.needs_input_grad[-2 * count :][half]):
                found += [None] * count
                continue
            signed = torch._foreach_neg(along) if side else along
            found += _through_norm(signed, maps[half], ctx.norms[half])
        return (None, *[None] * len(weights), *found)


def _through_norm(
    grads: tuple[Tensor, ...], maps: tuple[Tensor, ...], norms: list[Tensor]
) -> list[Tensor]:
    """Follow gradients by u = x / |x| back to x: (g - u (u g)) / |x|."""
    units = torch._foreach_div(maps, norms)
    products = [p.sum(dim=1, keepdim=True) for p in torch._foreach_mul(units, grads)]
    torch._foreach_mul_(units, products)
    found = torch._foreach_sub(grads, units)
    torch._foreach_div_(found, norms)
    return list(found)
