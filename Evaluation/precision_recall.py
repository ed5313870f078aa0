"""Improved precision and recall of two sets of features (Kynkaanniemi et al., NeurIPS 2019)."""

import torch
from torch import Tensor

from Evaluation.feature_statistics import Features, Statistics


def measure(generated: Features, real: Statistics, name: str, seed: int) -> dict[str, float]:
    """Measure pr; see `Evaluation.metrics.Metric`."""
    assert real.features is not None
    found = precision_recall(torch.from_numpy(generated), torch.from_numpy(real.features))
    return dict(zip(("precision", "recall"), found, strict=True))


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Compute the distance of every point to its k-th nearest other point, (N,)."""
    parts = [torch.cdist(part, features) for part in features.split(chunk)]
    return torch.cat([part.kthvalue(k + 1, dim=1).values for part in parts])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Compute the share of the points that lie in at least one of the balls."""
    inside = [(torch.cdist(p, centres) <= radii).any(dim=1) for p in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def precision_recall(
    generated: Tensor, real: Tensor, k: int = 3, chunk: int = 2048
) -> tuple[float, float]:
    """Find the share of generated images among the real ones, and of real among generated.

    A point is among others if it lies in a ball around one of them that reaches to its k-th nearest
    neighbour in its own set (eq. 1 and 2).

    Args:
        generated: features (N, D), N > k.
        real: features (M, D), M > k.
        k: neighbours.
        chunk: points compared at a time; bounds the memory.

    Returns:
        Precision and recall, each in [0, 1].
    """
    precision = _share_inside(generated, real, _radii(real, k, chunk), chunk)
    recall = _share_inside(real, generated, _radii(generated, k, chunk), chunk)
    return precision, recall
