"""The metrics that compare sets of images by their features, in one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from Evaluation import fid, kid, precision_recall
from Evaluation.feature_statistics import Features, Statistics, StatisticsError, check_features
from Evaluation.features import Extractor


@dataclass(frozen=True)
class Metric:
    """A metric of two sets of images.

    Attributes:
        measure: features of generated images (N, D), statistics of real ones, the distance's name
            and a seed >= 0 -> figures by name, the distance first. A metric that is no distance
            names its figures itself.
        description: one line for the command line's help.
        distance: what a distance is called, see `Extractor.distance_name`; None for other metrics.
        needs_features: mean and covariance of the real images are not enough.
        fewest: generated, and real, images that it needs.
    """

    measure: Callable[[Features, Statistics, str, int], dict[str, float]]
    description: str
    distance: tuple[str, str] | None = None
    needs_features: bool = False
    fewest: int = 2

    def name(self, extractor: Extractor) -> str:
        """Name the distance of these features; empty for other metrics."""
        return extractor.distance_name(*self.distance) if self.distance else ""


METRICS = {
    "fid": Metric(fid.measure, "Frechet distance", distance=("FID", "Frechet")),
    "kid": Metric(kid.measure, "kernel distance", ("KID", "kernel"), needs_features=True, fewest=4),
    "pr": Metric(precision_recall.measure, "precision and recall", needs_features=True, fewest=4),
}


def too_few(metrics: Sequence[str], n: int) -> str:
    """Say which metric needs more images than ``n``, and which do with them; else empty."""
    lacking = [name for name in metrics if METRICS[name].fewest > n]
    if not lacking:
        return ""
    others = [name for name, metric in METRICS.items() if metric.fewest <= n]
    other = f", or metrics {','.join(others)}" if others else ""
    return f"{lacking[0]} needs at least {METRICS[lacking[0]].fewest} images; take more{other}"


def need_features(metrics: Sequence[str]) -> bool:
    """Return whether any of the metrics needs the features of the real images themselves."""
    return any(METRICS[metric].needs_features for metric in metrics)


def distance_key(metrics: Sequence[str], extractor: Extractor) -> str | None:
    """Return the name of the first figure that is a distance, or None."""
    names = (METRICS[metric].name(extractor) for metric in metrics)
    return next(filter(None, names), None)


def _count(real: Statistics) -> int | None:
    """How many real images there are, if it is known."""
    return None if real.features is None else len(real.features)


def evaluate(
    metrics: Sequence[str], extractor: Extractor, generated: Features, real: Statistics, seed: int
) -> dict[str, float]:
    """Measure generated images by metrics of the table: figures by name, in the metrics' order.

    Args:
        metrics: keys of `METRICS`.
        extractor: of the features; the distances are named after it.
        generated: features of the generated images.
        real: statistics of the real images, with features where `need_features` says so.
        seed: of random subsets, >= 0.

    Raises:
        StatisticsError: too few generated images, non-finite features, or others than the real.
    """
    check_features(generated, real)
    for n, what in ((len(generated), "generated"), (_count(real), "real")):
        if n is not None and (problem := too_few(metrics, n)):
            raise StatisticsError(f"{n} {what} images: {problem}")
    figures: dict[str, float] = {}
    for metric in metrics:
        name = METRICS[metric].name(extractor)
        figures |= METRICS[metric].measure(generated, real, name, seed)
    return figures
