"""Which images make up the batches, in which order."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Item = tuple[int, bool]
"""Index of an image, and whether it is flipped left to right."""


class EndlessBatches(Sampler[list[Item]]):
    """Indices of an endless stream of full batches, a pure function of the seed and a position.

    Epoch after epoch is a fresh permutation; a batch may span two epochs, so that none is partial.

    Args:
        length: images in the data set.
        batch_size: images per batch over all processes.
        seed: of permutations and mirroring.
        start: images already shown, where a resumed run goes on.
        mirror: flip each image left to right with probability 1/2.
        rank: this process takes images rank, rank + world, ... of every batch.
        world: number of processes; must divide ``batch_size``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        mirror: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch size {batch_size} is not divisible by {world} processes")
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.mirror, self.rank, self.world = mirror, rank, world

    def _epoch(self, epoch: int) -> list[Item]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.length).tolist()
        flips = (rng.random(self.length) < 0.5 * self.mirror).tolist()
        return list(zip(order, flips, strict=True))

    def _stream(self) -> Iterator[Item]:
        epoch, offset = divmod(self.start, self.length)
        while True:
            yield from self._epoch(epoch)[offset:]
            epoch, offset = epoch + 1, 0

    def __iter__(self) -> Iterator[list[Item]]:
        stream = self._stream()
        while True:
            batch = [next(stream) for _ in range(self.batch_size)]
            yield batch[self.rank :: self.world]


def in_order(n: int, size: int, rank: int = 0, world: int = 1) -> list[list[Item]]:
    """Divide the first ``n`` images into batches, in order, none flipped; one process's share.

    Batches have ``size`` images, the last one maybe fewer.
    """
    starts = range(rank * size, n, world * size)
    return [[(i, False) for i in range(start, min(start + size, n))] for start in starts]
