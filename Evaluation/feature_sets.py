"""Features of whole sets of images, generated or real, shared by the processes."""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from Dataset.batches import in_order
from Dataset.images import Images
from Dataset.loading import load_batches
from Evaluation import feature_statistics, sampling
from Evaluation.feature_statistics import Features, Statistics, statistics_of
from Evaluation.features import Extractor
from Model.generator import Generator
from Util import distributed


def all_features(
    extractor: Extractor, batches: Iterable[Tensor], device: torch.device, n: int, what: str
) -> Features:
    """Compute features (n, D) of all processes' batches, in order, under a progress bar."""
    quiet, step, own = distributed.rank() != 0, distributed.world_size(), []
    with tqdm(total=n, desc=what, unit="img", leave=False, disable=quiet) as bar:
        for images in batches:
            own.append(extractor(images.to(device)).cpu())
            bar.update(min(len(images) * step, n - bar.n))
    return torch.cat(distributed.gather_in_turn(own)).numpy()


def sampled_features(
    generator: Generator,
    extractor: Extractor,
    n: int,
    batch_size: int,
    seed: int,
    truncation: float = 1.0,
) -> Features:
    """Compute features (n, D) of a generator's images 0 to n - 1; the processes share them."""
    centre = sampling.mean_latent(generator, seed) if truncation < 1 else None
    shares = sampling.shares(n, batch_size, distributed.rank(), distributed.world_size())
    batches = (sampling.images(generator, s, seed, truncation, centre) for s in shares)
    device = generator.device
    return all_features(extractor, batches, device, n, "generated images")


def image_features(
    images: Images, extractor: Extractor, batch_size: int, workers: int, device: torch.device
) -> Features:
    """Compute features (N, D) of all images of a data set; the processes share them."""
    own = in_order(len(images), batch_size, distributed.rank(), distributed.world_size())
    batches = load_batches(images, own, workers, device.type == "cuda")
    return all_features(extractor, batches, device, len(images), f"images of {images.path}")


def read_statistics(file: Path, extractor: Extractor, need_features: bool) -> Statistics:
    """Read statistics of real images.

    Raises:
        ValueError: no statistics, those of other features, or without the features themselves.
    """
    found = feature_statistics.load(file)
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


def real_statistics(
    images: Images,
    file: Path | None,
    extractor: Extractor,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 0,
    need_features: bool = False,
) -> Statistics:
    """Make statistics of real images once and keep them; all processes take part.

    Args:
        images: the data set.
        file: taken if it is there, else where they are kept; None: beside the images, and made
            again when these have changed.
        extractor: the features.
        device: where the features are computed.
        batch_size: images at a time.
        workers: processes that load the images.
        need_features: the features themselves are needed, not only their mean and covariance.

    Raises:
        ValueError: see `read_statistics`; too few images for the features, or non-finite ones.
    """
    if file is not None and not distributed.any_process(not file.is_file(), device):
        return read_statistics(file, extractor, need_features)
    record = {
        "images": str(images.path),
        "count": len(images),
        "size": images.size,
        "files": images.fingerprint(),
        "protocol": extractor.protocol,
    }
    if file is None:
        digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
        file = images.path.with_name(f"{images.path.name}_{images.size}px_statistics_{digest}.npz")
    found = feature_statistics.find(file, record, need_features)
    if not distributed.any_process(found is None, device):
        assert found is not None
        return found
    feature_statistics.check_enough(len(images), extractor.dimensions(images.size, device))
    features = image_features(images, extractor, batch_size, workers, device)
    made = statistics_of(features, record, need_features)
    if distributed.rank() == 0:
        try:
            feature_statistics.save(file, made)
        except OSError as error:
            print(f"warning: {file} could not be written ({error})", file=sys.stderr)
    return made
