"""What stays in float32 where ``torch.autocast`` runs the rest of a network in half precision."""

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Half-precision types by their names on the command line."""

HALF_CLAMP = 256.0
"""Largest magnitude of float16 activations (Karras et al., 2020, ADA, appendix C)."""


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
"""Precisions of inference by their names (see `Model.generator.Generator.prepare`)."""


def emulates_bfloat16() -> bool:
    """Whether this is an x86 processor without bfloat16, which then takes many times as long."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not torch.cpu._is_avx512_bf16_supported()


def inference(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Run a block in half precision where no gradient is recorded; None leaves it as it is."""
    if dtype is None or torch.is_grad_enabled():
        return nullcontext()
    return torch.autocast(device.type, dtype)


def bounded(x: Tensor) -> Tensor:
    """Clamp float16 activations to +-`HALF_CLAMP`; other types stay as they are."""
    return x.clamp(-HALF_CLAMP, HALF_CLAMP) if x.dtype == torch.float16 else x


def half_type(kind: str) -> torch.dtype | None:
    """The type in which autocast runs convolutions on a kind of device, or None without it."""
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


def preferred_layout(kind: str, half: bool) -> torch.memory_format:
    """The memory layout in which convolutions run fastest on a kind of device.

    On a CPU channels-last: a filter becomes one vector operation per pixel (a blur of 16 maps takes
    a quarter of the time). On a GPU channels-last in half precision, for which its matrix units
    read that layout, and planes in float32.
    """
    last = kind == "cpu" or half
    return torch.channels_last if last else torch.contiguous_format


def in_float32(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make a function of tensors compute in float32 under autocast too.

    The arguments are converted, the result is float32. Without autocast nothing changes.
    """

    @wraps(function)
    def full_precision(*args: Any, **named: Any) -> Result:
        kind = next(a for a in (*args, *named.values()) if isinstance(a, Tensor)).device.type
        if half_type(kind) is None:
            return function(*args, **named)
        with torch.autocast(kind, enabled=False):
            return function(*map(_widened, args), **{k: _widened(v) for k, v in named.items()})

    return full_precision


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES.values() else value
