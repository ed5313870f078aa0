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
        images: of a process.
        peak: bytes of tensors at most, besides the networks.
        fixed: of these, bytes that do not depend on the batch.
        free: bytes that can be had; None where nothing tells.
        processes: that share the batch, with equally many images each.
        part: images that a process computes at a time (--batch_gpu); 0: all.
    """

    images: int
    peak: int
    fixed: int
    free: int | None
    processes: int = 1
    part: int = 0

    @property
    def together(self) -> int:
        """Images that a process computes at a time."""
        return min(self.part or self.images, self.images)

    @property
    def fits(self) -> bool:
        """Whether there is as much free as the tensors take; workspaces are not counted."""
        return self.free is None or self.peak <= self.free

    @property
    def largest(self) -> int:
        """Images that a process can compute at a time, of whole groups if any fits; 0 if none does.

        With other groups than those that were counted, the discriminator would take more.
        """
        if self.free is None:
            return self.together
        most = int(max(0, self.free - self.fixed) * self.together // max(1, self.peak - self.fixed))
        return most - most % GROUP if most >= GROUP else most

    @property
    def remedy(self) -> str:
        """What to do where it does not fit."""
        if self.processes == 1 and self.together == self.images:
            return f"take {self.largest} or less" if self.largest else "even one does not fit"
        groups = self.largest >= GROUP and self.images % GROUP == 0
        divided = f"--batch_gpu {self.largest}" if groups else ""
        whole = self.largest * self.processes if self.together == self.images else 0
        choices = [divided, f"a batch of {whole} or less" if whole else ""]
        found = " or ".join(choice for choice in choices if choice)
        return f"take {found}" if found else "fewer at a time do not fit either"

    def _who(self) -> str:
        if self.processes == 1 and self.together == self.images:
            return f"a batch of {self.images} images takes"
        parts = f", {self.together} at a time," if self.together < self.images else ""
        return f"each process with {self.images} images{parts} takes"

    def __str__(self) -> str:
        free = "" if self.free is None else f" of {self.free / GIB:.3g} GiB that are free"
        return (
            f"{self._who()} at least {self.peak / GIB:.3g} GiB{free},"
            f" {self.fixed / GIB:.3g} of them whatever the batch"
        )


def need(trainer: Trainer) -> Need:
    """Count what an iteration with all its phases takes in a process, without computing it.

    No other process takes part; see `Util.memory.imagined`. Groups of images that lie in several
    processes are left out: a few maps of 4 x 4.
    """
    processes, size = distributed.world_size(), trainer.generator.size
    images = trainer.settings.batch_size // processes
    with imagined(trainer) as (copied, meter), distributed.alone():
        copied.iteration = 0  # where all regularisers are due
        for update in copied.updates:
            update.keep_to_itself()
        real = torch.empty(images, 3, size, size, device=trainer.device)
        copied.iterate(real)
        peak = meter.peak
    # A gradient and, in new optimisers, the two moments of Adam.
    fixed = 0
    for update in trainer.updates:
        held = sum(p.numel() * p.element_size() for p in update.network.parameters())
        fixed += held * (1 if update.adam.state else 3)
    free, part = _own_share(trainer.device), trainer.settings.batch_gpu
    return Need(images, peak, min(fixed, peak), free, processes, part)


def _own_share(device: torch.device) -> int | None:
    """Free bytes for this process; those of a machine's CPUs share its memory."""
    free = free_bytes(device)
    if free is None or device.type != "cpu":
        return free
    return free // distributed.local_processes()


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
    if not (always or _may_not_fit(trainer)):
        return
    try:
        found = need(trainer)
    except Exception as error:  # some term computes what has no shape; that stops no training
        announce(f"memory: not counted ({type(error).__name__})")
        return
    if not found.fits:
        raise SettingError("batch_size", f"{found}; {found.remedy}")
    if always:
        announce(f"memory: {found}")
    if found.free is not None and found.peak * MORE_THAN_COUNTED > found.free:
        safe = int(found.largest / MORE_THAN_COUNTED)
        at_once = "" if found.together == found.images else " at a time"
        announce(
            f"warning: {found}; convolutions need more, {safe} images{at_once} are on the safe side"
        )


def _may_not_fit(trainer: Trainer) -> bool:
    """Whether a bound from above exceeds what is free.

    An iteration of the full-size networks takes no more than 128 bytes for each pixel and channel
    of the widest layer; perceptual network and parser, less than a GiB.
    """
    free = _own_share(trainer.device)
    if free is None:
        return False
    full = trainer.teacher.generator if trainer.teacher else trainer.generator
    widest = max(*trainer.generator.channels, *full.channels, *trainer.discriminator.channels)
    own = trainer.settings.batch_size // distributed.world_size()
    pixels = min(own, trainer.settings.batch_gpu or own) * trainer.generator.size**2
    return GIB + 128 * pixels * widest > free
