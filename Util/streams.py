"""Seeded random streams that are independent of each other and of PyTorch's global one."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The random stream of a key, such as (seed, purpose), from its start.

    Streams of different keys are independent, also where the keys differ in one number only; but a
    key is that with a 0 after it, so those of one purpose have equally many numbers.

    Args:
        key: numbers >= 0.
        device: where the numbers are drawn; the same key means other numbers on another kind.
    """
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the block's numbers on the CPU from a seed; every stream then goes on where it was."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would start the GPUs' streams anew as well.
        torch.default_generator.manual_seed(seed)
        yield
