"""Frechet distance of two sets of features (Heusel et al., NeurIPS 2017)."""

import numpy as np

from Evaluation.feature_statistics import Array, Features, Statistics, statistics_of


def measure(generated: Features, real: Statistics, name: str, seed: int) -> dict[str, float]:
    """Measure fid; see `Evaluation.metrics.Metric`."""
    return {name: distance(statistics_of(generated, {}), real)}


def distance(a: Statistics, b: Statistics) -> float:
    """Compute the Frechet distance of two sets of the same features."""
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Compute the squared Frechet distance of two normal distributions (eq. 6).

    The trace of the matrix root is that of the symmetric A^(1/2) B A^(1/2), so two symmetric
    eigenvalue problems replace the general root: no imaginary parts, and singular covariances
    (fewer images than features) need no offset.

    Args:
        mean_a: (D,).
        cov_a: (D, D), symmetric and positive semidefinite.
        mean_b: (D,).
        cov_b: (D, D), likewise.

    Returns:
        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), >= 0 up to rounding.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
