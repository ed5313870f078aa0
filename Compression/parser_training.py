"""Training and evaluating a parser on pictures with label maps."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from Compression.content import ContentParser
from Model.face_parser import BiSeNet

CELEBAMASK_NAMES = (
    *("background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear"),
    *("ear_r", "nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat"),
)
CELEBAMASK_FLIP_PAIRS = ((2, 3), (4, 5), (7, 8))

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied.

    Attributes:
        flip_pairs: pairs of classes that change places when a picture is mirrored.
        image_size: side in pixels that pictures are reduced to before the parser enlarges them
            again, as it does with the pictures of a small generator; None leaves them as they are.
        rotation: largest angle in degrees, either way.
        log_scale: largest change of the natural logarithm of the size, either way.
        shift: largest shift as a fraction of the side, either way.
        colour: largest relative change of brightness, contrast, saturation and of each channel.
        noise: largest standard deviation of white noise, images in [-1, 1].
    """

    flip_pairs: Sequence[tuple[int, int]] = ()
    image_size: int | None = None
    rotation: float = 10.0
    log_scale: float = 0.15
    shift: float = 0.06
    colour: float = 0.2
    noise: float = 0.05


@dataclass(frozen=True)
class Scores:
    """Agreement with the label maps; every IoU is one ratio over all pixels of all pictures.

    Attributes:
        class_iou: intersection over union per class, NaN for a class in neither the label maps
            nor the predictions.
        occurs: classes that occur in the label maps.
        mean_iou: mean of `class_iou` over those.
        content_iou: intersection over union of the content masks; 1.0 if both are empty.
    """

    class_iou: Tensor
    occurs: Tensor
    mean_iou: float
    content_iou: float


@dataclass(frozen=True)
class TrainingPlan:
    """Length and learning rate of a training run.

    Attributes:
        iterations: optimiser steps.
        learning_rate: the highest, reached after the warm-up; it ends at zero along a cosine.
        warm_up: fraction of the steps in which it rises linearly.
        weight_decay: AdamW's.
        aux_weight: weight of each auxiliary output's loss.
    """

    iterations: int
    learning_rate: float = 0.01
    warm_up: float = 0.05
    weight_decay: float = 1e-4
    aux_weight: float = 0.2
    augmentation: Augmentation = field(default_factory=Augmentation)


def flip(images: Tensor, labels: Tensor, chosen: Tensor, pairs: Sequence[tuple[int, int]]) -> Batch:
    """Mirrors some pictures, left and right classes changing places.

    Args:
        images: (N, 3, H, W).
        labels: (N, H, W), int64.
        chosen: (N,), bool: which to mirror.
        pairs: classes that are each other's mirror image.
    """
    classes = 1 + max([int(labels.max()), *(c for pair in pairs for c in pair)])
    swapped = torch.arange(classes, device=labels.device)
    for a, b in pairs:
        swapped[a], swapped[b] = b, a
    images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)
    return images, torch.where(chosen.view(-1, 1, 1), swapped[labels.flip(2)], labels)


def _uniform(count: int, limit: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """(count,) draws from [-limit, limit]; drawn on the CPU, so that a seed means the same run."""
    return (torch.rand(count, generator=generator) * 2 - 1).mul(limit).to(like.device)


def _move(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> Batch:
    """Rotates, scales and shifts half of the pictures; what comes in at the border repeats it."""
    n = len(images)
    limits = torch.tensor((math.radians(how.rotation), how.log_scale, 2 * how.shift, 2 * how.shift))
    moving = torch.rand(n, generator=generator) < 0.5
    draws = (torch.rand(4, n, generator=generator) * 2 - 1) * limits.view(4, 1) * moving
    angle, log_scale, shift_x, shift_y = draws.to(images.device)
    scale = log_scale.exp()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (torch.stack((cos, -sin, shift_x), 1), torch.stack((sin, cos, shift_y), 1))
    size = [n, 1, *images.shape[2:]]
    grid = F.affine_grid(torch.stack(rows, 1), size, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    moved = F.grid_sample(
        labels.unsqueeze(1).float(), grid, "nearest", "border", align_corners=False
    )
    return images, moved.squeeze(1).long()


def _recolour(images: Tensor, limit: float, generator: torch.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and the channels' balance."""
    n = len(images)

    def factor() -> Tensor:
        return 1 + _uniform(n, limit, images, generator).view(-1, 1, 1, 1)

    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor() + mean + (factor() - 1)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * factor() + grey
    balance = torch.cat([factor() for _ in range(3)], dim=1)
    return ((images + 1) * balance - 1).clamp(-1, 1)


def _degrade(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Blurs half of the pictures by differing amounts and adds noise to half of them.

    Pictures of a generator in training are slightly soft and slightly noisy.
    """
    n = len(images)
    kernel = torch.tensor((0.25, 0.5, 0.25), device=images.device)
    weight = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    blur = _uniform(n, 1.0, images, generator).clamp(min=0).view(-1, 1, 1, 1)
    sigma = _uniform(n, noise, images, generator).clamp(min=0).view(-1, 1, 1, 1)
    draw = torch.randn(images.shape, generator=generator).to(images.device)
    return images + blur * (soft - images) + sigma * draw


def reduce_images(images: Tensor, size: int | None) -> Tensor:
    """Area-averages pictures (N, 3, H, W) to (N, 3, size, size); None leaves them as they are."""
    return images if size is None else F.interpolate(images, (size, size), mode="area")


def augment(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> Batch:
    """Varies a batch and reduces the pictures to `how.image_size`.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        labels: (N, H, W), int64.
        how: the limits of the variation.
        generator: a CPU generator that all draws come from.

    Returns:
        Pictures (N, 3, H', W'), about [-1, 1], and label maps (N, H, W).
    """
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    images, labels = flip(images, labels, chosen, how.flip_pairs)
    images, labels = _move(images, labels, how, generator)
    images = _recolour(images, how.colour, generator)
    return _degrade(reduce_images(images, how.image_size), how.noise, generator), labels


def segmentation_loss(outputs: Sequence[Tensor], labels: Tensor, aux_weight: float) -> Tensor:
    """Cross-entropy of the main output plus `aux_weight` times that of each other output.

    Args:
        outputs: logits (N, n_classes, h, w), the main output first. Where they are smaller than the
            label maps, those are reduced to the nearest value.
        labels: (N, H, W), int64.
        aux_weight: weight of the auxiliary losses (BiSeNet paper, equation 2; 1 there).
    """

    def cross_entropy(logits: Tensor) -> Tensor:
        target = labels
        if logits.shape[2:] != labels.shape[1:]:
            reduced = F.interpolate(labels.unsqueeze(1).float(), logits.shape[2:], mode="nearest")
            target = reduced.squeeze(1).long()
        # Classes last: softmax then runs over contiguous values, twice as fast on a CPU.
        return F.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), target.flatten())

    main, *others = (cross_entropy(logits) for logits in outputs)
    return main + aux_weight * sum(others, start=torch.zeros_like(main))


def confusion_matrix(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(n_classes, n_classes), int64: pixels of class `row` that were predicted as `column`."""
    pairs = labels.flatten() * n_classes + predicted.flatten()
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def scores_of(confusion: Tensor, is_content: Tensor) -> Scores:
    """Scores from a confusion matrix.

    Args:
        confusion: (n_classes, n_classes), rows are the label maps' classes.
        is_content: (n_classes,), bool.
    """
    counts = confusion.double().cpu()
    is_content = is_content.bool().cpu()
    hits = counts.diagonal()
    class_iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    occurs = counts.sum(1) > 0
    both = counts[is_content][:, is_content].sum()
    either = counts.sum() - counts[~is_content][:, ~is_content].sum()
    content_iou = float(both / either) if either > 0 else 1.0
    return Scores(class_iou, occurs, float(class_iou[occurs].mean()), content_iou)


@torch.no_grad()
def evaluate(
    parser: ContentParser, batches: Iterable[Batch], image_size: int | None = None
) -> Scores:
    """Compares a parser's class maps with label maps, the way pictures are parsed in use.

    Args:
        parser: the parser; its network is put into eval mode.
        batches: pictures (N, 3, H, W) in [-1, 1] and label maps of the parser's input size.
        image_size: as for `Augmentation`.
    """
    parser.eval()
    n_classes, device = parser.network.n_classes, parser.is_content.device
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=device)
    for images, labels in batches:
        predicted = parser.parse(reduce_images(images.to(device), image_size))
        confusion += confusion_matrix(predicted, labels.to(device), n_classes)
    return scores_of(confusion, parser.is_content)


def learning_rate_factor(step: int, plan: TrainingPlan) -> float:
    """Fraction of the highest learning rate at a step: linear warm-up, then half a cosine."""
    warm_up = max(1, round(plan.warm_up * plan.iterations))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, plan.iterations - warm_up)
    return 0.5 * (1 + math.cos(math.pi * progress))


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Goes through a loader's batches again and again."""
    while True:
        yield from loader


def _optimiser(network: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    # Decay is for filters; on normalisation's gains and offsets it only shrinks the signal.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate)


def train(
    network: BiSeNet,
    batches: Iterator[Batch],
    plan: TrainingPlan,
    generator: torch.Generator,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains a parser in place.

    Args:
        network: the parser, on the device to train on.
        batches: pictures (N, 3, H, W) in [-1, 1], N > 1, and label maps of the network's input
            size (N, input_size, input_size), int64.
        plan: length, learning rate, augmentation.
        generator: a CPU generator that the augmentation draws from.
        after_step: called with the number of steps done and the loss. It may evaluate the network
            and need not restore its mode.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    parser = ContentParser(network, classes_excluded=())
    optimiser = _optimiser(network, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, plan)
    )
    for step in range(1, plan.iterations + 1):
        images, labels = (part.to(parser.is_content.device) for part in next(batches))
        images, labels = augment(images, labels, plan.augmentation, generator)
        network.train()
        images = network.prepare(images).contiguous(memory_format=torch.channels_last)
        main, *others = network.all_logits(images)
        # The auxiliary outputs only guide the lower layers; small maps do, and are far cheaper.
        outputs = (network.upsample(main, images.shape[2:]), *others)
        loss = segmentation_loss(outputs, labels, plan.aux_weight)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} in step {step}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        after_step(step, loss.item())
