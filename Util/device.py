"""The device that a script's --device flag means, and how it is set up."""

import ctypes
import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from Util import distributed
from Util.settings import SettingError, Settings, setting
from Util.threads import use_threads


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where a script computes, and how precisely."""

    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    tf32: bool = setting(
        False,
        "round the factors of float32 products to TensorFloat-32 (Ampere and newer GPUs): faster,"
        " but figures change a little",
    )

    def pick_device(self) -> torch.device:
        """See `pick_device`."""
        return pick_device(self.device, self.tf32)


def pick_device(
    name: str, tf32: bool = False, gpus: Sequence[int] = (), threads: int = 0
) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists, and set it up.

    Products of float32 are computed in float32 from here on: PyTorch's own default rounds those of
    convolutions on GPUs, which changes what an evaluation finds. A GPU becomes the current one, so
    that nothing is ever put on another by default.

    Args:
        name: ``auto`` is the first GPU that PyTorch can use, the CPU where there is none.
        tf32: see `DeviceSettings`.
        gpus: those of the processes of this machine, where there are several.
        threads: on a CPU, see `Util.threads.use_threads`.

    Raises:
        SettingError: another name, no usable GPU, or no GPU of that number.
    """
    set_tf32(tf32)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        _keep_freed_memory()
        use_threads(threads)
        return torch.device("cpu")
    if name != "auto" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise SettingError("device", f"{name}: unknown; take auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise SettingError("device", f"{name}: PyTorch finds no GPU; take cpu")
    if distributed.launched():
        device = torch.device("cuda", _gpu_of_this_process(gpus))
    else:
        device = torch.device("cuda" if name == "auto" else name)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise SettingError(
            "device", f"{device}: there are {count} GPUs, cuda:0 to cuda:{count - 1}"
        )
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def _gpu_of_this_process(gpus: Sequence[int]) -> int:
    """The index of the GPU of one of several processes."""
    if torch.cuda.device_count() == 1:  # as where a scheduler shows each process its own alone
        return 0
    local = distributed.local_rank()
    # A launcher may leave open how many processes there are here; a run may go on with others.
    named = len(gpus) == distributed.local_processes() and local < len(gpus)
    return gpus[local] if named else local


def _keep_freed_memory() -> None:
    """Let the C library keep what tensors free instead of handing it back to the system.

    By default glibc does so with blocks of 32 MiB and more, and every new tensor of that size is
    paid for in page faults, which take longer than most operators. No effect elsewhere.
    """
    mmap_threshold, trim_threshold, largest = -3, -1, 2**30
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, largest)
    mallopt(trim_threshold, largest)


def set_tf32(on: bool) -> None:
    """Allow or forbid TensorFloat-32 in matrix products and in convolutions on GPUs.

    PyTorch has two sets of switches. Those of fp32_precision, from 2.9 on, are inherited from
    general to special ones, and where they contradict the older ones, asking for either raises. So
    whatever was set before is taken back, and the older ones, which set both, decide.
    """
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def reserved_memory_gib(device: torch.device) -> float:
    """What PyTorch holds of a GPU's memory now, in GiB; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def tune_convolutions() -> None:
    """Let cuDNN measure which of its algorithms is fastest, once for each shape that comes up."""
    torch.backends.cudnn.benchmark = True


def tf32_allowed(device: torch.device) -> bool:
    """Whether products of float32 on a device may be rounded to TensorFloat-32."""
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: by PyTorch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
