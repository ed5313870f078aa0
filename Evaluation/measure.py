"""Measure how far a model's images, or those of a folder, are from real ones."""

from dataclasses import dataclass
from pathlib import Path

import torch

from Dataset.images import Images
from Dataset.pictures import FILTERS, Resizing
from Dataset.sources.folder import Folder
from Evaluation import feature_statistics
from Evaluation.feature_sets import (
    image_features,
    read_statistics,
    real_statistics,
    sampled_features,
)
from Evaluation.feature_statistics import Features, Statistics
from Evaluation.features import FEATURES, Extractor, make_extractor
from Evaluation.metrics import METRICS, evaluate, need_features, too_few
from Evaluation.settings import LoadMask, ModelSettings, PrecisionSettings, Result
from Model import bundled
from Model.generator import Generator
from Util import distributed
from Util.cli import check_writable
from Util.progress import warn
from Util.settings import SettingError, blame, setting, some_words


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(PrecisionSettings, ModelSettings):
    """Settings of `measure`."""

    n_sample: int = setting(50_000, "generated images", low=2)
    batch_size: int = setting(64, "images at a time, fewer where they are large", low=1)
    images: Path | None = setting(
        None,
        "folder or LMDB that is measured in place of the model's images; their side in px is"
        " --generated_img_size (default: that of the folder's images)",
        metavar="DIR",
        exists="folder",
    )
    path: Path | None = setting(
        None, "real images: a folder or an LMDB", metavar="DIR", exists="folder"
    )
    stats: Path | None = setting(
        None,
        "statistics of the real images (.npz, or a .pkl of mean and cov); with --path, made if"
        " missing (default: beside the images)",
        metavar="FILE",
    )
    features: str | None = setting(
        None,
        "network; attributes is for toon faces (default: parser for the bundled models, else"
        " inception)",
        choices=FEATURES,
    )
    inception_ckpt: Path | None = setting(
        None, "Inception weights, no download", metavar="FILE", exists="file"
    )
    parser_ckpt: Path | None = setting(
        None,
        "parser of masks, a file or a name as prune.py has it, and a face parser's file of features"
        " (default: the bundled one for the bundled models, else"
        " Model/parser_model/79999_iter.pth)",
        metavar="FILE",
        aliases=("parser",),
        exists="parser",
    )
    content: tuple[str, ...] = setting(
        (),
        "classes of the parser that are content, such as skin,hair,eyes or all,-background"
        " (default: the parser's own)",
        metavar="CLASS,...",
        parse=some_words,
    )
    metrics: tuple[str, ...] = setting(
        ("fid",),
        "; ".join(f"{name}: {metric.description}" for name, metric in METRICS.items())
        + " (default: fid)",
        choices=tuple(METRICS),
    )
    content_aware: bool = setting(False, "multiply images by their own content mask")
    resample: str = setting(
        "bilinear",
        "filter that resizes images of folders; an LMDB has been resized by its own (default:"
        " bilinear, as in the original's training)",
        choices=FILTERS,
    )
    truncation: float = setting(1.0, "psi in (0, 1]; the paper has 1", above=0, high=1)
    workers: int | None = setting(
        None, "processes that load images (default: the share of the CPU cores, 4 at most)", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise SettingError("metrics", f"is empty; take {', '.join(METRICS)}")
        if self.content and not self.content_aware:
            raise SettingError("content", "goes with content_aware; give that too, or leave it out")
        if not self.images and (problem := too_few(self.metrics, self.n_sample)):
            raise SettingError("n_sample", f"{self.n_sample}: {problem}")

    @property
    def network(self) -> str:
        """Whose features are compared."""
        is_bundled = bundled.is_bundled(self.ckpt) and not self.images
        return self.features or ("parser" if is_bundled else "inception")

    @property
    def parser_file(self) -> Path | None:
        """The face parser that takes part, if any."""
        if self.network != "parser" and not self.content_aware:
            return None
        with blame("parser_ckpt"):
            return self.parser_ckpt or bundled.default_parser(self.ckpt)


def measure(settings: MeasureSettings, load_mask: LoadMask) -> Result:
    """Compare generated images with real ones.

    Several processes share the work, but only the first one has figures. They join here; the caller
    lets them leave (`Util.distributed`).

    Args:
        settings: what is compared, and how.
        load_mask: see `LoadMask`.

    Raises:
        SettingError: names the setting and what to do.
        StatisticsError: the features cannot be compared.
    """
    device = distributed.join(settings.pick_device())
    _check_real(settings)
    parser, masked = settings.parser_file, load_mask if settings.content_aware else None
    generated = _generated(settings, device)
    size = generated.size
    inception = settings.inception_ckpt
    how = (settings.network, inception, parser, masked, device, settings.content)
    extractor = make_extractor(*how)
    distributed.meet()  # one that downloads takes its time
    real = _real(settings, size, extractor, device)
    made = _made(settings, extractor, generated, device)
    first = distributed.rank() == 0
    figures = evaluate(settings.metrics, extractor, made, real, settings.seed) if first else {}
    lines = [f"{name}: {value:.6g}" for name, value in figures.items()]
    if first and "fid" in settings.metrics:
        lines += feature_statistics.notes_on_few(len(made), real)
    bits = "floats, no 8-bit step"
    if isinstance(generated, Images):
        resizing = generated.resizing
        bits = feature_statistics.resized(size, resizing.filter, resizing.source)
    if settings.precision != "float32" and not settings.images:
        bits += f", made in {settings.precision}"
    about_real = feature_statistics.described(real.record)
    protocol = f"{extractor.protocol}; generated images: {bits}; {about_real}"
    if settings.info_print:
        made_from = dict(real.record) or f"unknown, from {settings.stats}"
        source = settings.images or settings.ckpt
        lines.append(f"generated: {len(made)} images of {size} px from {source}")
        lines += [f"real: {made_from}", f"protocol: {protocol}"]
    else:
        lines.append(f"({len(made)} images; {protocol})")
    chosen = {"features": settings.network, "parser_ckpt": parser or settings.parser_ckpt}
    return Result(figures, protocol, lines, settings, chosen)


def _generated(settings: MeasureSettings, device: torch.device) -> Generator | Images:
    """What is measured: a generator, or the images of a folder."""
    if not settings.images:
        return settings.load(settings.ckpt, device)
    with blame("images"):
        size = settings.generated_img_size or _side(settings.images)
        return Images(settings.images, size, resample=settings.resample)


def _side(folder: Path) -> int:
    """The side in px that all images of a folder have.

    Raises:
        SettingError: they differ, or it is no folder of images.
    """
    if (folder / "data.mdb").is_file():
        raise SettingError(
            "generated_img_size", f"is missing; name one of the sizes in the LMDB {folder}"
        )
    sides = Folder(folder).resizing(1, "bilinear").sides
    if sides is None or sides[0] != sides[1]:
        found = f"{sides[0]} to {sides[1]} px" if sides else "of unknown size"
        raise SettingError(
            "generated_img_size", f"is missing; the images of {folder} are {found}, name one side"
        )
    return sides[0]


def _check_real(settings: MeasureSettings) -> None:
    """Find out before anything is loaded that there is nothing to compare with.

    Raises:
        SettingError: names path or stats.
    """
    stats, whole = settings.stats, need_features(settings.metrics)
    if stats and stats.is_dir():
        raise SettingError("stats", f"{stats} is a folder; name a file")
    if settings.path:
        if stats and not stats.is_file():
            check_writable("stats", stats)
        return
    if stats and not stats.is_file():
        raise SettingError("stats", f"{stats}: no such file; or give path to make it")
    is_bundled = bundled.is_bundled(settings.ckpt)
    if is_bundled and stats is None:
        stats = bundled.statistics(settings.network, settings.content_aware)
    if stats is None:
        raise SettingError("path", "is missing; name the real images, or their statistics (stats)")
    if settings.stats is None and whole:
        named = ",".join(name for name in settings.metrics if METRICS[name].needs_features)
        raise SettingError("path", f"is missing; {named} needs the real images themselves")


def _made(
    settings: MeasureSettings,
    extractor: Extractor,
    generated: Generator | Images,
    device: torch.device,
) -> Features:
    """Compute features of the generator's images, or of those of a folder."""
    n, batch, seed = settings.n_sample, settings.batch_size, settings.seed
    if isinstance(generated, Generator):
        return sampled_features(generated, extractor, n, batch, seed, settings.truncation)
    with blame("images"):
        return image_features(generated, extractor, batch, settings.workers, device)


def _real(
    settings: MeasureSettings, size: int, extractor: Extractor, device: torch.device
) -> Statistics:
    """Find the statistics of the real images."""
    stats, whole = settings.stats, need_features(settings.metrics)
    if settings.path:
        with blame("path"):
            images = Images(settings.path, size, resample=settings.resample)
        how = (device, settings.batch_size, settings.workers, whole)
        with blame("stats" if stats and stats.is_file() else "path"):
            found = real_statistics(images, stats, extractor, *how)
        made = found.record.get("files")
        # Asked of what was named alone: it takes a look at every file.
        if stats and made and distributed.rank() == 0 and made != images.fingerprint():
            warn(
                f"warning: {stats} was made of {found.record['count']} images of"
                f" {found.record['images']}, and {settings.path} holds others; those of the"
                " statistics are what is compared with"
            )
        return found
    stats = stats or bundled.statistics(settings.network, settings.content_aware)
    assert stats is not None  # `_check_real` has seen to it
    with blame("stats"):
        found = read_statistics(stats, extractor, whole, Resizing(size, settings.resample, None))
        own = extractor.dimensions(size, device)
        if len(found.mean) != own:  # found before images are made
            raise ValueError(
                f"{stats} is of {len(found.mean)} features, and these settings make {own}; name"
                " other statistics"
            )
        return found
