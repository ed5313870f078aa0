"""Features of whole sets of images, generated or real, shared by the processes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Dataset.batches import in_order
from Dataset.images import Images
from Dataset.loading import load_batches
from Dataset.pictures import Resizing
from Evaluation import feature_statistics, sampling
from Evaluation.feature_statistics import Features, Statistics, statistics_of
from Evaluation.features import Extractor
from Model.generator import Generator
from Util import distributed, memory
from Util.progress import Progress, warn
from Util.stopping import StoppedError


def all_features(
    extractor: Extractor,
    batches: Iterable[Tensor],
    device: torch.device,
    n: int,
    what: str,
    stop: Callable[[], bool] = lambda: False,
) -> Features:
    """Compute features (n, D) of all processes' batches, in order, under a progress bar.

    Raises:
        StoppedError: in all processes, if ``stop()`` was true between two batches of one.
    """
    first, step, own = distributed.rank() == 0, distributed.world_size(), []
    with Progress(n, what, "img", shown=first, leave=False) as bar:
        for images in _together(batches, stop):
            own.append(extractor(images.to(device)).cpu())
            bar.update(min(len(images) * step, n - bar.done))
    return torch.cat(distributed.gather_in_turn(own)).numpy()


def _together(batches: Iterable[Tensor], stop: Callable[[], bool]) -> Iterator[Tensor]:
    """Yield this process's batches until all processes have had theirs.

    Before every batch they agree on what is to come, so that none goes on with a measurement that
    another has been told to leave.

    Raises:
        StoppedError: see `all_features`.
    """
    done, more, stopping = range(3)
    rest = iter(batches)
    while True:
        asked = stop()
        images = None if asked else next(rest, None)
        wish = stopping if asked else done if images is None else more
        agreed = distributed.highest(wish, distributed.PATIENCE)
        if agreed == stopping:
            raise StoppedError
        if agreed == done:
            return
        if images is not None:
            yield images


def sampled_features(
    generator: Generator,
    extractor: Extractor,
    n: int,
    batch_size: int,
    seed: int,
    truncation: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
) -> Features:
    """Compute features (n, D) of a generator's images 0 to n - 1; the processes share them.

    Raises:
        StoppedError: see `all_features`.
    """
    centre = sampling.mean_latent(generator, seed) if truncation < 1 else None
    batch_size = memory.at_once(generator.size, memory.INFERENCE, batch_size)
    shares = sampling.shares(n, batch_size, distributed.rank(), distributed.world_size())
    batches = (sampling.images(generator, s, seed, truncation, centre) for s in shares)
    device = generator.device
    return all_features(extractor, batches, device, n, "generated images", stop)


def image_features(
    images: Images, extractor: Extractor, batch_size: int, workers: int | None, device: torch.device
) -> Features:
    """Compute features (N, D) of all images of a data set; the processes share them."""
    batch_size = memory.at_once(images.size, memory.INFERENCE, batch_size)
    own = in_order(len(images), batch_size, distributed.rank(), distributed.world_size())
    batches = load_batches(images, own, workers, device)
    return all_features(extractor, batches, device, len(images), f"images of {images.path}")


def read_statistics(
    file: Path, extractor: Extractor, need_features: bool, resizing: Resizing
) -> Statistics:
    """Read statistics of real images.

    Args:
        file: of statistics.
        extractor: of the features that are compared with them.
        need_features: mean and covariance are not enough.
        resizing: how the real images are meant to come to their size.

    Raises:
        ValueError: no statistics, those of other features, of images of another side or resized by
            another filter, or without the features themselves.
    """
    found = feature_statistics.load(file)
    _check_filter(file, found.record.get("resample"), resizing)
    side = found.record.get("size", resizing.size)
    if side != resizing.size:
        raise ValueError(
            f"{file} was made of images of {side} px; these settings mean {resizing.size} px, which"
            " changes a distance; name other statistics"
        )
    made_by = found.record.get("protocol", extractor.protocol)
    if made_by != extractor.protocol:
        raise ValueError(
            f"{file} was made by: {made_by}; these settings mean: {extractor.protocol}; change the"
            " settings, or name another file"
        )
    if need_features and found.features is None:
        raise ValueError(
            f"{file} has only mean and covariance, but these metrics need the real images"
            " themselves; name these instead"
        )
    return found


def _check_filter(file: Path, made: str | None, resizing: Resizing) -> None:
    """Refuse statistics of images resized by another filter; none and unknown go with any."""
    if made is None and resizing.sides:
        made = "lanczos"  # the only one before it was recorded
    known = {made, resizing.filter} - {None, "none", "unknown"}
    if len(known) > 1 and resizing.filter != "none":
        raise ValueError(
            f"{file} was made of images resized by filter {made}; these settings mean"
            f" {resizing.filter}, which changes a distance; take resample {made}, or other"
            " statistics"
        )


def real_statistics(
    images: Images,
    file: Path | None,
    extractor: Extractor,
    device: torch.device,
    batch_size: int = 64,
    workers: int | None = 0,
    need_features: bool = False,
) -> Statistics:
    """Make statistics of real images once and keep them; all processes take part.

    Args:
        images: the data set.
        file: taken if it is there, else where they are kept; None: beside the images, and made
            again when these have changed.
        extractor: the features.
        device: where the features are computed.
        batch_size: images at a time, fewer where they are large (`Util.memory`).
        workers: processes that load the images.
        need_features: the features themselves are needed, not only their mean and covariance.

    Raises:
        ValueError: see `read_statistics`; non-finite features.
    """
    if file is not None and not distributed.any_process(not file.is_file()):
        return read_statistics(file, extractor, need_features, images.resizing)
    record: dict[str, Any] = {
        "images": str(images.path),
        "count": len(images),
        "size": images.size,
        "files": images.fingerprint(),
        "protocol": extractor.protocol,
    }
    old = dict(record)
    record |= {"resample": images.resizing.filter, "source": images.resizing.source}
    if file is None:
        # Named as before the filter was recorded, where it is the one of that time.
        record_named = old if record["resample"] in ("none", "unknown", "lanczos") else record
        digest = hashlib.sha256(json.dumps(record_named).encode()).hexdigest()[:8]
        place = Path(os.path.abspath(images.path))  # "." has no name
        file = place.with_name(f"{place.name}_{images.size}px_statistics_{digest}.npz")
    found = feature_statistics.find(file, (record, old), need_features)
    if not distributed.any_process(found is None):
        assert found is not None
        return found
    features = image_features(images, extractor, batch_size, workers, device)
    made = statistics_of(features, record, need_features)
    if distributed.rank() == 0:
        try:
            feature_statistics.save(file, made)
        except OSError as error:
            warn(f"warning: the statistics of the real images are not kept: {error}")
    return made
