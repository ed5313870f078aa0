"""One pruning job: score the channels, remove the lowest, initialise and save what remains.

    content mask -> scores -> widths -> keep masks -> surgery -> initialisation -> checkpoint

Liu et al., "Content-Aware GAN Compression", CVPR 2021, section 3.2.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Compression import recipes
from Compression.allocation import (
    ALLOCATIONS,
    BEST,
    Allocation,
    AllocationSettings,
    Budget,
    Problem,
    Widths,
)
from Compression.allocation.costs import costs_like
from Compression.content import ContentParser, Metered, parser_for, share_warning
from Compression.initialisation import INITIALISATIONS, Initialisation
from Compression.scores import SCORES, EmptyContentError, Score
from Compression.scores.sampling import Sampling, Scores, draw_sampling
from Compression.selection import kept_count, select_channels, select_widths
from Compression.surgery import prune_generator
from Evaluation.settings import check_size
from Model import bundled, checkpoint
from Model.generator import Generator
from Util.cli import check_writable
from Util.device import DeviceSettings
from Util.files import folder_lock
from Util.progress import Progress
from Util.settings import (
    SettingError,
    Settings,
    blame,
    chosen,
    file_or_folder,
    plain,
    setting,
    some_words,
)

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class PruneSettings(DeviceSettings):
    """Settings of a pruning job; one flag of prune.py each.

    Attributes:
        options: settings of the score, the allocation and the initialisation that have any.
    """

    generated_img_size: int | None = setting(
        None,
        "side of the images in px; only checked against the checkpoint, which knows it",
        low=8,
        metavar="PX",
    )
    ckpt: Path = setting(
        bundled.MODEL,
        "full-size checkpoint (default: Model/full_size_model/toon_faces_64px.pt)",
        metavar="FILE",
        exists="file",
    )
    recipe: str = setting(
        "",
        "settings of a paper, see below; what else is given wins, train.py goes on with it. list:"
        " print them",
        metavar="NAME",
    )
    remove_ratio: float | None = setting(
        None,
        "fraction of every layer's channels to remove, in [0, 1) (default: 0.7, unless --macs is"
        " given)",
        low=0,
        below=1,
        metavar="R",
    )
    macs: float | None = setting(
        None,
        "in place of remove_ratio: most multiply-accumulates per image that the result may have,"
        " such as 4.12e9",
        above=0,
        metavar="N",
    )
    allocation: str = setting(
        AUTO,
        "how widths are chosen for these multiply-accumulates, or for those that remove_ratio would"
        f" leave, see below; auto: {BEST} with macs, else uniform",
        choices=(AUTO, *ALLOCATIONS),
        metavar="NAME",
    )
    second_kernel: int | None = setting(
        None,
        "side in px of the filters of every resolution's second convolution; 1, StyleKD's heter,"
        " leaves the middle of each (default: the full-size model's, 3)",
        choices=(3, 1),
        metavar="K",
    )
    info_print: bool = setting(False, "print the details of every layer")
    info_pictures: bool = setting(
        False,
        "write NAME_channels.png beside the checkpoint: what the highest- and the lowest-scored"
        " channel of every resolution do to pictures",
    )

    # Scoring. The paper: 400 images in batches of 10, noise on 5 % of the content.
    metric: str = setting(
        "content_aware", "how channels are scored, see below", choices=SCORES, metavar="NAME"
    )
    n_sample: int = setting(400, "images to score by, at least 1", low=1, metavar="N")
    batch_size: int = setting(
        10,
        "images whose gradients are summed before their absolute value is taken, at least 1; part"
        " of content_aware, diversity_aware and the widths greedy",
        low=1,
        metavar="N",
    )
    noise_prob: float = setting(
        0.05,
        "fraction of the content's pixels that are noised, in (0, 1]",
        above=0,
        high=1,
        metavar="P",
    )
    parser_ckpt: Path | None = setting(
        None,
        "parser that finds the content, for content_aware, subset, greedy, spectrum and"
        " reconstruction: a file, or a name, see below (default: for the bundled model"
        " Model/parser_model/toon_faces_128px.pt, for any other Model/parser_model/79999_iter.pth)",
        metavar="FILE",
        aliases=("parser",),
        exists="parser",
    )
    content: tuple[str, ...] = setting(
        (),
        "classes that are kept, such as skin,hair,eyes or all,-background (default: the parser's"
        " own: of faces all but background and cloth)",
        metavar="CLASS,...",
        parse=some_words,
    )
    init: str = setting(
        "pruned",
        "how what remains is initialised, see below",
        choices=INITIALISATIONS,
        metavar="NAME",
    )
    seed: int = setting(0, "seed of latents and noise, at least 0", low=0, metavar="N")
    out: Path | None = setting(
        None,
        "checkpoint to write, or a folder for it (default:"
        " Model/pruned_model/METRIC_RATIO_SIZEpx_DATE-TIME.pt)",
        metavar="FILE",
        parse=file_or_folder,
    )
    options: tuple[Settings, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two answers to one question."""
        super().__post_init__()
        if self.macs is not None and self.remove_ratio is not None:
            raise SettingError(
                "macs",
                f"{self.macs:,.0f} and remove_ratio {self.remove_ratio:g} both say how much stays;"
                " leave one out",
            )
        limits, none = chosen(self.options, AllocationSettings), AllocationSettings()
        for name, value in plain(limits).items():
            if value != getattr(none, name) and not self.has_budget:
                raise SettingError(
                    name,
                    "goes with macs, or with an allocation other than uniform; here remove_ratio"
                    " alone decides the widths",
                )

    @property
    def ratio(self) -> float | None:
        """Fraction to remove; None where multiply-accumulates are given instead."""
        return 0.7 if self.remove_ratio is None and self.macs is None else self.remove_ratio

    @property
    def has_budget(self) -> bool:
        """Whether widths are chosen for a number of multiply-accumulates."""
        return self.macs is not None or self.allocation not in (AUTO, "uniform")

    @property
    def allocation_name(self) -> str:
        """The allocation in force."""
        if self.allocation != AUTO:
            return self.allocation
        return "uniform" if self.macs is None else BEST


def option_kinds() -> list[type[Settings]]:
    """The settings of all scores, allocations and initialisations that have any."""
    entries: list[Score | Allocation | Initialisation] = [
        *SCORES.values(),
        *ALLOCATIONS.values(),
        *INITIALISATIONS.values(),
    ]
    kinds = [entry.options for entry in entries if entry.options is not None]
    return list(dict.fromkeys([AllocationSettings, *kinds]))


@dataclass(frozen=True)
class PruneResult:
    """What a pruning job made.

    Attributes:
        path: the checkpoint.
        full: the generator before.
        pruned: the generator after.
        scores: one 1-D tensor per channel group.
        keep: one bool tensor per channel group.
        rule: what decided the widths, in words.
        initialised: what the initialisation reports, as lines.
        warnings: what to look at before training.
    """

    path: Path
    full: Generator
    pruned: Generator
    scores: Scores
    keep: Sequence[Tensor]
    rule: str
    initialised: Sequence[str] = ()
    warnings: Sequence[str] = ()


def prune(settings: PruneSettings) -> PruneResult:
    """Prune a generator and save the result.

    Raises:
        SettingError: names the setting or file.
    """
    if settings.recipe:
        recipes.named(settings.recipe)
    device = settings.pick_device()
    parser = _parser(settings, device)  # before what takes longer: the default one may be missing
    full, others = _load_full_size(settings, device)
    target = _target(settings, full.size)
    budget = _budget(settings, full)
    metered = Metered(parser) if parser else None
    sampling = draw_sampling(
        full,
        parser=metered,
        n_sample=settings.n_sample,
        batch_size=settings.batch_size,
        noise_prob=settings.noise_prob,
        seed=settings.seed,
    )
    scores = _score(settings, full, sampling)
    if budget is None:
        keep = select_channels(scores, settings.ratio or 0.0)
        rule = f"{settings.ratio:.4g} of every layer removed"
    else:
        rule = f"{settings.allocation_name}, {budget.describe()}"
        keep = select_widths(scores, _allocate(settings, Problem(full, scores, sampling, budget)))
    pruned = prune_generator(full, keep, settings.second_kernel)
    initialisation = INITIALISATIONS[settings.init]
    own = replace(sampling, options=chosen(settings.options, initialisation.options))
    lines = initialisation.function(pruned, full, keep, own) or ()
    content = {
        "g": pruned,
        "g_ema": pruned,
        **others,
        "config": _config(settings, full, pruned, parser),
    }
    path = _save(target, content, overwrite=target == settings.out)
    share = share_warning(metered.share, parser) if metered and parser else ""
    warnings = [text for text in (share, _lacking(settings, others)) if text]
    return PruneResult(path, full, pruned, scores, keep, rule, lines, warnings)


def _lacking(settings: PruneSettings, others: Mapping[str, Any]) -> str:
    """What retraining will ask for because the full-size checkpoint does not have it, or empty."""
    if "d" in others:
        return ""
    return (
        f"{settings.ckpt} holds no discriminator (d); to retrain, give train.py a --teacher_ckpt"
        " that has one, or --discriminator scratch"
    )


def _load_full_size(
    settings: PruneSettings, device: torch.device
) -> tuple[Generator, Mapping[str, Any]]:
    """The generator to prune, and the networks that the file holds besides."""
    with blame("ckpt"):
        content = checkpoint.read(settings.ckpt)
        generator = checkpoint.load_generator(content, device=device, name=str(settings.ckpt))
    check_size("generated_img_size", settings.generated_img_size, settings.ckpt, generator)
    if (settings.second_kernel or 1) > generator.second_kernel:
        raise SettingError(
            "second_kernel", f"{settings.ckpt} has filters of 1 px there, which cannot grow"
        )
    return generator, {"d": content["d"]} if "d" in content else {}


def _budget(settings: PruneSettings, full: Generator) -> Budget | None:
    """The budget that widths are chosen for, None where remove_ratio decides them.

    Raises:
        SettingError: a limit is out of reach.
    """
    if not settings.has_budget:
        return None
    macs, parameters = costs_like(full, settings.second_kernel)
    limits = chosen(settings.options, AllocationSettings)
    assert isinstance(limits, AllocationSettings)
    if settings.macs is None:
        uniform = [kept_count(width, settings.ratio or 0.0) for width in full.channels]
        name, most = "remove_ratio", macs(uniform)
    else:
        name, most = "macs", int(settings.macs)
    budget = Budget(full.channels, macs, parameters, most, limits)
    budget.check(name)
    return budget


def _allocate(settings: PruneSettings, problem: Problem) -> Widths:
    """Choose the widths under a progress bar."""
    name = settings.allocation_name
    allocation = ALLOCATIONS[name]
    options = chosen(settings.options, allocation.options)
    images = allocation.images(options, settings.n_sample)
    with Progress(images, f"widths ({name})", "img", shown=images > 0) as bar:
        sampling = replace(problem.sampling, options=options, progress=bar.update)
        with _content_found(settings):
            return allocation.function(replace(problem, sampling=sampling))


def _parser(settings: PruneSettings, device: torch.device) -> ContentParser | None:
    """The face parser, if score, allocation or initialisation needs one."""
    options = chosen(settings.options, INITIALISATIONS[settings.init].options)
    needed = (
        SCORES[settings.metric].needs_parser
        or (settings.has_budget and ALLOCATIONS[settings.allocation_name].needs_parser)
        or INITIALISATIONS[settings.init].needs_parser(options)
    )
    if needed:
        return parser_for(settings.parser_ckpt, settings.ckpt, device, settings.content)
    if settings.content:
        raise SettingError(
            "content",
            f"is for masks, and {settings.metric} has none; leave it out, or score by"
            " another metric",
        )
    return None


def _target(settings: PruneSettings, size: int) -> Path:
    """Where the result goes; found out early that it cannot."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    much = f"{settings.macs:.4g}macs" if settings.ratio is None else f"{settings.ratio:g}"
    name = f"{settings.metric}_{much}_{size}px_{stamp}.pt"
    target = settings.out or bundled.PRUNED_FOLDER / name
    if target.is_dir():
        target = target / name
    if target.resolve() == settings.ckpt.resolve():
        raise SettingError("out", f"{target} is the checkpoint to prune; name another file")
    check_writable("out", target)
    return target


def _score(settings: PruneSettings, generator: Generator, sampling: Sampling) -> Scores:
    """Score the channels under a progress bar."""
    score = SCORES[settings.metric]
    with Progress(settings.n_sample, f"scoring ({settings.metric})", "img") as bar:
        own = replace(
            sampling, progress=bar.update, options=chosen(settings.options, score.options)
        )
        with _content_found(settings):
            return score.compute(generator, own)


@contextmanager
def _content_found(settings: PruneSettings) -> Iterator[None]:
    """Blame the parser's file where there is no content."""
    try:
        yield
    except EmptyContentError as error:
        file = settings.parser_ckpt or bundled.default_parser(settings.ckpt)
        raise SettingError("parser_ckpt", f"{file}: {error}") from None


def _config(
    settings: PruneSettings, before: Generator, after: Generator, parser: ContentParser | None
) -> dict[str, Any]:
    """What the checkpoint remembers of its making, in plain values."""
    names = (
        "recipe",
        "metric",
        "seed",
        "n_sample",
        "batch_size",
        "noise_prob",
        "init",
    )
    config = {name: getattr(settings, name) for name in names}
    config |= {"remove_ratio": settings.ratio, "macs": settings.macs}
    config |= {"allocation": settings.allocation_name}
    kinds = [SCORES[settings.metric].options, INITIALISATIONS[settings.init].options]
    if settings.has_budget:
        kinds += [AllocationSettings, ALLOCATIONS[settings.allocation_name].options]
    for kind in kinds:
        if kind is not None:
            config |= plain(chosen(settings.options, kind))
    return config | {
        "source": settings.ckpt.name,
        "parser": parser.name if parser else "",
        "content": parser.content if parser else "",
        "second_kernel": after.second_kernel,
        "channels_before": list(before.channels),
        "channels_after": list(after.channels),
    }


def _save(target: Path, content: Mapping[str, Any], overwrite: bool) -> Path:
    """Write the checkpoint; a name of our making that is taken gets a number.

    Raises:
        OSError: it could not be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(target.parent):  # another run may have chosen the same second
        numbered = (target.with_name(f"{target.stem}-{i}.pt") for i in itertools.count(2))
        names = itertools.chain([target], numbered)
        free = next(name for name in names if overwrite or not name.exists())
        checkpoint.save(free, content)
    return free
