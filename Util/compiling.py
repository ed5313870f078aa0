"""torch.compile, where a run asks for it."""

from collections.abc import Callable
from typing import TypeVar

import torch

BACKEND = "inductor"
"""What compiles."""

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function, on: bool) -> Function:
    """Compile a function of tensors of fixed shapes when it is first called, if asked to."""
    return torch.compile(function, backend=BACKEND, dynamic=False) if on else function
