"""Whether an iteration of training fits into the memory that is free, told before it begins."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from Compression.training import Trainer
from Model.discriminator import GROUP
from Util import distributed
from Util.memory import free_bytes, imagined
from Util.settings import SettingError

GIB = 2**30
MORE_THAN_COUNTED = 1.5
"""What a process needs for each byte of its tensors, about: convolutions have workspaces."""


@dataclass(frozen=True)
class Need:
    """What an iteration needs.

    Attributes:
        images: of a batch.
        peak: bytes of tensors at most, besides the networks.
        fixed: of these, bytes that do not depend on the batch.
        free: bytes that can be had; None where nothing tells.
    """

    images: int
    peak: int
    fixed: int
    free: int | None

    @property
    def fits(self) -> bool:
        """Whether there is as much free as the tensors take; workspaces are not counted."""
        return self.free is None or self.peak <= self.free

    @property
    def largest(self) -> int:
        """Images of the largest batch that fits, of whole groups if any does; 0 if none does.

        With other groups than those that were counted, the discriminator would take more.
        """
        if self.free is None:
            return self.images
        most = int(max(0, self.free - self.fixed) * self.images // max(1, self.peak - self.fixed))
        return most - most % GROUP if most >= GROUP else most

    def __str__(self) -> str:
        free = "" if self.free is None else f" of {self.free / GIB:.3g} GiB that are free"
        return (
            f"a batch of {self.images} images takes at least {self.peak / GIB:.3g} GiB{free},"
            f" {self.fixed / GIB:.3g} of them whatever the batch"
        )


def need(trainer: Trainer) -> Need:
    """Count what an iteration with all its phases takes, without computing it.

    In a run of one process; see `Util.memory.imagined`.
    """
    images, size = trainer.settings.batch_size, trainer.generator.size
    with imagined(trainer) as (copied, meter):
        copied.iteration = 0  # where all regularisers are due
        real = torch.empty(images, 3, size, size, device=trainer.device)
        copied.iterate(real)
        peak = meter.peak
    # A gradient and, in new optimisers, the two moments of Adam.
    fixed = 0
    for network, optimizer in (
        (trainer.generator, trainer.g_optim),
        (trainer.discriminator, trainer.d_optim),
    ):
        held = sum(p.numel() * p.element_size() for p in network.parameters())
        fixed += held * (1 if optimizer.state else 3)
    return Need(images, peak, min(fixed, peak), free_bytes(trainer.device))


def check_batch(trainer: Trainer, announce: Callable[[str], None], always: bool = False) -> None:
    """Refuse a batch that cannot fit, and warn of one that hardly does.

    Counting takes some seconds, so a batch that is small beyond doubt is not counted.

    Args:
        trainer: of the run, before its first iteration.
        announce: called with a line.
        always: count, and tell what was found.

    Raises:
        SettingError: names batch_size and the largest that fits.
    """
    if distributed.world_size() > 1 or not (always or _may_not_fit(trainer)):
        return
    try:
        found = need(trainer)
    except Exception as error:  # some term computes what has no shape; that stops no training
        announce(f"memory: not counted ({type(error).__name__})")
        return
    if not found.fits:
        remedy = f"take {found.largest} or less" if found.largest else "even one does not fit"
        raise SettingError("batch_size", f"{found}; {remedy}")
    if always:
        announce(f"memory: {found}")
    if found.free is not None and found.peak * MORE_THAN_COUNTED > found.free:
        safe = int(found.largest / MORE_THAN_COUNTED)
        announce(f"warning: {found}; convolutions need more, {safe} images are on the safe side")


def _may_not_fit(trainer: Trainer) -> bool:
    """Whether a bound from above exceeds what is free.

    An iteration of the full-size networks takes no more than 128 bytes for each pixel and channel
    of the widest layer; perceptual network and parser, less than a GiB.
    """
    free = free_bytes(trainer.device)
    if free is None:
        return False
    full = trainer.teacher.generator if trainer.teacher else trainer.generator
    widest = max(*trainer.generator.channels, *full.channels, *trainer.discriminator.channels)
    pixels = trainer.settings.batch_size * trainer.generator.size**2
    return GIB + 128 * pixels * widest > free
