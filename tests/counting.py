"""Counts the operators that PyTorch is asked for, views included."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = (
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::masked_select", "aten::_unique2"),
)
"""Operators whose result, or its size, the host must wait for."""


class Operators(TorchDispatchMode):
    """Counts operators by name, those of backward passes too."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))
