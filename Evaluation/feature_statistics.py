"""What is kept of a set of features: mean, covariance, and what it was made from."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from Util.files import atomic_path, read_npz

Array = NDArray[np.float64]
Features = NDArray[np.float32]
"""Features of N images, (N, D)."""
LARGEST_PICKLE = 2**30
"""Bytes; mean and covariance of 2048 features take 34 million."""


class StatisticsError(ValueError):
    """Statistics cannot be made or used; the message says what was found and what to do."""


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64.

    Attributes:
        features: (N, D) float32, kept where more than a Frechet distance is computed from them.
        record: what the features were made from, plain values; empty if unknown.
    """

    mean: Array
    cov: Array
    features: Features | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def check_features(features: Features, real: Statistics) -> None:
    """Refuse features that are not finite, or not those of the real images' statistics.

    Raises:
        StatisticsError: says what is wrong.
    """
    if features.shape[1] != len(real.mean):
        raise StatisticsError(
            f"statistics of {features.shape[1]} and of {len(real.mean)} features cannot be"
            " compared; make them again with the same features"
        )
    _check_finite(features)


def _check_finite(features: Features) -> None:
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise StatisticsError(f"features of {bad} of {len(features)} images are NaN or infinite")


def expected_bias(cov: Array, n: int, seed: int = 0) -> float:
    """Estimate the Frechet distance to N(m, C) that n samples of N(m, C) itself have.

    With sample covariance S = C^(1/2) Z Z^T C^(1/2) / (n - 1), Z of standard normals (D, n - 1),
    the mean contributes tr C / n and the covariances tr S + tr C - 2 ||C Z||_* / (n - 1)^(1/2).
    The latter hardly varies where D is large, so one draw of Z stands for its expectation.

    Args:
        cov: C (D, D).
        n: samples, at least 2.
        seed: of the draw.
    """
    z = np.random.default_rng(seed).standard_normal((len(cov), n - 1))
    z /= np.sqrt(n - 1)
    product = cov @ z
    smaller = product.T @ product if n <= len(cov) else product @ product.T
    norm = np.sqrt(np.linalg.eigvalsh(smaller).clip(min=0)).sum()
    return float(np.trace(cov) * (1 + 1 / n) + (z * product).sum() - 2 * norm)


def notes_on_few(n: int, real: Statistics) -> list[str]:
    """Warnings where generated or real images are too few for a covariance of full rank.

    Args:
        n: generated images.
        real: of the real images; their number is that of its record.
    """
    counts = {"generated": n, "real": real.record.get("count")}
    return [
        f"warning: only {count} {what} images for {len(real.mean)} features raise a Frechet"
        f" distance, here by roughly {expected_bias(real.cov, count):.3g}; compare it with those of"
        " as many images only, or take the kernel distance (metrics kid), which few images do not"
        " bias"
        for what, count in counts.items()
        if isinstance(count, int) and 2 <= count <= len(real.mean)
    ]


def described(record: Mapping[str, Any]) -> str:
    """How the real images of a record came to their size, in words."""
    if not record:
        return "real images: filter, source size and flips not recorded"
    return f"real images: {resized(*map(record.get, ('size', 'resample', 'source')))}, no flips"


def resized(size: int | None, made: str | None, source: str | None) -> str:
    """Say how pictures came to a side in px, by which filter (none: they had it), from which."""
    how = f"resized from {source} to {size} px, filter {made}"
    if made is None:
        how = f"{size} px, filter not recorded: lanczos where they were resized"
    elif made == "none":
        how = f"{size} px, not resized"
    return f"8 bits, {how}"


def mean_and_covariance(features: NDArray[np.floating]) -> tuple[Array, Array]:
    """Compute mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def statistics_of(
    features: Features, record: Mapping[str, Any], keep_features: bool = False
) -> Statistics:
    """Compute statistics of features (N, D).

    Raises:
        StatisticsError: non-finite features, or of less than two images.
    """
    _check_finite(features)
    if len(features) < 2:
        raise StatisticsError("one image has no covariance; take more")
    mean, cov = mean_and_covariance(features)
    return Statistics(mean, cov, features if keep_features else None, record)


def save(path: Path, statistics: Statistics) -> None:
    """Write an .npz of mean, cov, record (JSON) and, if there, features; atomically."""
    arrays: dict[str, Any] = {"mean": statistics.mean, "cov": statistics.cov}
    if statistics.features is not None:
        arrays["features"] = statistics.features
    record = np.array(json.dumps(dict(statistics.record)))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, record=record, **arrays)


def load(path: Path) -> Statistics:
    """Read statistics: our .npz, or a pickled {mean, cov} of the StyleGAN2-PyTorch family.

    No code of the file is run.

    Raises:
        StatisticsError: the file is missing, unreadable, unsafe or holds something else.
    """
    if not path.is_file():
        raise StatisticsError(
            f"{path}: no such file; give statistics (.npz, or a {{mean, cov}} .pkl)"
        )
    try:
        content = read_npz(path) if is_zipfile(path) else _unpickled(path)
        record = json.loads(str(content["record"])) if "record" in content else {}
        mean, cov = (np.asarray(content[key], dtype=np.float64) for key in ("mean", "cov"))
        features = content.get("features")
        if features is not None:
            features = np.asarray(features, dtype=np.float32)
    except _UnsafeError as error:
        raise StatisticsError(f"{path}: refused, it would run {error}; make it again") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StatisticsError(f"{path}: no statistics of features (mean, cov): {reason}") from None
    found = Statistics(mean, cov, features, record)
    _check(found, path)
    return found


def _unpickled(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_PICKLE:
        raise ValueError(f"more than {LARGEST_PICKLE / 2**30:g} GiB")
    with open(path, "rb") as file:
        return _Arrays(file).load()


def _check(found: Statistics, path: Path) -> None:
    """Refuse what cannot be the mean and covariance of features.

    Raises:
        StatisticsError: names the file and what is wrong.
    """
    mean, cov, features = found.mean, found.cov, found.features
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise StatisticsError(f"{path}: mean {mean.shape} and covariance {cov.shape} do not fit")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
        raise StatisticsError(f"{path}: mean {mean.shape} and features {features.shape} do not fit")
    if not all(np.isfinite(a).all() for a in (mean, cov, features) if a is not None):
        raise StatisticsError(f"{path}: holds NaN or infinite values; make it again")
    if not np.allclose(cov, cov.T) or (cov.diagonal() < 0).any():
        raise StatisticsError(f"{path}: its cov is no covariance; make it again")
    if not isinstance(found.record, Mapping):
        raise StatisticsError(f"{path}: its record is no JSON object; make it again")


def find(
    path: Path, records: Sequence[Mapping[str, Any]], need_features: bool
) -> Statistics | None:
    """Read statistics from a file, or return None unless they are of one of these records.

    Raises:
        StatisticsError: the file holds no statistics.
    """
    if not path.is_file():
        return None
    found = load(path)
    fits = found.record in records and not (need_features and found.features is None)
    return found if fits else None


class _UnsafeError(Exception):
    """A pickle names something other than NumPy's own array constructors."""


class _Arrays(pickle.Unpickler):
    """Reads plain containers and NumPy arrays, and calls nothing else."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
            *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise _UnsafeError(f"{module}.{name}")
        # Old files name NumPy's modules as they were; new NumPy would warn.
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
