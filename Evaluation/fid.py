"""Frechet distance between two sets of features."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_and_covariance(features: NDArray[np.floating]) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet distance of two normal distributions (Heusel et al., 2017, eq. 6).

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
