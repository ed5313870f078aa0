"""What measures the moving average before a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from Compression.training import Trainer
from Dataset.images import Images
from Evaluation import feature_statistics
from Evaluation.feature_sets import real_statistics, sampled_features
from Evaluation.features import make_extractor
from Evaluation.metrics import distance_key, evaluate, need_features
from Model import bundled
from train_hyperparams import TrainConfig
from Util import distributed
from Util.settings import blame


@dataclass(frozen=True)
class Evaluation:
    """What measures the moving average before a checkpoint.

    Attributes:
        measure: name of a figure -> value, in the first process; asks the function that it is given
            between batches, and raises `StoppedError` if the answer was true in any process.
        best_by: the figure whose lowest value chooses the best checkpoint; None keeps none.
        about: features and real images in words.
    """

    measure: Callable[[Callable[[], bool]], dict[str, float]]
    best_by: str | None
    about: str


def make_evaluation(config: TrainConfig, trainer: Trainer, images: Images) -> Evaluation | None:
    """Make what measures g_ema, or None where nothing is asked for, or tried out alone."""
    if not config.fid_n_sample:
        return None
    parser = None
    if config.fid_features == "parser":
        with blame("parser_ckpt"):
            parser = Path(config.parser_ckpt or bundled.default_parser(config.teacher_ckpt))
    inception = Path(config.inception_ckpt) if config.inception_ckpt else None
    extractor = make_extractor(config.fid_features, inception, parser, None, trainer.device)
    if config.dry_run:
        return None
    distributed.meet()  # one that downloads takes its time
    stats = Path(config.fid_stats) if config.fid_stats else None
    metrics = config.fid_metrics
    with blame("fid_stats" if stats and stats.is_file() else "path"):
        real = real_statistics(
            images,
            stats,
            extractor,
            trainer.device,
            config.fid_batch,
            config.workers,
            need_features(metrics),
        )

    notes = feature_statistics.notes_on_few(config.fid_n_sample, real) if "fid" in metrics else []
    about = "; ".join([extractor.protocol, feature_statistics.described(real.record), *notes])

    def measure(stop: Callable[[], bool]) -> dict[str, float]:
        n, batch = config.fid_n_sample, config.fid_batch
        features = sampled_features(trainer.g_ema, extractor, n, batch, config.seed, stop=stop)
        first = distributed.rank() == 0
        figures = evaluate(metrics, extractor, features, real, config.seed) if first else {}
        return {_log_name(name): value for name, value in figures.items()}

    best_by = distance_key(metrics, extractor)
    return Evaluation(measure, _log_name(best_by) if best_by else None, about)


def _log_name(figure: str) -> str:
    return figure.lower().replace(" ", "_")
