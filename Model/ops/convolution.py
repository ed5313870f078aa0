"""3x3 convolutions that keep the size, by Winograd's minimal filtering on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from Model.ops.dispatch import Impl, gradient_wanted, use_native
from Model.ops.epilogue import Epilogue, apply_epilogue, filtered_leaky_relu, scaled_maps
from Model.precision import half_type

TRANSFORM = 12 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
"""With how many channels products take as long as transforming a pixel; fewer where they do not
fill as long a vector."""


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Compute ``F.conv2d(x, weight, bias, padding=1)`` for 3x3 weights.

    The compiled operator needs a quarter of the multiplications (F(4x4, 3x3), Lavin and Gray, CVPR
    2016) and differs by rounding: its error is 1.1e-6 of the outputs' spread for 512 channels (root
    mean square), that of PyTorch's convolution in the same layout 0.7e-6. Its gradient by x is a
    convolution of the same kind. Differentiable twice.

    Args:
        x: (N, I, H, W).
        weight: (O, I, 3, 3).
        bias: (O,) or None.
        impl: see `Model.ops`; native for float32 and float64 on a CPU.

    Returns:
        (N, O, H, W); from the compiled operator in channels-last order.
    """
    if not _native(impl, x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)
    return torch.ops.stylegan.conv3x3(x, weight, bias)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
) -> Tensor:
    """Compute ``F.conv2d(x, weight, bias, stride, padding)``, through `conv3x3` where it can."""
    if weight.shape[2:] == (3, 3) and stride in (1, (1, 1)) and padding in (1, (1, 1)):
        return conv3x3(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


def styled_conv3x3(
    x: Tensor, weight: Tensor, style: Tensor, epilogue: Epilogue, impl: Impl = "auto"
) -> Tensor:
    """Compute ``apply_epilogue(conv3x3(x * style, weight), epilogue)``.

    A layer of StyleGAN2's synthesis network. Style and epilogue are converted to the type of what
    they act on. Where no gradient is wanted, the compiled convolution scales what it reads and
    activates what it writes, without a pass over memory for either.

    Args:
        x: (N, I, H, W).
        weight: (O, I, 3, 3).
        style: (N, I) factor of each input map.
        epilogue: what follows the convolution.
        impl: see `Model.ops`.

    Returns:
        (N, O, H, W).
    """
    others = (style, *epilogue.tensors)
    if not gradient_wanted(x, weight, *others) and _native(impl, x, weight, *others):
        return torch.ops.stylegan.styled_conv3x3(x, weight, style, *epilogue)
    y = conv3x3(*_modulated(x, weight, style, impl), impl=impl)
    # Under autocast the convolution has chosen the type.
    return apply_epilogue(y, epilogue.to(y.dtype), impl)


def styled_conv(x: Tensor, weight: Tensor, style: Tensor, epilogue: Epilogue) -> Tensor:
    """Compute `styled_conv3x3`, or the same of 1x1 weights, where PyTorch multiplies matrices."""
    if weight.shape[2:] == (3, 3):
        return styled_conv3x3(x, weight, style, epilogue)
    y = F.conv2d(*_modulated(x, weight, style, "auto"))
    return apply_epilogue(y, epilogue.to(y.dtype))


def styled_upsampling_conv3x3(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    kernel: Tensor,
    epilogue: Epilogue,
    impl: Impl = "auto",
) -> Tensor:
    """Convolve ``x * style`` transposed with stride 2, blur, and apply the epilogue.

    Where no gradient is wanted and it pays, the compiled operator makes a few rows of the
    transposed convolution at a time, so that neither these nor ``x * style`` are written to memory.

    Args:
        x: (N, I, H, W).
        weight: (O, I, 3, 3).
        style: (N, I) factor of each input map.
        kernel: (4, 4) filter of the blur, padded by 1 on all sides.
        epilogue: what follows the blur.
        impl: see `Model.ops`.

    Returns:
        (N, O, 2H, 2W).
    """
    others = (style, *epilogue.tensors)
    if not gradient_wanted(x, weight, kernel, *others) and _native_up(impl, x, weight, *others):
        return torch.ops.stylegan.styled_up_conv3x3(x, weight, style, kernel, *epilogue)
    x, weight = _modulated(x, weight, style, impl)
    y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return filtered_leaky_relu(y, kernel, (1, 1), epilogue.to(y.dtype), impl)


def _modulated(x: Tensor, weight: Tensor, style: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
    """Scale what a convolution reads: x, or the weights of a single image where they are fewer.

    Only autocast, which converts the weights in every call anyway, gains by the latter.
    """
    fewer = (
        half_type(x.device.type) is not None
        and not torch.compiler.is_compiling()  # a traced graph serves any number of images
        and not gradient_wanted(x, weight, style)
        and len(x) == 1
        and 9 * len(weight) < x.shape[2] * x.shape[3]
    )
    if fewer:
        return x, weight * style.view(*style.shape, 1, 1)
    return scaled_maps(x, style.to(x.dtype), impl), weight


def _native_up(impl: Impl, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    if impl == "auto" and not _up_pays(x, weight):
        return False
    return use_native("styled_up_conv3x3", impl, x, weight, *others)


def _up_pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether the weights stay in the cache from row to row."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[0] * weight.shape[1] <= 32768
        and not torch.is_autocast_enabled("cpu")
    )


def _native(impl: Impl, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    if impl == "auto" and not _pays(x, weight):
        return False
    return use_native("conv3x3", impl, x, weight, *others)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether the saved multiplications outweigh the transforms.

    Transforming the weights costs as much as some 250 pixels, transforming a pixel as much as
    products with `TRANSFORM` channels. A GPU's library has such algorithms itself.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    outputs, inputs = weight.shape[:2]
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return (
        pixels >= 256
        and inputs * outputs >= TRANSFORM * (inputs + outputs)
        and not torch.is_autocast_enabled("cpu")
    )
