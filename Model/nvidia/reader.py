"""Reading NVIDIA's pickles as data: no class, function or source code of the file is ever run.

Both loaders of NVIDIA execute Python source that the file carries: ``torch_utils.persistence`` (of
stylegan2-ada-pytorch and stylegan3) and ``dnnlib.tflib.network`` (of the TensorFlow StyleGAN2).
Here every name that such a file needs stands for a small object that only keeps what it is given;
any other name is refused. PyTorch's storages and NumPy's arrays are read by their documented
layout, within the bytes that are there.
"""

import io
import math
import mmap
import os
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""First object in a file or a storage that PyTorch wrote before its zip format."""

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
ARRAY_CODES = frozenset({"f2", "f4", "f8", "i4", "i8", "b1"})


class RefusedError(Exception):
    """A pickle names something that no network file needs."""


@dataclass(frozen=True)
class Persistent:
    """An object of a class whose source is in the file: a PyTorch network or a part of one.

    Attributes:
        class_name: of its class in that source, which is dropped unread.
        version: of the format; 6 is the only published one.
        state: its attributes, among them ``_parameters``, ``_buffers``, ``_modules``.
    """

    class_name: str
    version: Any
    state: Mapping[str, Any]


class TensorFlowNetwork:
    """A ``dnnlib.tflib.network.Network``: what its ``__getstate__`` returned."""

    def __init__(self) -> None:
        self.state: Mapping[str, Any] = {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = {key: value for key, value in state.items() if key != "build_module_src"}


def _persistent(meta: Mapping[str, Any]) -> Persistent:
    if not isinstance(meta["state"], dict):
        raise ValueError("a persistent object without a state")
    return Persistent(str(meta["class_name"]), meta.get("version"), meta["state"])


class _Dtype:
    """A ``numpy.dtype``: its code and byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1].replace("|", "=")

    def dtype(self) -> np.dtype[Any]:
        if self.code not in ARRAY_CODES:
            raise ValueError(f"an array of type {self.code!r}")
        return np.dtype(self.code).newbyteorder(self.order)


class Array:
    """A ``numpy.ndarray``; ``values`` are what it holds, in this machine's byte order."""

    values: np.ndarray[Any, Any]

    def __init__(self, *_: Any) -> None:
        """Take what ``_reconstruct`` gets: a class, a dummy shape, a dummy type."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        stored = dtype.dtype()
        flat = np.frombuffer(raw, stored) if raw else np.empty(0, stored)
        if flat.size != math.prod(shape):
            raise ValueError(f"an array claims shape {shape} and holds {flat.size} values")
        values = flat.reshape(shape, order="F" if fortran else "C")
        self.values = np.array(values, stored.newbyteorder("="), order="C")


def _array_in_band(raw: Any, dtype: _Dtype, shape: Any, order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(raw)))
    return array


def _number(dtype: _Dtype, raw: bytes) -> float:
    return np.frombuffer(raw, dtype.dtype(), count=1)[0].item()


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """What ``torch._utils._rebuild_tensor_v2`` makes, but never more values than are stored."""
    if not isinstance(storage, Tensor) or min((offset, *size, *stride)) < 0:
        raise ValueError("a tensor without a storage")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(storage) or (count and last >= len(storage)):
        raise ValueError(f"a tensor claims shape {tuple(size)}, {len(storage)} values are stored")
    return torch.as_strided(storage, size, stride, offset) if count else storage.new_empty(size)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _load_storage(raw: bytes) -> Tensor:
    """Values (N,) of a storage in PyTorch's old format.

    Five pickles (magic number, version, machine, a reference to the storage, the list of keys),
    the number of values as 8 bytes, the values (``torch.serialization._legacy_save``).
    """
    file = io.BytesIO(raw)
    magic, _, machine, claim, keys = (_load(file, _StorageReader) for _ in range(5))
    dtype, key, count = claim
    if magic != TORCH_MAGIC or keys != [key] or not machine["little_endian"]:
        raise ValueError("a storage that PyTorch did not write")
    (written,) = struct.unpack("<q", file.read(8))
    data = bytearray(file.read())
    if not count == written == len(data) / dtype.itemsize:
        raise ValueError(f"a storage claims {count!r} values and holds {len(data)} bytes")
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


class _StorageReader(pickle.Unpickler):
    """Reads the pickles of one storage."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "torch" or name not in STORAGES:
            raise RefusedError(f"{module}.{name}")
        return STORAGES[name]

    def persistent_load(self, pid: Any) -> tuple[Any, Any, Any]:
        _, dtype, key, _, count, *_ = pid
        return dtype, key, count


STAND_INS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.tflib.network", "Network"): TensorFlowNetwork,
    ("dnnlib.util", "EasyDict"): dict,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): Array,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", Array),
            ("multiarray", "scalar", _number),
            ("numeric", "_frombuffer", _array_in_band),
        )
    },
}
"""Every name that a file may use, and what stands for it."""


class _NetworkReader(pickle.Unpickler):
    """Reads a whole file."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise RefusedError(f"{module}.{name}")
        return STAND_INS[module, name]


def _load(file: BinaryIO | mmap.mmap, reader: type[pickle.Unpickler]) -> Any:
    """Read one pickle from where a file stands.

    An unpickler makes its memo as long as the largest index that the pickle writes, so an index
    beyond the number of steps so far, which no pickler writes, could take any memory.
    """
    start = file.tell()
    for steps, (code, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > steps:  # type: ignore[operator]
            raise ValueError("a memo index out of range")
    file.seek(start)
    return reader(file).load()


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a bare pickle (protocol 2 or later) and not one of PyTorch's own."""
    with open(path, "rb") as file:
        head = file.read(64)
    magic = TORCH_MAGIC.to_bytes(10, "little")
    return head[:1] == b"\x80" and head[1:2] <= b"\x05" and magic not in head


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of NVIDIA's networks.

    Returns:
        What it holds: containers, numbers, strings, tensors, `Persistent`, `TensorFlowNetwork`,
        `Array`.

    Raises:
        RefusedError: it names something else.
        Exception: of any kind, for a damaged file.
    """
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _load(data, _NetworkReader)
