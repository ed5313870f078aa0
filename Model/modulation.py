"""What the latents set in all layers of a synthesis network, computed for all of them at once.

    styles         s = (A w / sqrt(S) + b) / sqrt(fan in)        StyleGAN2, eq. 1
    demodulation   g = (sum over i and taps (s_i W_oi)^2 + 1e-8)^-1/2        eq. 3
    RGB weights    V = s W

Layer by layer (`Model.layers.ModulatedConv2d` and `ToRGB`) these are a dozen small operators each,
and more in their derivatives. On a GPU with few images, launching those takes longer than all that
they compute. The derivatives here are operators on lists, and can be derived again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from Model.layers import EPSILON, ModulatedConv2d
from Model.precision import in_float32
from Model.prepared import version


def plan(
    convs: Sequence[ModulatedConv2d], rgbs: Sequence[ModulatedConv2d]
) -> tuple[Tensor, Tensor]:
    """List what does not change from call to call, for every input channel of every layer.

    Args:
        convs: all styled convolutions in order; convolution l takes the l-th w.
        rgbs: all layers that make RGB; the k-th takes w 2 k + 1.

    Returns:
        The index of the w that sets the channel's style, and the layer's fan-in.
    """
    taken = [*range(len(convs)), *range(1, len(convs) + 1, 2)]
    latents: list[int] = []
    fan_ins: list[float] = []
    for latent, layer in zip(taken, (*convs, *rgbs), strict=True):
        width = layer.weight.shape[2]
        latents += [latent] * width
        fan_ins += [layer.weight[0, 0].numel()] * width
    return torch.tensor(latents), torch.tensor(fan_ins, dtype=torch.float32)


@in_float32
def modulate(
    w_plus: Tensor,
    convs: Sequence[ModulatedConv2d],
    rgbs: Sequence[ModulatedConv2d],
    latents: Tensor,
    fan_ins: Tensor,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
    """Compute `ModulatedConv2d.factors` of all styled convolutions, and the weights of all RGBs.

    Args:
        w_plus: (N, n_latent, style_dim).
        convs: see `plan`.
        rgbs: see `plan`.
        latents: from `plan`.
        fan_ins: from `plan`.

    Returns:
        Weight (O, I, k, k), style (N, I) and demodulation (N, O) of each convolution; modulated
        weight (N, 3, I) of each RGB.
    """
    layers = [layer.modulation for layer in (*convs, *rgbs)]
    weight = _Joined.apply(0, *[layer.weight for layer in layers])
    bias = _Joined.apply(0, *[layer.bias for layer in layers])
    styles = _styles(w_plus, weight, bias, latents, fan_ins)
    widths = [conv.weight.shape[2] for conv in convs]
    of_convs, of_rgbs = styles.split([sum(widths), styles.shape[1] - sum(widths)], 1)
    found = _Demodulation.apply(of_convs, *[conv.weight for conv in convs])
    gains, weights = found[: len(convs)], found[len(convs) :]
    factors = list(zip(weights, of_convs.split(widths, 1), gains, strict=True))
    rows = _rows(rgbs) * of_rgbs.unsqueeze(1)
    return factors, rows.split([rgb.weight.shape[2] for rgb in rgbs], 2)


def _styles(
    w_plus: Tensor, weight: Tensor, bias: Tensor, latents: Tensor, fan_ins: Tensor
) -> Tensor:
    """Styles of all layers, (N, inputs of all layers), by their joined affine maps."""
    # Of these, each channel's product with its own w is wanted. The others are some thousandths of
    # what a network of 256 px computes.
    products = F.linear(w_plus, weight)
    own = products.gather(1, latents.expand(w_plus.shape[0], 1, -1)).squeeze(1)
    return torch.add(bias, own, alpha=1 / math.sqrt(weight.shape[1])) * fan_ins.rsqrt()


def _rows(rgbs: Sequence[ModulatedConv2d]) -> Tensor:
    """Join the RGBs' weights: (1, 3, inputs of all)."""
    return _Joined.apply(2, *[rgb.weight for rgb in rgbs]).view(1, 3, -1)


class FrozenModulation:
    """`modulate` of a network that is not trained: what no latent changes is computed once.

    That are the joined weights, and the weights' squares summed over the taps. Where a parameter
    was written to, moved or replaced, they are computed again. Records no gradient of parameters.

    Args:
        convs: see `plan`.
        rgbs: see `plan`.
    """

    def __init__(self, convs: Sequence[ModulatedConv2d], rgbs: Sequence[ModulatedConv2d]) -> None:
        self._convs, self._rgbs = convs, rgbs
        self._marks: list[tuple[int, int]] = []

    @torch.no_grad()
    def _refresh(self) -> None:
        convs, layers = self._convs, (*self._convs, *self._rgbs)
        read = [p for layer in layers for p in layer.parameters()]
        marks = [(p.data_ptr(), version(p)) for p in read]
        if marks == self._marks:
            return
        self._marks = marks
        self._weight = torch.cat([layer.modulation.weight for layer in layers])
        self._bias = torch.cat([layer.modulation.bias for layer in layers])
        self._weights = [conv.weight.squeeze(0) for conv in convs]
        self._powers = [weight.square().sum((2, 3)).t().contiguous() for weight in self._weights]
        self._row = _rows(self._rgbs)
        self._rgb_widths = [rgb.weight.shape[2] for rgb in self._rgbs]
        self._widths = [*[conv.weight.shape[2] for conv in convs], sum(self._rgb_widths)]

    @in_float32
    def _compute(
        self, w_plus: Tensor, latents: Tensor, fan_ins: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
        styles = _styles(w_plus, self._weight, self._bias, latents, fan_ins)
        squares = styles.square().split(self._widths, 1)
        sums = [s @ power for s, power in zip(squares[:-1], self._powers, strict=True)]
        gains = torch._foreach_rsqrt(torch._foreach_add(sums, EPSILON))
        *of_convs, of_rgbs = styles.split(self._widths, 1)
        factors = list(zip(self._weights, of_convs, gains, strict=True))
        rows = self._row * of_rgbs.unsqueeze(1)
        return factors, rows.split(self._rgb_widths, 2)

    def __call__(
        self, w_plus: Tensor, latents: Tensor, fan_ins: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
        """Compute what `modulate` does."""
        self._refresh()
        return self._compute(w_plus, latents, fan_ins)


class _Joined(torch.autograd.Function):
    """torch.cat, with a derivative that is one operator."""

    @staticmethod
    def forward(ctx: Any, dim: int, *tensors: Tensor) -> Tensor:
        ctx.lengths, ctx.dim = [tensor.shape[dim] for tensor in tensors], dim
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *grads[0].split(ctx.lengths, ctx.dim))


def _taps(weights: Sequence[Tensor]) -> int:
    return weights[0].shape[3] * weights[0].shape[4]


def _by_tap(rows: Tensor, taps: int) -> Tensor:
    """Repeat each column for all taps of its weights: (N, I) -> (N, I * taps)."""
    return rows.unsqueeze(2).expand(-1, -1, taps).flatten(1)


def _columns(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights (1, O, I, k, k) as matrices (I * k * k, O), by one view each."""
    found = []
    for weight in weights:
        outputs = weight.shape[1]
        inputs = weight.numel() // outputs
        found.append(weight.contiguous().as_strided((inputs, outputs), (1, inputs)))
    return found


def _split(joined: Tensor, weights: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Divide what is joined over all layers' inputs and taps."""
    return joined.split([w.shape[2] * w.shape[3] * w.shape[4] for w in weights], dim)


def _by_output(joined: Tensor, weights: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Divide what is joined over all layers' outputs."""
    return joined.split([w.shape[1] for w in weights], dim)


class _Kept(NamedTuple):
    """What the derivatives of `_Demodulation` take from it, tensors that it has made itself.

    Attributes:
        sums: the q (N, O) of every layer.
        columns: see `_columns`; views of the parameters.
        rows: S by tap, (N, I * k * k) of every layer.
    """

    sums: list[Tensor]
    columns: list[Tensor]
    rows: tuple[Tensor, ...]


class _Demodulation(torch.autograd.Function):
    """g = q^-1/2 with q = S P^T + epsilon, the squares S of the styles and P of the weights.

    Returns the g (N, O) of every layer, and their weights W as (O, I, k, k).
    """

    @staticmethod
    def forward(ctx: Any, styles: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        columns = _columns(weights)
        rows = _split(_by_tap(styles.square(), _taps(weights)), weights, 1)
        powers = torch._foreach_mul(columns, columns)
        sums = [row @ power for row, power in zip(rows, powers, strict=True)]
        torch._foreach_add_(sums, EPSILON)
        ctx.save_for_backward(styles, *weights)
        ctx.kept = _Kept(sums, columns, rows)
        return (*torch._foreach_rsqrt(sums), *[weight.squeeze(0) for weight in weights])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        styles, *weights = ctx.saved_tensors
        of_gains, of_weights = grads[: len(weights)], grads[len(weights) :]
        if all(grad is None for grad in of_gains):
            return (None, *(g if g is None else g.unsqueeze(0) for g in of_weights))
        pairs = zip(of_gains, ctx.kept.sums, strict=True)
        filled = [torch.zeros_like(q) if grad is None else grad for grad, q in pairs]
        needed = any(ctx.needs_input_grad[1:])
        return _DemodulationBackward.apply(ctx.kept, needed, styles, *weights, *filled, *of_weights)


class _DemodulationBackward(torch.autograd.Function):
    """The derivative of `_Demodulation`, of dL/dg and dL/dW.

    With h = -g^3 dL/dg, half of which is dL/dq:  ds = s (h P) summed over the taps,
    dW = dL/dW + W (h^T S).
    """

    @staticmethod
    def forward(
        ctx: Any, kept: _Kept, needed: bool, styles: Tensor, *others: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.kept = kept
        ctx.save_for_backward(styles, *others)
        count = len(kept.sums)
        weights, of_gains, of_weights = others[:count], others[count : 2 * count], others[-count:]
        slopes = _slopes(torch.cat(kept.sums, 1), torch.cat(of_gains, 1))
        turned = _by_output(slopes.t(), weights, 0)
        of_styles = _times_powers(turned, kept.columns, _taps(weights)).mul_(styles)
        if not needed:
            return (of_styles, *[None] * count)
        products = [h @ row for h, row in zip(turned, kept.rows, strict=True)]
        return (of_styles, *_of_weights(products, weights, of_weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Derive again, with a = dL/d(ds), b = a s, T = b P^T and r = 3/2 g^5 (dL/dg) T.

        dL/d(dL/dg) = -g^3 T,  dL/ds = a (h P) + 2 s (r P),  dL/dW = 2 W (h^T b + r^T S)
        """
        (kept_sums, columns, _), needed = ctx.kept, any(ctx.needs_input_grad[3:])
        count, (styles, *others) = len(columns), ctx.saved_tensors
        weights, of_gains = others[:count], others[count : 2 * count]
        a, *of_products = grads
        if a is None or any(grad is not None for grad in of_products):
            return (None, None, *_derived_again(ctx.saved_tensors, grads))
        sums, along = torch.cat(kept_sums, 1), torch.cat(of_gains, 1)
        taps, rows = _taps(weights), a * styles
        powers = torch._foreach_mul(columns, columns)
        parts = _split(_by_tap(rows, taps), weights, 1)
        reached = torch.cat([part @ power for part, power in zip(parts, powers, strict=True)], 1)
        of_along = _slopes(sums, reached)
        both = torch.cat([_slopes(sums, along), -1.5 * of_along * along / sums])
        turned = _by_output(both.t(), weights, 0)
        first, second = _times_powers(turned, columns, taps).chunk(2)
        of_styles = torch.addcmul(a * first, styles, second, value=2)
        found: list[Tensor | None] = [None] * count
        if needed:
            twice = _split(_by_tap(torch.cat([rows, styles.square()]) * 2, taps), weights, 1)
            products = [t @ row for t, row in zip(turned, twice, strict=True)]
            found = [*_of_weights(products, weights, [None] * count)]
        of_grads = _by_output(of_along, weights, 1)
        return (None, None, of_styles, *found, *of_grads, *[None] * count)


def _derived_again(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Derivatives of `_DemodulationBackward` in all that it takes, by PyTorch's own.

    Slow, for derivatives that no training asks for.
    """
    with torch.enable_grad():
        parts: list[Any] = [None if t is None else t.detach().requires_grad_() for t in saved]
        styles, *others = parts
        count = len(others) // 3
        weights, of_gains, of_weights = (others[i * count : (i + 1) * count] for i in range(3))
        powers = [w.square().sum((0, 3, 4)) for w in weights]
        rows = styles.square().split([power.shape[1] for power in powers], 1)
        sums = [row @ power.t() for row, power in zip(rows, powers, strict=True)]
        gains = [torch.rsqrt(q + EPSILON) for q in sums]
        found = torch.autograd.grad(gains, [styles, *weights], of_gains, create_graph=True)
        own = [w if w is None else w.unsqueeze(0) for w in of_weights]
        made = [found[0], *(f if w is None else f + w for f, w in zip(found[1:], own, strict=True))]
        wanted = [(y, g) for y, g in zip(made, grads, strict=True) if g is not None]
        everything = [t for t in (styles, *others) if t is not None]
        again = iter(
            torch.autograd.grad(
                [y for y, _ in wanted], everything, [g for _, g in wanted], allow_unused=True
            )
        )
    return [None if t is None else next(again) for t in (styles, *others)]


def _slopes(sums: Tensor, of_gains: Tensor) -> Tensor:
    """The h of `_DemodulationBackward`, -g^3 dL/dg."""
    return sums.pow(-1.5).mul_(of_gains).neg_()


def _times_powers(turned: Sequence[Tensor], columns: list[Tensor], taps: int) -> Tensor:
    """Products h P summed over the taps, of each h^T (O, N): (N, inputs of all layers)."""
    powers = torch._foreach_mul(columns, columns)
    sums = torch.cat([power @ h for h, power in zip(turned, powers, strict=True)])
    return sums.unflatten(0, (-1, taps)).sum(1).t()


def _of_weights(
    products: Sequence[Tensor], weights: Sequence[Tensor], more: Sequence[Tensor | None]
) -> list[Tensor]:
    """W times matrices (O, I * k * k), plus what is given as (O, I, k, k)."""
    found = [p.view(w.shape) for p, w in zip(products, weights, strict=True)]
    torch._foreach_mul_(found, list(weights))
    if given := [(f, m) for f, m in zip(found, more, strict=True) if m is not None]:
        torch._foreach_add_([f for f, _ in given], [m for _, m in given])
    return found
