"""Train a parser on pictures with label maps; `train_parser` is a whole run."""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from Compression.content import ContentParser
from Compression.parser_augmentation import CELEBAMASK_FLIP_PAIRS, Augmentation, Batch, augment
from Compression.parser_scores import Scores, evaluate
from Dataset.label_maps import LabelMapDataset
from Model import checkpoint
from Model.face_parser import CELEBAMASK_NAMES, BiSeNet
from Util.device import pick_device
from Util.settings import SettingError, Settings, blame, integers, setting

WARM_UP = 0.05
"""Part of the iterations in which the learning rate rises linearly."""
WEIGHT_DECAY = 1e-4
"""AdamW's."""
AUX_WEIGHT = 0.2
"""Weight of each auxiliary output's loss."""


def class_pair(text: str) -> tuple[int, int]:
    """Argument type: two class indices as A,B."""
    pair = integers(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of classes such as 2,3")
    return pair[0], pair[1]


@dataclass(frozen=True, kw_only=True)
class ParserSettings(Settings):
    """A run of `train_parser`, or the evaluation of a parser by `score_parser`."""

    path: Path = setting(..., "folder with images/ and labels/", metavar="DIR")
    val_path: Path | None = setting(
        None, "held-out pictures, same layout (default: a part of --path)", metavar="DIR"
    )
    val_fraction: float = setting(
        0.1, "part of --path held out without --val_path", above=0, below=1, metavar="X"
    )
    out: Path = setting(Path("Model/parser_model/parser.pt"), "file to write", metavar="FILE")
    eval_only: Path | None = setting(
        None, "only score this parser, on --val_path or else on all of --path", metavar="CKPT"
    )
    size: int = setting(128, "side of the parser's input in pixels", low=1, metavar="PX")
    image_size: int | None = setting(
        None,
        "side in pixels that pictures are reduced to before they are enlarged to --size: the size"
        " of the pictures to be parsed, if it is smaller than --size",
        low=1,
        metavar="PX",
    )
    n_classes: int = setting(19, "number of classes; CelebAMask-HQ has 19", low=1, metavar="N")
    class_names: tuple[str, ...] = setting((), "names of all classes (19 have CelebAMask-HQ's)")
    classes_excluded: tuple[int, ...] | None = setting(
        None, "classes that are no content (default: 0; of 19, 0 and 16)", nargs="*", metavar="C"
    )
    flip_pairs: tuple[tuple[int, int], ...] | None = setting(
        None,
        "classes that change places in a mirror image (default: none; of 19, 2,3 4,5 7,8)",
        nargs="*",
        metavar="A,B",
        parse=class_pair,
    )
    width: int = setting(8, "channels of the first stage, 64 as published", low=1, metavar="N")
    stem_stride: int = setting(
        1,
        "logits are computed at 1 / (2 * N) of --size; 1 keeps the finest detail and costs the"
        " most, 4 is the published parser",
        choices=(1, 2, 4),
    )
    iter: int = setting(4000, "training iterations", low=1, metavar="N")
    batch_size: int = setting(16, "pictures per iteration, at least 2", low=2, metavar="N")
    lr: float = setting(0.01, "highest learning rate of AdamW", above=0, metavar="X")
    eval_every: int = setting(
        1000, "iterations between evaluations, each of which saves", low=1, metavar="N"
    )
    seed: int = setting(0, "random seed", metavar="N")
    device: str = setting(
        "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N", metavar="DEV"
    )
    workers: int = setting(0, "processes that read pictures; 0: the main one", low=0, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only is None:
            self.check_classes(self.n_classes)

    def check_classes(self, n_classes: int) -> None:
        """Refuse settings of classes that do not fit a number of classes.

        Raises:
            SettingError: names the setting.
        """
        flipped = [c for pair in self.flip_pairs or () for c in pair]
        for name, classes in (("classes_excluded", self.classes_excluded), ("flip_pairs", flipped)):
            for c in classes or ():
                if not 0 <= c < n_classes:
                    raise SettingError(name, f"{c}: there is no such class in 0 to {n_classes - 1}")
        count = len(self.class_names) or n_classes
        if count != n_classes:
            raise SettingError("class_names", f"names {count} classes, but there are {n_classes}")

    @property
    def augmentation(self) -> Augmentation:
        """How the training pictures are varied."""
        usual = CELEBAMASK_FLIP_PAIRS if self.n_classes == len(CELEBAMASK_NAMES) else ()
        return Augmentation(usual if self.flip_pairs is None else self.flip_pairs, self.image_size)


def train_parser(
    settings: ParserSettings,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    after_evaluation: Callable[[int, float, Scores], None] = lambda step, loss, scores: None,
) -> Scores:
    """Train a parser and save it, at every evaluation and at the end.

    Args:
        settings: of the run.
        after_step: called with the number of steps done and the loss.
        after_evaluation: called with these and the scores on the pictures held out.

    Returns:
        The scores at the end.

    Raises:
        SettingError: a folder or a setting cannot be used.
        LabelMapError: a picture or its label map cannot.
        FloatingPointError: the loss is no longer finite.
    """
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)

    # Pictures to train on, and those held out.
    train_set, val_set = _open_both(settings)
    size, workers = settings.batch_size, settings.workers
    if len(train_set) < size:  # type: ignore[arg-type]
        raise SettingError("batch_size", f"{size}: more than the pictures to train on")
    loader = DataLoader(train_set, size, shuffle=True, drop_last=True, num_workers=workers)
    held_out = DataLoader(val_set, size, num_workers=workers)

    parser = ContentParser(_network(settings).to(device))
    network = parser.network
    results = []

    def after(step: int, loss: float) -> None:
        after_step(step, loss)
        if step % settings.eval_every == 0 or step == settings.iter:
            results.append(evaluate(parser, held_out, settings.image_size))
            checkpoint.save(settings.out, {"parser": network, "config": network.config})
            after_evaluation(step, loss, results[-1])

    train(network, _endless(loader), settings, generator, after)
    return results[-1]


def score_parser(
    settings: ParserSettings,
    shown: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
) -> Scores:
    """Score the parser of ``settings.eval_only``.

    Args:
        settings: name the parser and the pictures; its file decides the number of classes, and all
            else of the classes that the settings leave open.
        shown: wraps the batches, to show the progress.

    Raises:
        SettingError: a file, a folder or a setting cannot be used.
        LabelMapError: a picture or its label map cannot.
    """
    device = pick_device(settings.device)
    with blame("eval_only"):
        network = checkpoint.load_face_parser(settings.eval_only or "", device)
    settings.check_classes(network.n_classes)
    network.class_names = settings.class_names or network.class_names
    name = "val_path" if settings.val_path else "path"
    dataset = _open(settings, name, network.input_size, network.n_classes)
    batches = DataLoader(dataset, settings.batch_size, num_workers=settings.workers)
    parser = ContentParser(network, settings.classes_excluded)
    return evaluate(parser, shown(batches), settings.image_size)


def _network(settings: ParserSettings) -> BiSeNet:
    with blame("class_names"):  # the rest is checked by now
        return BiSeNet(
            settings.n_classes,
            settings.width,
            settings.stem_stride,
            settings.size,
            settings.classes_excluded,
            settings.class_names,
        )


def _open(settings: ParserSettings, name: str, size: int, n_classes: int) -> LabelMapDataset:
    with blame(name):
        return LabelMapDataset(getattr(settings, name), size, n_classes)


def _open_both(settings: ParserSettings) -> tuple[Dataset[Batch], Dataset[Batch]]:
    """Open the pictures to train on and those held out."""
    how = (settings.size, settings.n_classes)
    everything = _open(settings, "path", *how)
    if settings.val_path is not None:
        return everything, _open(settings, "val_path", *how)
    stream = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(everything), generator=stream).tolist()
    held_out = max(1, round(settings.val_fraction * len(everything)))
    return Subset(everything, order[held_out:]), Subset(everything, order[:held_out])


def segmentation_loss(outputs: Sequence[Tensor], labels: Tensor, aux_weight: float) -> Tensor:
    """Add `aux_weight` times each other output's cross-entropy to that of the main output.

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


def learning_rate_factor(step: int, iterations: int) -> float:
    """Scale the learning rate at a step: linear warm-up to 1, then half a cosine to 0."""
    warm_up = max(1, round(WARM_UP * iterations))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, iterations - warm_up)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Go through a loader's batches again and again."""
    while True:
        yield from loader


def _optimiser(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    # Decay is for filters; on normalisation's gains and offsets it only shrinks the signal.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def train(
    network: BiSeNet,
    batches: Iterator[Batch],
    settings: ParserSettings,
    generator: torch.Generator,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a parser in place.

    Args:
        network: the parser, on the device to train on.
        batches: pictures (N, 3, H, W) in [-1, 1], N > 1, and label maps of the network's input
            size (N, input_size, input_size), int64.
        settings: length, learning rate, augmentation.
        generator: a CPU generator that the augmentation draws from.
        after_step: called with the number of steps done and the loss. It may evaluate the network
            and need not restore its mode.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    device, how = next(network.parameters()).device, settings.augmentation
    optimiser = _optimiser(network, settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, settings.iter)
    )
    for step in range(1, settings.iter + 1):
        images, labels = (part.to(device) for part in next(batches))
        images, labels = augment(images, labels, how, generator)
        network.train()
        images = network.prepare(images).contiguous(memory_format=torch.channels_last)
        main, *others = network.all_logits(images)
        # The auxiliary outputs only guide the lower layers; small maps do, and are far cheaper.
        outputs = (network.upsample(main, images.shape[2:]), *others)
        loss = segmentation_loss(outputs, labels, AUX_WEIGHT)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} in step {step}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        after_step(step, loss.item())
