"""Train the classifier of attributes on freshly rendered toon portraits, minutes on one core.

``python -m Evaluation.attribute_training`` renders, trains, and prints the accuracy per attribute
on pictures held out, beside chance: the share of the most frequent value.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from Dataset.images import to_float
from Dataset.toon_attributes import ATTRIBUTES, described_pictures
from Evaluation.attributes import Values, agreement, table, values_of
from Model import bundled, checkpoint
from Model.attribute_classifier import SIDE, AttributeClassifier
from Util.cli import check_writable, run_settings
from Util.files import atomic_path, read_npz
from Util.progress import Progress
from Util.settings import Settings, setting

WEIGHT_DECAY = 1e-3
SHIFT = 2
"""Largest shift of a training picture, in px."""


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(Settings):
    """Settings of the training; one flag each."""

    out: Path = setting(
        bundled.ATTRIBUTES,
        "file to write (default: Model/attribute_model/toon_faces_64px.pt)",
        metavar="FILE",
    )
    n: int = setting(12_000, "training pictures", low=64)
    start: int = setting(2_000_000, "number of the first of them", low=0)
    n_val: int = setting(2000, "pictures held out", low=1)
    start_val: int = setting(3_000_000, "number of the first of them", low=0)
    keep: Path | None = setting(
        None, "folder where rendered pictures are kept, and found again", metavar="DIR"
    )
    epochs: int = setting(14, "times that every picture is seen", low=1)
    batch_size: int = setting(64, "pictures in a step", low=2)
    lr: float = setting(0.004, "highest learning rate of AdamW, in a single cycle", above=0)
    seed: int = setting(0, "seed of weights and order", low=0)
    workers: int | None = setting(None, "processes that render (default: one per core)", low=0)


def pictures(settings: AttributeSettings, start: int, n: int) -> tuple[Tensor, Values]:
    """Render pictures (N, 3, 64, 64) in [-1, 1] and what they show, or take those that are kept."""
    file = settings.keep / f"toon_faces_{SIDE}px_{start}_{n}.npz" if settings.keep else None
    if file and file.is_file():
        arrays = read_npz(file)
        images, labels = arrays["pictures"], arrays["labels"]
    else:
        numbers = range(start, start + n)
        images, labels = described_pictures(numbers, SIDE, workers=settings.workers)
        if file:
            with atomic_path(file) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, pictures=images, labels=labels)
    tensor = to_float(torch.from_numpy(images).permute(0, 3, 1, 2))
    columns = torch.from_numpy(labels).unbind(dim=1)
    return tensor, dict(zip(ATTRIBUTES, columns, strict=True))


def augment(images: Tensor) -> Tensor:
    """Shift a batch (N, 3, H, W) by a few pixels and add a little noise."""
    side, (dx, dy) = images.shape[-1], torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    shifted = padded[..., dy : dy + side, dx : dx + side]
    return shifted + 0.03 * torch.randn_like(shifted)


def _batches(n: int, size: int) -> Iterator[Tensor]:
    """Yield the numbers of all pictures in a random order; a last part of a batch is left out."""
    order = torch.randperm(n)
    yield from order[: n - n % size].split(size)


def train(settings: AttributeSettings, images: Tensor, values: Values) -> AttributeClassifier:
    """Train a classifier; the loss is the sum of the attributes' cross-entropies."""
    torch.manual_seed(settings.seed)
    attributes = {name: a.values for name, a in ATTRIBUTES.items()}
    inside = [name for name, a in ATTRIBUTES.items() if a.inside]
    network = AttributeClassifier(attributes, inside).to(memory_format=torch.channels_last)
    steps = settings.epochs * (len(images) // settings.batch_size)
    optimiser = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.lr, total_steps=steps)
    with Progress(steps, "training") as bar:
        for _ in range(settings.epochs):
            for part in _batches(len(images), settings.batch_size):
                logits = network(
                    augment(images[part]).contiguous(memory_format=torch.channels_last)
                )
                parts = [F.cross_entropy(logits[name], values[name][part]) for name in logits]
                loss = torch.stack(parts).sum()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
                if bar.done % 50 == 0:
                    bar.figures(f"loss {loss.item():.3f}")
    return network.eval()


def chance(values: Values) -> dict[str, float]:
    """Compute the share of the most frequent value of every attribute."""
    return {name: (c.bincount().max() / len(c)).item() for name, c in values.items()}


def run(settings: AttributeSettings) -> None:
    """Train, save and print the accuracies of what was saved."""
    check_writable("out", settings.out)
    network = train(settings, *pictures(settings, settings.start, settings.n))
    # Half precision halves the file; what is measured is what was saved.
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    checkpoint.save(settings.out, {"classifier": state, "config": network.config})
    images, values = pictures(settings, settings.start_val, settings.n_val)
    saved = checkpoint.load_attribute_classifier(settings.out)
    accuracy = agreement(values_of(saved, images), values)
    columns = {"accuracy": accuracy, "chance": chance(values)}
    for column in columns.values():
        column["mean"] = sum(column.values()) / len(column)
    print(f"{table(columns)}\n\nsaved {settings.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    prog = "python -m Evaluation.attribute_training"
    return run_settings(AttributeSettings, run, argv, prog=prog, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
