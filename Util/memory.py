"""How many images are computed at once, and what a computation would need.

The memory that a network takes for a batch grows with the batch's pixels, so these are what is
bounded: 64 images of 256 px are as many pixels as 4 of 1024 px. What is computed depends on the
number by the rounding of the convolutions alone. ``python -m benchmarks.memory --fake`` prints what
the bounds come to.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from Util import control_groups

INFERENCE = 2**22
"""Pixels that a generator makes, and other networks see, without gradients."""
GRADIENTS = 2**21
"""Pixels of which gradients by latents and layer noise are computed."""
SCORING = 2**18
"""Pixels of which gradients by the weights are computed: four images of 256 px."""
PARSING = {"cpu": 2**19, "cuda": INFERENCE}
"""Pixels that a parser sees, by the kind of device; on a CPU, more gain little."""


def at_once(side: int, pixels: int, most: int | None = None) -> int:
    """Return how many images of a side in px are computed at once.

    Args:
        side: of an image, in px.
        pixels: that all of them may have; one image is computed whatever it has.
        most: images, if there is such a bound.
    """
    images = max(1, pixels // side**2)
    return images if most is None else min(images, most)


def free_bytes(device: torch.device) -> int | None:
    """Return what can still be allocated, or None where nothing tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    known = [_available(), control_groups.memory_left()]
    return min((free for free in known if free is not None), default=None)


def _available() -> int | None:
    """What Linux can give to processes, file caches included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


class Meter(TorchDispatchMode):
    """Counts what the tensors made inside its block take, as long as anything holds them.

    Numbers that Python asks of a tensor (`Tensor.item`) are 1, and arrays hold zeros: inside
    `imagined` there are no values.

    Attributes:
        held: bytes now.
        peak: bytes at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        for storage in _storages((args, kwargs)):
            self._count(storage, 0)  # there before: a view of it is nothing new
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        # PyTorch keeps the Python object of a storage for as long as there is the storage.
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors among arguments or results."""
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))


Thing = TypeVar("Thing")


@contextmanager
def imagined(thing: Thing) -> Iterator[tuple[Thing, Meter]]:
    """Give a copy of something that holds tensors, and a block that computes shapes alone.

    Nothing of it is allocated, no random number is drawn, and the original stays as it is. What
    the meter counts is what would be needed besides the original and tensors from elsewhere. It
    leaves out what no operator returns: workspaces of convolutions, gaps between tensors in the
    memory of a GPU, and its context.

    Args:
        thing: networks, optimisers, or an object that holds them; can be deep-copied.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        copied = copy.deepcopy(thing)
    with mode, _NoArrays(), Meter() as meter:
        yield copied, meter


class _NoArrays(TorchFunctionMode):
    """Gives an array of zeros where one is asked for of a tensor that has no values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.numpy:
            return np.zeros(args[0].shape)
        return func(*args, **(kwargs or {}))
