"""torch.compile, where a run asks for it."""

from typing import Any

import torch

BACKEND = "inductor"
"""What compiles."""


def compile_method(owner: Any, name: str, mode: str) -> None:
    """Replace an object's method of tensors of fixed shapes by one that is compiled when called.

    Args:
        owner: has the method.
        name: the method's name.
        mode: torch.compile's: "default", or "reduce-overhead" for CUDA graphs, whose results last
            until the next `begin_step`. "" leaves the method as it is.
    """
    if mode:
        method = getattr(owner, name)
        setattr(owner, name, torch.compile(method, backend=BACKEND, mode=mode, dynamic=False))


def begin_step(mode: str) -> None:
    """Say that nobody reads what CUDA graphs computed so far: they may write over it."""
    if mode == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()
