"""Averages over processes; every function is a no-op in a run of one process."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes of this run."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def average(values: Tensor) -> Tensor:
    """Mean of a tensor over the processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(values)
        values /= world_size()
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes, in one transfer.

    A parameter that this phase did not use has no gradient in any process and stays so.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not grads:
        return
    flat = average(torch.cat([g.flatten() for g in grads]))
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
