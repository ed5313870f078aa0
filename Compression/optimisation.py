"""One update of a network: from a loss, or those of a batch's parts, to a step of Adam.

backward, averaged over the processes -> finite? -> clipped -> Adam, unless the answer was no

Nothing here waits for the device: whether gradients are finite is found, acted upon and remembered
there, and read by the host later (`Judge`).
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from Util import distributed
from Util.gradients import Gradients


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names it and the iteration."""


def lazy_adam(parameters: Iterable[nn.Parameter], lr: float, every: int) -> Adam:
    """Adam with betas (0, 0.99), corrected for a regulariser of its own step every k iterations.

    StyleGAN2, appendix B: with c = k / (k + 1), the learning rate is lr * c and the betas are to
    the power of c. ``every`` 0 means no such regulariser.
    """
    ratio = every / (every + 1) if every else 1.0
    # One operator for all parameters, which leaves out a step if a flag on the device says so.
    return Adam(parameters, lr=lr * ratio, betas=(0.0, 0.99**ratio), fused=True)


def restore(optimizer: Adam, saved: dict[str, Any]) -> None:
    """Load an optimiser's state, but for the options, which are those of the settings.

    Raises:
        ValueError: a moment is not finite or not of its parameter's shape.
    """
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    # With the options they have here: where a moment goes depends on them.
    groups = zip(saved["param_groups"], options, strict=True)
    optimizer.load_state_dict({**saved, "param_groups": [{**g, **own} for g, own in groups]})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                shape = torch.Size() if key == "step" else parameter.shape
                if value.shape != shape or not value.isfinite().all():
                    raise ValueError(f"the optimiser's {key} does not fit")


class LossScale:
    """Scales the loss so that small float16 gradients do not vanish, as PyTorch's GradScaler does.

    It halves when gradients overflow, whose step is left out, and doubles after 2000 steps without.

    Args:
        device: where it is kept.
        enabled: False scales by nothing.

    Attributes:
        value: the factor, a scalar.
    """

    LOWEST = 2.0**-8
    """Where gradients overflow still, they are not finite for another reason."""
    PATIENCE = 2000

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), 2.0**16, dtype=torch.float32, device=device)
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflowed: Tensor) -> None:
        """Follow a step, of which a float scalar tells by 1 that it overflowed."""
        torch._amp_update_scale_(self.value, self._steps, overflowed, 2.0, 0.5, self.PATIENCE)

    def state_dict(self) -> dict[str, Any]:
        """The state under GradScaler's names; empty where nothing is scaled."""
        names = {"scale": self.value.item(), "_growth_tracker": self._steps.item()}
        fixed = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": self.PATIENCE}
        return names | fixed if self.enabled else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError: it is not a positive finite factor and a number of steps.
        """
        value, steps = float(saved["scale"]), operator.index(saved["_growth_tracker"])
        if not 0 < value < math.inf:
            raise ValueError(f"the loss scale is {value}")
        self.value.fill_(value)
        self._steps.fill_(steps)


class Judge:
    """Whether every loss and averaged gradient so far was finite, kept on the device.

    From the first that was not, `failed` forbids every further step: the networks stay as they were
    before it. On a CPU the host looks at once; on a GPU, which works behind it, it looks at the end
    of each iteration at the verdict on the last one, which is there by then.

    Args:
        device: of the networks.
        at_once: look after every step; None: on a CPU.

    Attributes:
        failed: bool scalar on the device.
    """

    def __init__(self, device: torch.device, at_once: bool | None = None) -> None:
        self.at_once = device.type == "cpu" if at_once is None else at_once
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self._seen: dict[str, Tensor] = {}
        self._names: dict[str, Sequence[str]] = {}
        self._on_gpu = device.type == "cuda"
        self._posted = torch.zeros((), dtype=torch.bool, pin_memory=self._on_gpu)
        self._event: torch.cuda.Event | None = None

    def judge(
        self, phase: str, names: Sequence[str], norms: Tensor, loss: Tensor, forgiven: Tensor | None
    ) -> Tensor:
        """Judge a step before it is made.

        Args:
            phase: what computed the loss.
            names: of the parameters.
            norms: of their gradients, (parameters,).
            loss: scalar.
            forgiven: bool scalar: what is not finite is no failure, since float16 may have
                overflowed; None: it is one.

        Returns:
            Float scalar, 1 where the step must be left out.
        """
        seen = torch.cat([norms, loss.to(norms.dtype).view(1)])
        known = self._seen.get(phase)
        self._seen[phase] = seen if known is None else torch.where(self.failed, known, seen)
        self._names[phase] = names
        total = seen.sum()
        bad = (total - total).ne(0)  # of what is not finite, not a number
        if forgiven is None:
            self.failed = self.failed | bad
            return self.failed.float()
        self.failed = self.failed | (bad & ~forgiven)
        return (self.failed | bad).float()

    def post(self) -> None:
        """Send the verdict on its way to the host."""
        self._posted.copy_(self.failed, non_blocking=True)
        if self._on_gpu:
            self._event = torch.cuda.Event()
            self._event.record()

    def posted(self) -> bool:
        """What the last `post` sent; on a GPU, waits until it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._posted.numpy())

    def reason(self) -> str:
        """Say which loss or gradient failed; for the host, which waits."""
        for phase, seen in self._seen.items():
            *norms, loss = seen.tolist()
            bad = [
                n for n, v in zip(self._names[phase], norms, strict=True) if not math.isfinite(v)
            ]
            if not math.isfinite(loss):
                return f"the {phase} loss is {loss}"
            if bad:
                of = f"{len(bad)} of {len(norms)} parameters" if len(bad) > 1 else "one parameter"
                return (
                    f"the gradient of the {phase} loss ({loss:.4g}) by {bad[0]} is not finite"
                    f" ({of})"
                )
        return "a loss or a gradient is not finite"


@dataclass(frozen=True)
class Part:
    """Images of a batch that pass through the networks together.

    Attributes:
        groups: the batch is seen as this many rows of images, in order; see `minibatch_stddev`.
        first: column that the part begins at.
        last: column that it ends before.
        share: of the batch.
    """

    groups: int
    first: int
    last: int
    share: float

    def of(self, batch: Tensor) -> Tensor:
        """Its rows of a tensor whose first dimension is the batch."""
        if self.share == 1:
            return batch
        columns = batch.unflatten(0, (self.groups, -1))[:, self.first : self.last]
        return columns.flatten(0, 1)

    def weigh(self, mean: Tensor) -> Tensor:
        """What a mean over the part adds to the mean over the batch."""
        return mean if self.share == 1 else mean * self.share


def divide(n: int, size: int, groups: int = 1) -> list[Part]:
    """Divide a batch of n images into parts of at most ``size``, each of whole columns.

    Args:
        n: images, a multiple of ``groups`` unless there is one part.
        size: a multiple of ``groups``; 0 means all.
        groups: see `Part`.
    """
    if not size or size >= n:
        return [Part(1, 0, n, 1.0)]
    columns, step = n // groups, size // groups
    starts = range(0, columns, step)
    ends = [min(start + step, columns) for start in starts]
    return [Part(groups, a, b, (b - a) / columns) for a, b in zip(starts, ends, strict=True)]


class Update:
    """A trained network, its Adam, and the way from a loss to a step.

    Args:
        network: has the parameters.
        adam: of the same.
        judge: of the run.
        scale: of the run.
        clip: largest norm of the gradients; 0: any.
        order: the parameters in the order in which backward completes them.
    """

    def __init__(
        self,
        network: nn.Module,
        adam: Adam,
        judge: Judge,
        scale: LossScale,
        clip: float = 0.0,
        order: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.network, self.adam, self.clip = network, adam, clip
        self.rate = adam.param_groups[0]["lr"]
        self.judge, self.scale = judge, scale
        self.names = [name for name, p in network.named_parameters() if p.requires_grad]
        own = list(network.parameters())
        self.gradients = Gradients(own, reversed(own) if order is None else order)

    def slow_down(self, factor: float) -> None:
        """Take steps at a share of the learning rate from now on."""
        for group in self.adam.param_groups:
            group["lr"] = factor * self.rate

    def keep_to_itself(self) -> None:
        """Exchange no gradients with other processes from now on."""
        with distributed.alone():
            self.gradients = Gradients(self.gradients.parameters)

    def step(
        self, phase: str, parts: Sequence[Part], loss_of: Callable[[Part], Tensor]
    ) -> dict[str, Tensor]:
        """Back-propagate a batch's loss, average the gradients over the processes, and update.

        Args:
            phase: what computes the loss.
            parts: of the batch.
            loss_of: a part's share of the loss; called once for each, when its turn comes.

        Returns:
            ``norm`` of the gradients, and with a loss scale whether the step was ``skipped``.
        """
        self.gradients.start()
        total: Tensor | None = None
        for part in parts:
            loss = loss_of(part)
            total = loss.detach() if total is None else total + loss.detach()
            scaled = loss * self.scale.value if self.scale.enabled else loss
            self.gradients.backward(scaled, total if part is parts[-1] else None)
        gradients, mean_loss = self.gradients.finish()
        norms = torch.stack(torch._foreach_norm(gradients))
        forgiven = None
        if self.scale.enabled:
            # Judged after the average, so that all processes leave out the same steps.
            norms = norms / self.scale.value
            forgiven = self.scale.value > self.scale.LOWEST
        norm = torch.linalg.vector_norm(norms)
        left_out = self.judge.judge(phase, self.names, norms, mean_loss, forgiven)
        if self.clip:
            factor = (self.clip / (norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, factor)
        self.adam.found_inf = left_out  # type: ignore[attr-defined]
        self.adam.grad_scale = self.scale.value if self.scale.enabled else None  # type: ignore[attr-defined]
        self.adam.step()
        if not self.scale.enabled:
            return {"norm": norm}
        self.scale.update(left_out)
        return {"norm": norm, "skipped": left_out}


@torch.no_grad()
def accumulate(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move an exponential moving average towards a network's parameters."""
    old: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(old, list(network.parameters()), 1 - decay)
