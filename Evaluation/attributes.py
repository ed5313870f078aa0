"""A judge that no training sees: a classifier of what pictures show (`Model.attribute_classifier`).

Attribute agreement is the share of attributes that a student's picture has in common with the
teacher's of the same latent. Two pictures of different latents agree now and then, too: the
`floor`, without which an agreement says little.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from Model.attribute_classifier import AttributeClassifier

Values = Mapping[str, Tensor]
"""Attribute -> index of its value for every picture, (N,) int64."""


@torch.no_grad()
def values_of(
    classifier: AttributeClassifier, images: Tensor, batch: int = 128
) -> dict[str, Tensor]:
    """Classify images (N, 3, H, W), nominally in [-1, 1]."""
    parts = [classifier(part) for part in images.split(batch)]
    return {
        name: torch.cat([part[name].argmax(dim=1) for part in parts])
        for name in classifier.attributes
    }


def agreement(a: Values, b: Values) -> dict[str, float]:
    """Compute the share of pictures with equal values, for every attribute."""
    return {name: (a[name] == b[name]).double().mean().item() for name in a}


def floor(values: Values) -> dict[str, float]:
    """Compute the agreement of two different pictures, chosen evenly among all pairs.

    With counts n_v of the values among N pictures: sum over v of n_v (n_v - 1) / (N (N - 1)).
    """
    found = {}
    for name, column in values.items():
        counts, n = column.bincount().double(), len(column)
        found[name] = ((counts * (counts - 1)).sum() / (n * (n - 1))).item()
    return found


def summary(shares: Mapping[str, float], classifier: AttributeClassifier) -> dict[str, float]:
    """Average shares over all attributes, over those inside the content and over those outside."""
    inside = [share for name, share in shares.items() if name in classifier.inside]
    outside = [share for name, share in shares.items() if name not in classifier.inside]
    groups = {"all": [*inside, *outside], "inside": inside, "outside": outside}
    return {name: sum(group) / len(group) for name, group in groups.items() if group}


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Write shares of attributes as a Markdown table, a column for each mapping."""
    names = list(next(iter(columns.values())))
    head = f"| attribute | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    rows = [
        f"| {name} | {' | '.join(f'{column[name]:.3f}' for column in columns.values())} |"
        for name in names
    ]
    return "\n".join([head, *rows])
