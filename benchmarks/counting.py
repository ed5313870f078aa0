"""Counts the operators that PyTorch is asked for, and those for which the host must wait."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        *(
            "view",
            "_unsafe_view",
            "t",
            "transpose",
            "permute",
            "expand",
            "slice",
            "select",
            "alias",
        ),
        *("unsqueeze", "squeeze", "detach", "as_strided", "split", "split_with_sizes", "unbind"),
        "_reshape_alias",
    )
)
"""Operators that compute nothing; on a GPU they take the host's time alone."""

SYNCHRONISING = (
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::masked_select", "aten::_unique2", "index by a mask"),
    "aten::lift_fresh",  # a tensor of Python numbers, copied to the device
)
"""Operators whose result, or its size, the host waits for on a GPU."""


class Operators(TorchDispatchMode):
    """Counts operators by name while it is entered, those of backward passes too.

    Attributes:
        counts: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        self.counts[name] += 1
        if name.startswith("aten::index"):
            self.counts["index by a mask"] += _has_mask(args)
        return function(*args, **(kwargs or {}))

    @property
    def operators(self) -> int:
        """All of them."""
        return sum(n for name, n in self.counts.items() if ":" in name)

    @property
    def computing(self) -> int:
        """Those that are no views: on a GPU, at least one kernel each."""
        return sum(n for name, n in self.counts.items() if ":" in name and name not in VIEWS)

    @property
    def waits(self) -> int:
        """Those for which the host waits."""
        return sum(self.counts[name] for name in SYNCHRONISING)


def _has_mask(args: Sequence[Any]) -> bool:
    indices = [i for arg in args if isinstance(arg, list | tuple) for i in arg]
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
