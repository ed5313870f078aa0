"""The compiled operators for PyTorch: loading, shapes for tracing, and derivatives of any order.

The operators (schemas in ``csrc/cpu.cpp``), with d = grad * f'(sum), f = scale * leaky_relu:

- ``upfirdn2d``: its gradient is itself, with the filter turned and up and down swapped.
- ``fused_leaky_relu``: y = f(x * gain + strength * noise + bias).
- ``fused_leaky_relu_backward``: (d * gain, d summed by channel over the batch, d * x summed by
  channel, d summed by pixel if that is wanted, else (0, ...)). It is linear in grad, x and gain,
  and f' depends only on the sign of y, so its own gradient is the operator again.
- ``filtered_leaky_relu``: a blur and ``fused_leaky_relu`` in one pass; its gradient is theirs.
- ``conv3x3``: its gradient by the input is itself with the filters turned and transposed, that by
  the weights is PyTorch's.
- ``styled_conv3x3`` and ``styled_up_conv3x3``: for inference, without a gradient.
- ``upsampled_argmax``: classes of pixels, which have none.
- ``feature_distance``: its gradient is ``feature_distance_backward``, which has none.
- ``packed_*``: for `Model.prepared`, in float32; without a gradient.
- ``tiles_*`` (``csrc/tiles.cpp``): for `Model.prepared`, where there is AMX; without a gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from Model.ops.build import Part, library

Gradients = tuple[Tensor | None, ...]

_loaded: set[str] = set()


def load(part: Part) -> None:
    """Build if needed and load the operators of a part; the first load registers derivatives.

    Raises:
        Model.ops.build.BuildError: they can not be built.
        OSError: the library does not load.
    """
    for name in ("cpu",) if part == "cpu" else ("cpu", "cuda"):
        if name in _loaded:
            continue
        torch.ops.load_library(str(library(name)))  # type: ignore[arg-type]
        if name == "cpu":
            _register()
        _loaded.add(name)


def _format(x: Tensor) -> torch.memory_format:
    """The layout an operator's result takes from its input (``layout_of`` in csrc/tensors.h)."""
    if x.ndim != 4:
        return torch.contiguous_format
    return torch._prims_common.suggest_memory_format(x)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_format(x))


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_channel(sums: Tensor, like: Tensor) -> Tensor:
    """View (N, C) so that it multiplies (N, C, ...)."""
    return sums.to(like.dtype).view(*sums.shape, *[1] * (like.ndim - 2))


# --- Shapes ---------------------------------------------------------------------------------------


def _fake_activation(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    gain: Tensor | None,
    slope: float,
    scale: float,
) -> Tensor:
    return _empty_like(x)


def _fake_activation_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor | None,
    gain: Tensor | None,
    slope: float,
    scale: float,
    by_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c = y.shape[:2]
    options = {"dtype": _sum_type(y), "device": y.device}
    return (
        _empty_like(y),
        torch.empty(c, **options),  # type: ignore[call-overload]
        torch.empty(0 if x is None else n, c, **options),  # type: ignore[call-overload]
        torch.empty(n if by_pixel else 0, 1, *y.shape[2:], **options),  # type: ignore[call-overload]
    )


def _fake_filter(x: Tensor, height: int, width: int) -> Tensor:
    shape = (x.shape[0], x.shape[1], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _fake_upfirdn2d(
    x: Tensor, kernel: Tensor, up: int, down: int, pad: int, height: int, width: int, flip: bool
) -> Tensor:
    return _fake_filter(x, height, width)


def _fake_filtered(
    x: Tensor, kernel: Tensor, pad: int, height: int, width: int, *epilogue: object
) -> Tensor:
    return _fake_filter(x, height, width)


def _fake_convolution(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _fake_upsampling_convolution(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    shape = (x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _fake_argmax(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return logits.new_empty((len(logits), height, width), dtype=torch.int64)


def _fake_feature_distance(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return a.new_empty(len(a))


def _fake_feature_distance_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    eps: float,
    wants_a: bool,
    wants_b: bool,
) -> tuple[Tensor, Tensor]:
    last, none = torch.channels_last, grad.new_empty(0)
    by_a = torch.empty_like(a, memory_format=last) if wants_a else none
    return by_a, torch.empty_like(b, memory_format=last) if wants_b else none.clone()


# --- Derivatives ----------------------------------------------------------------------------------


def _turn(x_shape: torch.Size, kernel: Tensor, up: int, down: int, pad: int) -> tuple[int, ...]:
    """Up, down, padding, height and width of the filter operation that is the gradient's."""
    return down, up, kernel.shape[0] - 1 - pad, x_shape[2], x_shape[3]


def _setup_upfirdn2d(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, kernel, up, down, pad, _, _, flip = inputs
    ctx.save_for_backward(kernel)
    ctx.turned, ctx.flip = _turn(x.shape, kernel, up, down, pad), not flip


def _upfirdn2d_backward(ctx: Any, grad: Tensor) -> Gradients:
    (kernel,) = ctx.saved_tensors
    dx = torch.ops.stylegan.upfirdn2d(grad, kernel, *ctx.turned, ctx.flip)
    return (dx, *[None] * 7)


def _parameter_gradients(
    noise: Tensor | None,
    strength: Tensor | None,
    sums: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    needed: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Gradients of bias, noise, strength and gain from the sums of the backward operator."""
    by_channel, products, by_pixel = sums
    dbias = dnoise = dstrength = None
    if needed[0]:
        dbias = by_channel.to(dtype)
    if noise is not None and needed[1]:
        dnoise = by_pixel if strength is None else by_pixel * strength
        dnoise = dnoise.sum_to_size(noise.shape).to(dtype)
    if noise is not None and strength is not None and needed[2]:
        # The sums have one channel, which makes the shape that of the strength.
        dstrength = (by_pixel * noise).sum([0, *range(2, noise.ndim)]).to(dtype)
    dgain = products.to(dtype) if needed[3] else None
    return dbias, dnoise, dstrength, dgain


def _by_pixel_wanted(noise: Tensor | None, needed: Sequence[bool]) -> bool:
    """Whether the gradient of the noise (needed[1]) or of its strength (needed[2]) is wanted."""
    return noise is not None and (needed[1] or needed[2])


def _setup_activation(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, noise, strength, gain, ctx.slope, ctx.scale = inputs
    kept = x if ctx.needs_input_grad[4] else None
    ctx.save_for_backward(output, kept, noise, strength, gain)


def _activation_backward(ctx: Any, grad: Tensor) -> Gradients:
    y, x, noise, strength, gain = ctx.saved_tensors
    needed = ctx.needs_input_grad[1:5]
    dx, *sums = torch.ops.stylegan.fused_leaky_relu_backward(
        grad, y, x, gain, ctx.slope, ctx.scale, _by_pixel_wanted(noise, needed)
    )
    parameters = _parameter_gradients(noise, strength, tuple(sums), y.dtype, needed)
    return (dx, *parameters, None, None)


def _setup_activation_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, y, x, gain, ctx.slope, ctx.scale, ctx.by_pixel = inputs
    ctx.save_for_backward(grad, y, x, gain)
    ctx.set_materialize_grads(False)


def _activation_double_backward(
    ctx: Any, of_dx: Tensor | None, of_sums: Tensor | None, of_products: Tensor | None,
    of_rows: Tensor | None,
) -> Gradients:  # fmt: skip
    grad, y, x, gain = ctx.saved_tensors
    parts: list[Tensor] = []
    if of_dx is not None:
        parts.append(of_dx if gain is None else of_dx * _by_channel(gain, y))
    if of_sums is not None:
        parts.append(_by_channel(of_sums.unsqueeze(0), y).expand_as(y))
    if of_products is not None and x is not None:
        parts.append(_by_channel(of_products, y) * x)
    if of_rows is not None and ctx.by_pixel:
        parts.append(of_rows.to(y.dtype).expand_as(y))
    if not parts:
        return (None,) * 7
    backward = torch.ops.stylegan.fused_leaky_relu_backward
    of_grad = backward(sum(parts[1:], parts[0]), y, None, None, ctx.slope, ctx.scale, False)[0]
    of_x = of_gain = None
    if x is not None or ctx.needs_input_grad[3]:
        factor = None if of_products is None else of_products.to(y.dtype)
        turned = backward(grad, y, of_dx, factor, ctx.slope, ctx.scale, False)
        of_x = turned[0] if factor is not None else None
        if ctx.needs_input_grad[3] and of_dx is not None:
            of_gain = turned[2].to(y.dtype)
    return of_grad, None, of_x, of_gain, None, None, None


def _setup_filtered(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, kernel, pad, _, _, _, noise, strength, gain, ctx.slope, ctx.scale = inputs
    ctx.pad, ctx.shape = pad, x.shape
    kept = x if ctx.needs_input_grad[8] else None
    ctx.save_for_backward(output, kept, kernel, noise, strength, gain)


def _filtered_backward(ctx: Any, grad: Tensor) -> Gradients:
    y, x, kernel, noise, strength, gain = ctx.saved_tensors
    blur = torch.ops.stylegan.upfirdn2d
    # What the filter made of x was never written; the gradient of the gain needs it once more.
    blurred = None if x is None else blur(x, kernel, 1, 1, ctx.pad, *y.shape[2:], False)
    needed = ctx.needs_input_grad[5:9]
    d, *sums = torch.ops.stylegan.fused_leaky_relu_backward(
        grad, y, blurred, gain, ctx.slope, ctx.scale, _by_pixel_wanted(noise, needed)
    )
    dx = blur(d, kernel, *_turn(ctx.shape, kernel, 1, 1, ctx.pad), True)
    parameters = _parameter_gradients(noise, strength, tuple(sums), y.dtype, needed)
    return (dx, None, None, None, None, *parameters, None, None)


def _setup_convolution(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _convolution_backward(ctx: Any, grad: Tensor) -> Gradients:
    x, weight = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        turned = weight.flip(2, 3).transpose(0, 1)
        dx = torch.ops.stylegan.conv3x3(grad, turned, None)
    if ctx.needs_input_grad[1]:
        dweight = conv2d_weight(x, weight.shape, grad, padding=1)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = grad.sum((0, 2, 3))
    return dx, dweight, dbias


def _register() -> None:
    operators: dict[str, tuple[Callable, Callable, Callable]] = {
        "upfirdn2d": (_fake_upfirdn2d, _upfirdn2d_backward, _setup_upfirdn2d),
        "fused_leaky_relu": (_fake_activation, _activation_backward, _setup_activation),
        "fused_leaky_relu_backward": (
            _fake_activation_backward,
            _activation_double_backward,
            _setup_activation_backward,
        ),
        "filtered_leaky_relu": (_fake_filtered, _filtered_backward, _setup_filtered),
        "conv3x3": (_fake_convolution, _convolution_backward, _setup_convolution),
    }
    for name, (fake, backward, setup) in operators.items():
        torch.library.register_fake(f"stylegan::{name}", fake)
        torch.library.register_autograd(f"stylegan::{name}", backward, setup_context=setup)
    torch.library.register_fake("stylegan::upsampled_argmax", _fake_argmax)
    torch.library.register_fake("stylegan::feature_distance", _fake_feature_distance)
    torch.library.register_fake(
        "stylegan::feature_distance_backward", _fake_feature_distance_backward
    )
    torch.library.register_fake("stylegan::styled_conv3x3", _fake_convolution)
    torch.library.register_fake("stylegan::styled_up_conv3x3", _fake_upsampling_convolution)
