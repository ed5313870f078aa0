"""Measure a parser against label maps, and show where it fails."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from Compression.content import ContentParser
from Compression.content_picture import colours, paint
from Compression.parser_augmentation import Batch, reduce_images
from Util.pictures import captioned, grid, headed


@dataclass(frozen=True)
class Scores:
    """Agreement with the label maps; every IoU is one ratio over all pixels of all pictures.

    Attributes:
        class_iou: intersection over union per class, NaN for a class in neither the label maps
            nor the predictions.
        occurs: classes that occur in the label maps.
        mean_iou: mean of `class_iou` over those.
        content_iou: intersection over union of the content masks; 1.0 if both are empty.
        class_names: as the parser has them.
    """

    class_iou: Tensor
    occurs: Tensor
    mean_iou: float
    content_iou: float
    class_names: tuple[str, ...]


def confusion_matrix(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Count the pixels of class `row` predicted as `column`: (n_classes, n_classes), int64."""
    pairs = labels.flatten() * n_classes + predicted.flatten()
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def scores_of(confusion: Tensor, is_content: Tensor, class_names: tuple[str, ...]) -> Scores:
    """Compute the scores of a confusion matrix.

    Args:
        confusion: (n_classes, n_classes), rows are the label maps' classes.
        is_content: (n_classes,), bool.
        class_names: one for each class.
    """
    counts = confusion.double().cpu()
    is_content = is_content.bool().cpu()
    hits = counts.diagonal()
    class_iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    occurs = counts.sum(1) > 0
    both = counts[is_content][:, is_content].sum()
    either = counts.sum() - counts[~is_content][:, ~is_content].sum()
    content_iou = float(both / either) if either > 0 else 1.0
    return Scores(class_iou, occurs, float(class_iou[occurs].mean()), content_iou, class_names)


@torch.no_grad()
def evaluate(
    parser: ContentParser, batches: Iterable[Batch], image_size: int | None = None
) -> Scores:
    """Compare a parser's class maps with label maps, as pictures are parsed in use.

    Args:
        parser: the parser; its network is put into eval mode.
        batches: pictures (N, 3, H, W) in [-1, 1] and label maps of the parser's input size.
        image_size: as for `Augmentation`.
    """
    parser.eval()
    n_classes, device = len(parser.network.class_names), parser.is_content.device
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=device)
    for images, labels in batches:
        predicted = parser.parse(reduce_images(images.to(device), image_size))
        confusion += confusion_matrix(predicted, labels.to(device), n_classes)
    return scores_of(confusion, parser.is_content, parser.network.class_names)


@torch.no_grad()
def worst_cases(
    parser: ContentParser, batches: Iterable[Batch], image_size: int | None = None, n: int = 8
) -> np.ndarray:
    """Draw the pictures whose own mean IoU is lowest, the worst first.

    Args:
        parser: see `evaluate`, as the further arguments.
        batches: at least one.
        image_size: see `evaluate`.
        n: pictures at most.

    Returns:
        Picture, label map, class map, and white where they differ, (H, W, 3) bytes.
    """
    worst: list[tuple[float, Tensor, Tensor, Tensor]] = []
    names, is_content = parser.network.class_names, parser.is_content
    for images, labels in batches:
        predicted = parser.parse(reduce_images(images.to(is_content.device), image_size)).cpu()
        for image, label, own in zip(images, labels, predicted, strict=True):
            confusion = confusion_matrix(own, label, len(names))
            worst.append((scores_of(confusion, is_content, names).mean_iou, image, label, own))
        worst = sorted(worst, key=lambda case: case[0])[:n]
    _, *tensors = zip(*worst, strict=True)
    pictures, maps, found = (torch.stack(list(column)) for column in tensors)
    palette, size = colours(len(names)), pictures.shape[2:]
    wrong = (maps != found).float().unsqueeze(1).expand(-1, 3, *size) * 2 - 1
    rows = {
        "picture": pictures,
        "label map": paint(maps, palette),
        "parser": paint(found, palette),
        "wrong": wrong,
    }
    strips = {name: grid(images, len(worst), gap=4) for name, images in rows.items()}
    texts = [f"{case[0]:.2f}" for case in worst]
    strips["mean IoU"] = headed(texts, strips["picture"].shape[1], size=14)
    return captioned(strips)
