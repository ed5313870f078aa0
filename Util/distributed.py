"""Several processes: start, averages, agreement, end. No-ops in a run of one process.

Tensors on GPUs travel by nccl, all else by gloo between the CPUs, so that agreeing on something
never waits for a device. A process that fails ends at once (`end_at_once`): whoever waits for it
learns so from the broken connection, and the launcher ends the rest.
"""

import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from Util.workers import cores

PATIENCE = timedelta(hours=2)
"""How long processes wait at `meet` for one that writes or measures alone."""

_PLAIN = torch.contiguous_format


_alone = ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In the block, this process takes itself for the only one, and talks to no other."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world_size() -> int:
    """Number of processes of this run."""
    if _alone.get():
        return 1
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


def local_rank() -> int:
    """Index of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """Number of this run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def processes_beside() -> int:
    """Number of this run's processes that share this one's cores: srun gives each task its own."""
    by_srun = "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return 1 if by_srun else local_processes()


def relaunch(script: str, argv: Sequence[str], count: int) -> NoReturn:
    """Replace this process by PyTorch's launcher, with ``count`` processes on this machine.

    The launcher hands SIGUSR1 on too, leaves SIGUSR2 to the processes, and after a signal kills
    none before it has had two minutes for its checkpoint. Each process gets its share of the cores,
    not the one thread of the launcher's default: the first one measures alone.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    os.execv(sys.executable, [sys.executable, *launcher, script, *argv])


def join(device: torch.device, timeout: float = 600) -> torch.device:
    """Join the process group that the launcher describes.

    Args:
        device: of this process, see `Util.device.pick_device`.
        timeout: seconds after which a transfer fails that some process does not take part in.

    Returns:
        The device.
    """
    if launched():
        limit, on_gpu = timedelta(seconds=timeout), device.type == "cuda"
        store, number, world = next(rendezvous("env://", timeout=limit))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=distributed.PrefixStore(_password(store, number, world, timeout), store),
            rank=number,
            world_size=world,
            timeout=limit,
            device_id=device if on_gpu else None,
        )
    return device


def _password(store: distributed.Store, number: int, world: int, timeout: float) -> str:
    """A word that only the processes of this attempt share.

    After a restart (torchrun --max-restarts) the launcher's store may still hold what the ended
    processes left there, their addresses among it. So a process believes an answer of process 0
    only if it repeats a word of its own, and process 0 goes on answering until it is thanked.

    Raises:
        RuntimeError: a process has not come in time.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + timeout

    def wait(others: Iterable[int], answered: Callable[[int], bool]) -> None:
        missing = list(others)
        while missing := [k for k in missing if not answered(k)]:
            if time.monotonic() > until:
                who = ", ".join(map(str, missing))
                raise RuntimeError(f"process {who} has not started within {timeout:g} s")
            time.sleep(0.01)

    def found(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if number == 0:

        def answer(k: int) -> bool:
            store.set(f"answer/{k}", f"{found(f'hello/{k}')} {own}")
            return bool(found(f"thanks/{own}/{k}"))

        wait(range(1, world), answer)
        return own
    store.set(f"hello/{number}", own)
    wait([0], lambda _: found(f"answer/{number}").startswith(own))
    word = found(f"answer/{number}").split()[1]
    store.set(f"thanks/{word}/{number}", "yes")
    return word


def leave() -> None:
    """Leave the process group after success; after an error, it would wait for the others."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def name() -> str:
    """What messages call this process."""
    return f"process {os.environ.get('RANK', '0')} of {launched_processes()}"


def end_at_once(code: int) -> NoReturn:
    """End this process because of the error that is being handled, which the launcher reports.

    Destructors, that of the process group among them, would wait for the other processes.
    """
    if (error := sys.exception()) is not None:
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def explain(error: BaseException, reason: str) -> str:
    """Tell the other processes why this one ends; find out why, if it is because of another.

    Every process that ends leaves word in the group's store. A transfer that broke off or ran out
    of time was another one's fault: one that left a reason, or one that leaves no word at all.

    Args:
        error: what ends this process.
        reason: the same in one line.

    Returns:
        The reason, and behind it the other one's.
    """
    if not distributed.is_initialized():
        return reason
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    broken = gloo or isinstance(error, distributed.DistError)
    with contextlib.suppress(RuntimeError):  # the store may have ended with its process
        store = _store()
        store.set(f"ended/{rank()}", "-" if broken else reason)
        if broken:
            return f"{reason}; {_first_failure(store)}"
    return reason


def _first_failure(store: distributed.Store, patience: float = 3) -> str:
    """Wait a little for what the other processes leave word of."""
    others = [k for k in range(world_size()) if k != rank()]
    words: dict[int, str] = {}
    until = time.monotonic() + patience
    while time.monotonic() < until and len(words) < len(others):
        for k in others:
            if k not in words and store.check([f"ended/{k}"]):
                words[k] = store.get(f"ended/{k}").decode()
                if words[k] != "-":
                    return f"process {k} failed: {words[k]}"
        time.sleep(0.1)
    silent = ", ".join(str(k) for k in others if k not in words)
    return f"process {silent} was killed or does not answer" if silent else "the network failed"


def _store() -> distributed.Store:
    return distributed.distributed_c10d._get_default_store()


def highest(value: int, patience: timedelta | None = None) -> int:
    """The highest of the processes' integers; waits for all processes, for no device.

    Args:
        value: of this process, below 2**63.
        patience: how long to wait for the slowest; None: the group's timeout.
    """
    if world_size() == 1:
        return value
    options = distributed.AllreduceOptions()
    options.reduceOp = distributed.ReduceOp.MAX
    if patience is not None:
        options.timeout = patience
    values = torch.tensor([value])
    distributed.distributed_c10d._get_default_group().allreduce([values], options).wait()
    return int(values.item())


def meet() -> None:
    """Wait for all processes, however long one of them writes or measures alone."""
    highest(0, PATIENCE)


class OutOfStepError(RuntimeError):
    """The processes' copies of what all hold in common differ; the message says whose and where."""


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of process 0."""
    if world_size() > 1:
        for tensor in tensors:
            dense = tensor.detach().contiguous()
            distributed.broadcast(dense, 0)
            tensor.detach().copy_(dense)


def compare(tensors: Mapping[str, Tensor]) -> None:
    """Make sure that named tensors are equal in all processes, bit for bit, by their checksums.

    Raises:
        OutOfStepError: in every process; names the processes that differ from process 0.
    """
    if world_size() == 1:
        return
    sums = gather(torch.stack([_checksum(tensor) for tensor in tensors.values()]).tolist())
    for k, own in enumerate(sums):
        pairs = zip(tensors, sums[0], own, strict=True)
        if wrong := [name for name, first, other in pairs if first != other]:
            text = f"{len(wrong)} of {len(tensors)} tensors, {wrong[0]} the first of them"
            raise OutOfStepError(f"process {k} differs from process 0 in {text}")


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns as integers: one bit changed anywhere changes it."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


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


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process; see `highest`."""
    return bool(highest(int(flag)))


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value of process 0, in every process."""
    return gather(value)[0]


def gather_in_turn(values: Sequence[Any]) -> list[Any]:
    """Merge the processes' lists: item k is item k // world_size of process k % world_size."""
    lists = gather(list(values))
    total = sum(len(items) for items in lists)
    return [lists[k % len(lists)][k // len(lists)] for k in range(total)]
