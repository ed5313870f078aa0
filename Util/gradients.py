"""A network's gradients, averaged over the processes in buckets while backward still runs."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from Util.distributed import world_size

BUCKET_BYTES = 25 * 2**20
"""Size of a transfer: large enough to fill the network, small enough to start early (Li et al.,
"PyTorch Distributed", VLDB 2020, section 3.2.2)."""


class Gradients:
    """The gradients of a network's trained parameters, and their mean over the processes.

    In a run of several processes they lie in one flat buffer. As soon as the last gradient of one
    of its buckets is complete, the bucket is copied there and its transfer starts; the next layers'
    gradients are computed meanwhile. Buckets are transferred in a fixed order, and a parameter that
    a loss does not reach has a gradient of zero: all processes do the same, whatever their losses.

    Args:
        parameters: those that require no gradient now are left out.
        order: the same in the order in which backward completes them; None: as they are.
        bucket_bytes: size of a transfer.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        order: Iterable[nn.Parameter] | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        trained = set(self.parameters)
        ordered = [p for p in (self.parameters if order is None else order) if p in trained]
        self._buckets = _buckets(ordered, bucket_bytes) if world_size() > 1 else []
        self._armed, self._next = False, 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._complete, bucket))

    def start(self) -> None:
        """Forget the gradients of the last update."""
        for parameter in self.parameters:
            parameter.grad = None

    def arm(self, extra: Tensor) -> None:
        """Let the next backward pass, an update's last one, start the transfers.

        Args:
            extra: scalar that is averaged with the gradients.
        """
        self._extra = extra
        if self._buckets:
            self._buckets[-1].extra.copy_(extra)
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Wait for the transfers.

        Returns:
            The gradients, in the parameters' order, and the extra scalar.
        """
        self._armed = False
        if not self._buckets:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return [_gradient(p) for p in self.parameters], self._extra
        for bucket in self._buckets[self._next :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()
        return [_gradient(p) for p in self.parameters], self._buckets[-1].extra[0]

    def _complete(self, bucket: "_Bucket", _: nn.Parameter) -> None:
        """Count a complete gradient; called by autograd."""
        bucket.missing -= 1
        while self._armed and self._next < len(self._buckets):
            if self._buckets[self._next].missing:
                return
            self._buckets[self._next].send()
            self._next += 1


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class _Bucket:
    """Parameters whose gradients travel together, at the end with an extra scalar.

    Args:
        parameters: at least one.
        flat: room for their gradients and a scalar.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        self.parameters, self._flat = parameters, flat
        sizes = [p.numel() for p in parameters]
        *parts, self.extra = flat.split([*sizes, 1])
        self._views = [v.view_as(p) for v, p in zip(parts, parameters, strict=True)]
        self.missing = 0
        self._work: Any = None

    def send(self) -> None:
        """Copy the gradients into the buffer, make them views of it, and start the transfer."""
        pairs = list(zip(self._views, self.parameters, strict=True))
        if there := [(v, p.grad) for v, p in pairs if p.grad is not None]:
            torch._foreach_copy_([v for v, _ in there], [g for _, g in there])
        if absent := [v for v, p in pairs if p.grad is None]:
            torch._foreach_zero_(absent)
        for view, parameter in pairs:
            parameter.grad = view
        self._work = distributed.all_reduce(self._flat, async_op=True)

    def receive(self) -> None:
        """Wait for the sum, on a GPU without halting this process, and make it a mean."""
        self._work.wait()
        self._flat.div_(world_size())


def _buckets(parameters: Sequence[nn.Parameter], limit: int) -> list[_Bucket]:
    """Divide parameters into buckets of about equal bytes, slices of one buffer."""
    groups: list[list[nn.Parameter]] = []
    size = limit
    for parameter in parameters:
        if size >= limit:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    lengths = [sum(p.numel() for p in group) + 1 for group in groups]
    buffer = parameters[0].new_zeros(sum(lengths)) if groups else torch.zeros(0)
    slices = buffer.detach().split(lengths)
    return [_Bucket(group, flat) for group, flat in zip(groups, slices, strict=True)]
