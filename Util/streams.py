"""Seeded random streams that are independent of each other and of PyTorch's global one."""

import numpy as np
import torch


def stream(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The random stream of a key, such as (seed, purpose), from its start.

    Streams of different keys are independent, also where the keys differ in one number only.

    Args:
        key: numbers >= 0.
        device: where the numbers are drawn; the same key means other numbers on another kind.
    """
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)
