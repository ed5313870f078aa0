"""Train a parser on pictures with label maps; `train_parser` is a whole run."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from Compression.content import ContentParser
from Compression.parser_augmentation import CELEBAMASK_FLIP_PAIRS, Augmentation, Batch, augment
from Compression.parser_scores import Scores, evaluate, worst_cases
from Dataset.label_maps import LabelMapDataset
from Dataset.loading import EpochBatches
from Model import checkpoint
from Model.face_parser import CELEBAMASK_NAMES, BiSeNet
from Util.device import DeviceSettings
from Util.pictures import save_png
from Util.progress import track
from Util.settings import SettingError, blame, integers, setting

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
class ParserSettings(DeviceSettings):
    """A run of `train_parser`, or the evaluation of a parser by `score_parser`."""

    path: Path = setting(..., "folder with images/ and labels/", metavar="DIR", exists="folder")
    val_path: Path | None = setting(
        None,
        "held-out pictures, same layout (default: a part of --path)",
        metavar="DIR",
        exists="folder",
    )
    val_fraction: float = setting(
        0.1, "part of --path held out without --val_path", above=0, below=1, metavar="X"
    )
    out: Path = setting(Path("Model/parser_model/parser.pt"), "file to write", metavar="FILE")
    eval_only: Path | None = setting(
        None,
        "only score this parser, on --val_path or else on all of --path",
        metavar="CKPT",
        exists="file",
    )
    size: int = setting(128, "side of the parser's input in pixels", low=1, metavar="PX")
    image_size: int | None = setting(
        None,
        "side in pixels that pictures are reduced to before they are enlarged to --size: the size"
        " of the pictures to be parsed, if it is smaller than --size",
        low=1,
        metavar="PX",
    )
    n_classes: int = setting(
        19, "number of classes; CelebAMask-HQ has 19", low=1, high=256, metavar="N"
    )
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
    class_balance: float = setting(
        0.0,
        "exponent p of the class weights f**-p, f being a class's share of the pixels: 0 weighs all"
        " pixels alike, 1 all classes, 0.5 is between; for rare classes",
        low=0,
        high=1,
        metavar="P",
    )
    iter: int = setting(4000, "training iterations", low=1, metavar="N")
    batch_size: int = setting(16, "pictures per iteration, at least 2", low=2, metavar="N")
    lr: float = setting(0.01, "highest learning rate of AdamW", above=0, metavar="X")
    eval_every: int = setting(
        1000, "iterations between evaluations, each of which saves", low=1, metavar="N"
    )
    patience: int = setting(
        0,
        "end after so many evaluations without a better mean IoU, and save only the best; 0: train"
        " to the end, and save the last",
        low=0,
        metavar="N",
    )
    resume: bool = setting(
        False, "go on with the run that wrote --out, from its last evaluation (OUT's .state file)"
    )
    report: Path | None = setting(
        None,
        "picture of the held-out pictures that the parser gets worst, with their label maps",
        metavar="PNG",
    )
    seed: int = setting(0, "random seed", metavar="N")
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
    def state_file(self) -> Path:
        """Where a run keeps what it needs to go on."""
        return self.out.with_name(f"{self.out.name}.state")

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
        The scores of the parser that was saved.

    Raises:
        SettingError: a folder or a setting cannot be used.
        LabelMapError: a picture or its label map cannot.
        FloatingPointError: the loss is no longer finite.
    """
    if settings.resume and not settings.state_file.is_file():
        if settings.out.is_file():
            raise SettingError("resume", f"{settings.out} is finished; another out starts anew")
        raise SettingError("resume", f"{settings.state_file} is missing; train without it")
    if settings.state_file.is_file() and not settings.resume:
        raise SettingError(
            "out",
            f"{settings.out} is of a run that was stopped; --resume goes on with it, another"
            " name starts anew",
        )
    device = settings.pick_device()
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)

    # Pictures to train on, and those held out.
    train_set, val_set = _open_both(settings)
    size, workers = settings.batch_size, settings.workers
    if len(train_set) < size:  # type: ignore[arg-type]
        raise SettingError("batch_size", f"{size}: more than the pictures to train on")
    held_out = EpochBatches(val_set, settings.val_path or settings.path, size, workers)

    network = _network(settings).to(device)
    parser = ContentParser(network)
    run = ParserRun(network, settings, generator, _class_weights(train_set, settings))
    run.course["pictures"] = len(train_set)  # type: ignore[arg-type]
    if settings.resume:
        run.load(settings.state_file)
    order = settings.seed + run.step
    batches = _endless(EpochBatches(train_set, settings.path, size, workers, order))
    while run.step < settings.iter and not run.ended:
        loss = run.train_on(next(batches))
        after_step(run.step, loss)
        if run.step % settings.eval_every == 0 or run.step == settings.iter:
            scores = evaluate(parser, held_out, settings.image_size)
            if run.improved(scores.mean_iou) or not settings.patience:
                checkpoint.save(settings.out, {"parser": network, "config": network.config})
            checkpoint.save(settings.state_file, run.state())
            after_evaluation(run.step, loss, scores)
    saved = ContentParser(checkpoint.load_face_parser(settings.out, device))
    if settings.report:
        save_png(settings.report, worst_cases(saved, held_out, settings.image_size))
    settings.state_file.unlink(missing_ok=True)
    return evaluate(saved, held_out, settings.image_size)


def _class_weights(dataset: Dataset[Batch], settings: ParserSettings) -> Tensor | None:
    """Weights f_c**-p of the classes' shares f_c, scaled to mean 1 over the pixels.

    Counted on no more than 500 label maps; a class that none of them shows has weight 1.
    """
    if not settings.class_balance:
        return None
    counts = torch.zeros(settings.n_classes, dtype=torch.float64)
    for i in range(min(500, len(dataset))):  # type: ignore[arg-type]
        counts += torch.bincount(dataset[i][1].flatten(), minlength=settings.n_classes)
    shares = counts / counts.sum()
    weights = torch.where(shares > 0, shares.clamp_min(1e-6) ** -settings.class_balance, 0)
    weights = weights / (weights * shares).sum()
    return torch.where(shares > 0, weights, 1).float()


def score_parser(settings: ParserSettings) -> Scores:
    """Score the parser of ``settings.eval_only``.

    Args:
        settings: name the parser and the pictures; its file decides the number of classes, and all
            else of the classes that the settings leave open.

    Raises:
        SettingError: a file, a folder or a setting cannot be used.
        LabelMapError: a picture or its label map cannot.
    """
    device = settings.pick_device()
    with blame("eval_only"):
        network = checkpoint.load_face_parser(settings.eval_only or "", device)
    settings.check_classes(network.n_classes)
    network.class_names = settings.class_names or network.class_names
    name = "val_path" if settings.val_path else "path"
    dataset = _open(settings, name, network.input_size, network.n_classes)
    batches = EpochBatches(dataset, dataset.path, settings.batch_size, settings.workers)
    parser = ContentParser(network, settings.classes_excluded)
    if settings.report:
        save_png(settings.report, worst_cases(parser, batches, settings.image_size))
    shown = track(batches, len(batches), "evaluating", "batch")
    return evaluate(parser, shown, settings.image_size)


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


def segmentation_loss(
    outputs: Sequence[Tensor],
    labels: Tensor,
    aux_weight: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Add `aux_weight` times each other output's cross-entropy to that of the main output.

    Args:
        outputs: logits (N, n_classes, h, w), the main output first. Where they are smaller than the
            label maps, those are reduced to the nearest value.
        labels: (N, H, W), int64.
        aux_weight: weight of the auxiliary losses (BiSeNet paper, equation 2; 1 there).
        class_weights: (n_classes,); None weighs all pixels alike.
    """

    def cross_entropy(logits: Tensor) -> Tensor:
        target = labels
        if logits.shape[2:] != labels.shape[1:]:
            reduced = F.interpolate(labels.unsqueeze(1).float(), logits.shape[2:], mode="nearest")
            target = reduced.squeeze(1).long()
        # Classes last: softmax then runs over contiguous values, twice as fast on a CPU.
        return F.cross_entropy(
            logits.permute(0, 2, 3, 1).flatten(0, 2), target.flatten(), class_weights
        )

    main, *others = (cross_entropy(logits) for logits in outputs)
    return main + aux_weight * sum(others, start=torch.zeros_like(main))


def learning_rate_factor(step: int, iterations: int) -> float:
    """Scale the learning rate at a step: linear warm-up to 1, then half a cosine to 0."""
    warm_up = max(1, round(WARM_UP * iterations))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, iterations - warm_up)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _endless(loader: EpochBatches) -> Iterator[Batch]:
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


class ParserRun:
    """The training of a parser in place, from a step to the next.

    Args:
        network: the parser, on the device to train on.
        settings: length, learning rate, augmentation.
        generator: a CPU generator that the augmentation draws from.
        class_weights: of the loss, (n_classes,); None weighs all pixels alike.

    Attributes:
        step: steps done.
        course: what a run that goes on must have in common with the one before, by its settings'
            names: other pictures would be held out, or another schedule be gone on with.
    """

    def __init__(
        self,
        network: BiSeNet,
        settings: ParserSettings,
        generator: torch.Generator,
        class_weights: Tensor | None = None,
    ) -> None:
        self.network, self.settings, self.generator = network, settings, generator
        self.device = next(network.parameters()).device
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.optimiser = _optimiser(network, settings.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: learning_rate_factor(step, settings.iter)
        )
        self.step, self._best, self._worse = 0, -math.inf, 0
        names = ("seed", "val_fraction", "lr", "iter", "batch_size")
        self.course: dict[str, float] = {name: getattr(settings, name) for name in names}

    def train_on(self, batch: Batch) -> float:
        """Take a step; returns the loss.

        Args:
            batch: pictures (N, 3, H, W) in [-1, 1], N > 1, and label maps of the network's input
                size (N, input_size, input_size), int64.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        network = self.network
        images, labels = (part.to(self.device) for part in batch)
        images, labels = augment(images, labels, self.settings.augmentation, self.generator)
        network.train()
        images = network.prepare(images)
        main, *others = network.all_logits(images)
        # The auxiliary outputs only guide the lower layers; small maps do, and are far cheaper.
        outputs = (network.upsample(main, images.shape[2:]), *others)
        loss = segmentation_loss(outputs, labels, AUX_WEIGHT, self.class_weights)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} in step {self.step + 1}")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def improved(self, mean_iou: float) -> bool:
        """Take note of an evaluation; returns whether it is the best so far."""
        better = mean_iou > self._best
        self._best, self._worse = (mean_iou, 0) if better else (self._best, self._worse + 1)
        return better

    @property
    def ended(self) -> bool:
        """Whether there have been as many evaluations without a better one as the settings bear."""
        return 0 < self.settings.patience <= self._worse

    def state(self) -> dict[str, Any]:
        """Everything but the order of the pictures, in the layout of `Model.checkpoint`."""
        return {
            "parser": self.network,
            "config": self.network.config,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "run": {"step": self.step, "best": self._best, "worse": self._worse},
            "augmentation": self.generator.get_state(),
            "course": dict(self.course),
        }

    def _check_course(self, saved: Mapping[str, float], file: Path) -> None:
        for name, value in self.course.items():
            if saved.get(name, value) != value:
                raise ValueError(f"{file} is of a run with {name} {saved[name]}, not {value}")

    def load(self, file: Path) -> None:
        """Go on from a `state`, with a new order of the pictures.

        Raises:
            SettingError: the file is damaged or of another run; names the setting resume.
        """
        with blame("resume"):
            saved = checkpoint.read(file)
            if saved.get("config") != self.network.config:
                raise ValueError(f"{file} is of a parser with other sizes or classes")
            self._check_course(saved.get("course", {}), file)
            try:
                checkpoint.load_strict(self.network, saved["parser"], str(file))
                self.optimiser.load_state_dict(saved["optimiser"])
                self.schedule.load_state_dict(saved["schedule"])
                progress = saved["run"]
                self.step, self._worse = int(progress["step"]), int(progress["worse"])
                self._best = float(progress["best"])
                self.generator.set_state(saved["augmentation"])
            except (LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{file} is damaged ({error})".splitlines()[0]) from None
        torch.manual_seed(self.settings.seed + self.step)
