"""torch.compile, where a run asks for it."""

from typing import Any

import torch

BACKEND = "inductor"
"""What compiles."""


def compile_method(owner: Any, name: str) -> None:
    """Replace an object's method of tensors of fixed shapes by one that is compiled when called."""
    setattr(owner, name, torch.compile(getattr(owner, name), backend=BACKEND, dynamic=False))
