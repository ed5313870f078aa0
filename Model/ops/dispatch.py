"""Which implementation of an operator runs."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from Util.settings import VariableError

if TYPE_CHECKING:  # at run time `python -m Model.ops.build` would find itself imported already
    from Model.ops.build import Part

Impl = Literal["auto", "reference", "native"]

VARIABLE = "STYLEGAN_OPS"
# Where a gradient is wanted, PyTorch calls Python for every compiled operator: below this many
# values, on a CPU, that costs more than the saved passes over memory.
WORTH_IT = 16384
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class NativeUnavailable(RuntimeError):
    """A compiled operator is demanded where there is none; the message says why."""


@functools.cache
def why_not(part: "Part") -> str | None:
    """Load the compiled operators of a device, building them if needed; None if that worked.

    Cached: a process tries once, and warns once.

    Returns:
        The reason and the remedy where there are none.
    """
    from Model.ops import native
    from Model.ops.build import BuildError

    try:
        native.load(part)
    except (BuildError, OSError) as error:
        return str(error).strip() or type(error).__name__
    return None


def packing_available() -> bool:
    """Return whether ``auto`` takes the CPU's operators on packed weights: they build."""
    return _mode() != "reference" and why_not("cpu") is None


def tiles_available() -> bool:
    """Return whether ``auto`` takes the operators on AMX tiles: there are tiles, and they build."""
    return packing_available() and torch.ops.stylegan.tiles_available()


@functools.cache
def _warn(part: "Part", reason: str) -> None:
    warnings.warn(
        f"no compiled operators for {part.upper()} tensors, plain PyTorch runs instead: {reason} "
        f"({VARIABLE}=reference chooses that without this warning)",
        RuntimeWarning,
        stacklevel=2,
    )


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell torch.compile that a result does not change while a program runs.

    `torch.compiler.assume_constant_result` sets the same mark, but imports the whole compiler, a
    second at the start of every script.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _available(part: "Part") -> bool:
    reason = why_not(part)
    if reason is not None:
        _warn(part, reason)
    return reason is None


@_constant
def _demanded(operator: str, device: str) -> bool:
    if device not in ("cpu", "cuda"):
        raise NativeUnavailable(f"{operator}: no compiled operators for {device} tensors")
    reason = why_not(device)
    if reason is not None:
        raise NativeUnavailable(
            f"{operator}: no compiled operators for {device.upper()} tensors: {reason}"
        )
    return True


@_constant
def _mode() -> str:
    mode = os.environ.get(VARIABLE) or "auto"
    if mode not in ("auto", "reference", "native"):
        raise VariableError(f"{VARIABLE} must be auto, reference or native, not {mode!r}")
    return mode


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Return whether what is computed from these tensors is recorded for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def use_native(operator: str, impl: Impl, x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the compiled operator runs.

    ``impl="auto"`` defers to the environment variable STYLEGAN_OPS. If that is "auto" too, the
    compiled operator runs where it can be built, for floating-point tensors of one type that, where
    a gradient is wanted on a CPU, are large enough to gain from it.

    Args:
        operator: name for messages.
        impl: the caller's choice.
        x: the values.
        others: further tensors that the operator takes, or None.

    Raises:
        ValueError: ``impl`` or STYLEGAN_OPS is none of the three names (`VariableError`).
        NativeUnavailable: "native" is demanded where there is none.
    """
    if impl not in ("auto", "reference", "native"):
        raise ValueError(f"{operator}: impl must be auto, reference or native, not {impl!r}")
    mode = _mode() if impl == "auto" else impl
    if mode != "auto":
        return mode == "native" and _demanded(operator, x.device.type)
    part = x.device.type
    if part not in ("cpu", "cuda") or x.dtype not in TYPES:
        return False
    # A GPU's time for an operator is its launch, and the reference has more of them at any size.
    if part == "cpu" and x.numel() < WORTH_IT and gradient_wanted(x, *others):
        return False
    if any(t is not None and (t.dtype != x.dtype or t.device != x.device) for t in others):
        return False
    return _available(part)
