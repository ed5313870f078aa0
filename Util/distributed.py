"""Several processes: start, averages, agreement. Everything is a no-op in a run of one process."""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

_PLAIN = torch.contiguous_format


def world_size() -> int:
    """Number of processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 logs and saves."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def launched_processes() -> int:
    """Number of processes that torchrun (or anything that sets its variables) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether this process is one of several."""
    return launched_processes() > 1


def relaunch(script: str, argv: Sequence[str], gpus: Sequence[int]) -> NoReturn:
    """Replace this process by PyTorch's launcher, with one process per listed GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(gpus)}"]
    os.execv(sys.executable, [sys.executable, *launcher, script, *argv])


def join(device: torch.device) -> torch.device:
    """Join the process group that the launcher describes: nccl on GPUs, gloo on CPUs.

    Returns:
        The device of this process: of several GPUs the one of its local rank.
    """
    if not launched():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    return device


def leave() -> None:
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _all_mean(values: Tensor) -> Tensor:
    total = values.clone()
    distributed.all_reduce(total)
    return total / world_size()


class _Average(torch.autograd.Function):
    """A mean over processes passes back the mean of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_mean(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_mean(gradients[0])


def average(values: Tensor) -> Tensor:
    """Mean of a tensor over the processes; gradients flow into every process's share."""
    return values if world_size() == 1 else _Average.apply(values)


class _GatherRows(torch.autograd.Function):
    """Every process's loss depends on a row, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=_PLAIN) for _ in range(world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumRows.apply(gradients[0])


class _SumRows(torch.autograd.Function):
    """This process's rows of the sum over the processes; derivative of `_GatherRows`, and back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        total = rows.clone(memory_format=_PLAIN)
        distributed.all_reduce(total)
        return total.chunk(world_size())[rank()].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _GatherRows.apply(gradients[0])


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, which have equally many, in rank order.

    Differentiable any number of times, for losses whose gradients are then averaged
    (`Util.gradients`).
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_in_turn(values: Sequence[Any]) -> list[Any]:
    """Merge the processes' lists: item k is item k // world_size of process k % world_size."""
    lists = gather(list(values))
    total = sum(len(items) for items in lists)
    return [lists[k % len(lists)][k // len(lists)] for k in range(total)]
