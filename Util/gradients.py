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
                parameter.register_hook(partial(self._complete, bucket, parameter))

    def start(self) -> None:
        """Forget the gradients of the last update."""
        for parameter in self.parameters:
            parameter.grad = None

    def backward(self, loss: Tensor, extra: Tensor | None = None) -> None:
        """Add the gradients of a loss; they are not accumulated by PyTorch, tensor by tensor.

        Args:
            loss: scalar.
            extra: in an update's last call, a scalar that is averaged with the gradients. The
                transfers then start while the gradients are computed.
        """
        if extra is not None:
            self._arm(extra)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if not (self._armed and self._buckets):  # else `_complete` has taken them one by one
            self._add(self.parameters, found)

    def _arm(self, extra: Tensor) -> None:
        self._extra = extra
        if self._buckets:
            self._buckets[-1].extra.copy_(extra)
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    @staticmethod
    def _add(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
        if known := [(p.grad, g) for p, g in pairs if p.grad is not None]:
            torch._foreach_add_([grad for grad, _ in known], [g for _, g in known])
        fresh = [(p, g) for p, g in pairs if p.grad is None]
        for parameter, grad in zip([p for p, _ in fresh], _laid_out(fresh), strict=True):
            parameter.grad = grad

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

    def _complete(self, bucket: "_Bucket", parameter: nn.Parameter, grad: Tensor) -> None:
        """Take a complete gradient; called by autograd."""
        if not self._armed:
            return
        self._add([parameter], [grad])
        bucket.missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._buckets[self._next].send()
            self._next += 1


def _laid_out(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
    """Gradients in the layout of their parameters, which the fused Adam asks for."""
    found = {i: g for i, (p, g) in enumerate(pairs) if not _alike(p, g)}
    copies = [torch.empty_like(pairs[i][0]) for i in found]
    if copies:
        torch._foreach_copy_(copies, list(found.values()))
    replaced = dict(zip(found, copies, strict=True))
    return [replaced.get(i, grad) for i, (_, grad) in enumerate(pairs)]


def _alike(a: Tensor, b: Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(side == 1 or one == other for side, one, other in strides)


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
