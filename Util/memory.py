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
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Meter(TorchDispatchMode):
    """Counts what the tensors made inside its block take, as long as anything holds them.

    Numbers that Python asks of a tensor (`Tensor.item`) are 1: inside `imagined` there are none.

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
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.held += self._sizes[key]
        self.peak = max(self.peak, self.held)
        # PyTorch keeps the Python object of a storage for as long as there is the storage.
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


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
    with mode, Meter() as meter:
        yield copied, meter
