"""The device that a script's --device flag means, and how it is set up."""

import ctypes
import re
import resource
import sys

import torch

from Util.settings import SettingError


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists.

    Args:
        name: ``auto`` is the first GPU that PyTorch can use, the CPU where there is none.

    Raises:
        SettingError: another name, no usable GPU, or no GPU of that number.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        _keep_freed_memory()
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise SettingError("device", f"{name}: unknown; take auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise SettingError("device", f"{name}: PyTorch finds no GPU; take cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise SettingError("device", f"{name}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return device


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
    """Allow or forbid TensorFloat-32 in matrix products and in convolutions.

    PyTorch's own default allows it in convolutions alone.
    """
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def reserved_memory_gib(device: torch.device) -> float:
    """What PyTorch holds of a GPU's memory now, in GiB; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def tune_convolutions() -> None:
    """Let cuDNN measure which of its algorithms is fastest, once for each shape that comes up."""
    torch.backends.cudnn.benchmark = True


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: by PyTorch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
