"""Kernel distance of two sets of features (Binkowski et al., Demystifying MMD GANs, ICLR 2018)."""

import numpy as np
from numpy.typing import NDArray

from Evaluation.feature_statistics import Array, Features, Statistics


def _kernel(a: Array, b: Array) -> Array:
    """Compute the cubic kernel (x.y / D + 1) ** 3 of all pairs, (len(a), len(b))."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def squared_mmd(a: Array, b: Array) -> float:
    """Estimate the squared maximum mean discrepancy of features (N, D) and (M, D).

    Section 2 of the paper; unbiased, so it can be negative.
    """
    within = 0.0
    for x in (a, b):
        kernel = _kernel(x, x)
        within += (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
    return float(within - 2 * _kernel(a, b).mean())


def measure(generated: Features, real: Statistics, name: str, seed: int) -> dict[str, float]:
    """Measure kid; see `Evaluation.metrics.Metric`."""
    assert real.features is not None
    value, error = kernel_distance(generated, real.features, seed=seed)
    return {name: value, f"{name}, standard error": error}


def kernel_distance(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Average the squared discrepancy over random subsets, and find its standard error.

    The error is that of the distance between the whole sets, by the delete-d jackknife (Shao and
    Wu, 1989) over the same subsets, and that of taking no more subsets than these.

    Args:
        a: features (N, D).
        b: features (M, D).
        subsets: how many are drawn.
        subset_size: images of each set in a subset, at most half the smaller set.
        seed: of the draws.

    Returns:
        Distance and standard error; multiply by 1000 for the usual tables.
    """
    n = min(len(a), len(b))
    size = min(subset_size, n // 2)
    rng = np.random.default_rng(seed)

    def draw(x: NDArray[np.floating]) -> Array:
        return x[rng.choice(len(x), size, replace=False)].astype(np.float64)

    values = np.array([squared_mmd(draw(a), draw(b)) for _ in range(subsets)])
    share = size / (n - size) + 1 / subsets  # of the sets, and of the subsets that are drawn
    return float(values.mean()), float(values.std() * np.sqrt(share))
