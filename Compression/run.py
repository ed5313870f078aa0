"""One training run: networks, teacher, data, log, and the loop until the end or a signal.

pruned checkpoint + teacher -> g, g_ema, d -> four phases an iteration -> compressed checkpoint
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from Compression import distillation, recipes
from Compression.content import ContentParser, parser_for
from Compression.training import Event, NonFiniteError, Teacher, Trainer, iterate
from Dataset import DatasetError
from Dataset.batches import EndlessBatches
from Dataset.images import Images
from Dataset.loading import load_batches
from Evaluation import feature_statistics, sampling
from Evaluation.feature_sets import real_statistics, sampled_features
from Evaluation.features import make_extractor
from Evaluation.metrics import METRICS, distance_key, evaluate, need_features
from Evaluation.settings import check_size
from Model import bundled, checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator, resolution_log2
from train_hyperparams import TrainConfig
from Util import distributed, pictures
from Util.cli import check_writable
from Util.device import peak_memory_gib, pick_device, set_tf32
from Util.progress import Progress, show
from Util.run_log import RunLog, newest_checkpoint, read_metrics
from Util.settings import SettingError, Settings, blame, check_files, plain
from Util.stopping import StopRequest

NOT_REMEMBERED = (
    *("resume", "out", "dry_run", "workers", "device", "gpu_device_ids", "primary_device"),
    *("log_freq", "n_sample", "val_sample_freq", "model_save_freq", "keep_checkpoints"),
)
"""Settings that do not change what a run computes: its checkpoints are the same without them."""


@dataclass(frozen=True)
class Evaluation:
    """What measures the moving average before a checkpoint.

    Attributes:
        measure: name of a figure -> value.
        best_by: the figure whose lowest value chooses the best checkpoint; None keeps none.
        about: features and real images in words.
    """

    measure: Callable[[], dict[str, float]]
    best_by: str | None
    about: str


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: of the run.
        iteration: that it reached.
        signal: number of the signal that ended it early, or 0.
        rows: of metrics.jsonl; empty in all processes but the first.
    """

    folder: Path
    iteration: int
    signal: int
    rows: list[dict[str, float]]

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.folder / "checkpoints" / f"{self.iteration:06d}.pt"


def option_kinds() -> list[type[Settings]]:
    """The settings of all distillation terms that have any."""
    return [kind.options for kind in distillation.TERMS.values() if kind.options is not None]


def train(config: TrainConfig, announce: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Train as configured; in one of several processes, this one's share.

    Args:
        config: the settings.
        announce: called in the first process with a line that tells what begins.

    Raises:
        SettingError: names the setting or file.
        DatasetError: the images gave out; a run of one process has written a checkpoint.
        NonFiniteError: a loss became NaN or infinite; the state before it has been written.
    """
    check(config)
    set_tf32(config.tf32)
    trainer, origin = _make_trainer(config, distributed.join(_device(config)), announce)
    if config.dry_run:
        config = replace(config, iter=trainer.iteration + 2, log_freq=1)
    config = replace(config, size=trainer.generator.size, channels=trainer.generator.channels)
    # What can be refused is, before a folder is made.
    with blame("path"):
        images = Images(config.path, config.size, config.max_bad, config.resample)
    with torch.random.fork_rng(devices=()):  # new networks draw weights before they are loaded
        evaluation = _make_evaluation(config, trainer, images)
    config = replace(config, out=config.out or distributed.gather(_new_folder())[0])
    log = _open_log(config, trainer, evaluation)
    try:
        for term in trainer.teacher.terms if trainer.teacher else ():
            term.parts.prepare()
        if log:
            announce(
                f"{config.path}: {config.size} px; generator {config.channels};"
                f" {distributed.world_size()} x {trainer.device.type}; run folder {config.out}"
                + (f"; recipe {config.recipe}" if config.recipe else "")
            )
            if evaluation:
                announce(f"{', '.join(config.fid_metrics)} by {evaluation.about}")
        batches = _stream(config, trainer, images)
        signal = _train(config, trainer, batches, log, evaluation, origin | _making(config))
    finally:
        if log:
            log.close()
    rows = read_metrics(config.out) if log else []
    return TrainResult(Path(config.out), trainer.iteration, signal, rows)


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        SettingError: names the setting, the value and what to do.
    """
    if not config.path:
        raise SettingError("path", "is missing; give a folder of training images or an LMDB")
    if config.size:
        with blame("size:"):
            resolution_log2(config.size)
    if config.fid_stats and Path(config.fid_stats).is_dir():
        raise SettingError("fid_stats", f"{config.fid_stats} is a folder; name a file")
    _check_inputs(config)
    check_writable("out", Path(config.out or "runs") / "config.json")
    if config.load_train_state and not config.ckpt:
        raise SettingError("load_train_state", "goes with ckpt; name the checkpoint to go on from")
    if config.fid_n_sample == 1:
        raise SettingError("fid_n_sample", "1: one image has no covariance; take more, or 0")
    distillation.weights(config)
    unknown = set(config.fid_metrics) - METRICS.keys()
    if unknown or not config.fid_metrics:
        named = ",".join(config.fid_metrics)
        raise SettingError("fid_metrics", f"{named!r}: take some of {', '.join(METRICS)}")
    if config.recipe:
        recipes.named(config.recipe)
    if (config.kd or config.recipe) and not config.has_teacher:
        raise SettingError(
            "teacher_ckpt",
            f"is missing; {config.recipe or ','.join(config.kd)} distils from a full-size model",
        )
    processes = distributed.launched_processes()
    if config.batch_size % processes:
        raise SettingError(
            "batch_size",
            f"{config.batch_size} is the global one; it must be divisible by the {processes}"
            " processes",
        )


def _check_inputs(config: TrainConfig) -> None:
    """Refuse files that are not there; a run that goes on needs no ckpt."""
    check_files(config, *(("ckpt",) if config.resume else ()))
    with blame("teacher_ckpt"):
        if config.has_teacher and not Path(config.teacher_ckpt).exists():
            raise ValueError(f"{config.teacher_ckpt}: no such file; check the name")
    if config.has_teacher and config.content_aware_KD and not config.parser_ckpt:
        with blame("parser_ckpt"):
            bundled.default_parser(config.teacher_ckpt)


def _device(config: TrainConfig) -> torch.device:
    """The device of the settings; auto means primary_device where there is CUDA."""
    if config.device == "auto" and torch.cuda.is_available():
        return pick_device(config.primary_device)
    return pick_device(config.device)


def _make_networks(
    config: TrainConfig, content: Mapping[str, Any], source: str
) -> tuple[Generator, Generator | None]:
    """Generator and its moving average if there is one, loaded or new."""
    if not content:
        size, widths = config.size or 64, (config.channels, config.channel_multiplier)
        return Generator(size, config.style_dim, config.n_mlp, *widths), None
    g_ema = checkpoint.load_generator(content, name=source) if "g_ema" in content else None
    key = "g" if "g" in content else "g_ema"
    generator = checkpoint.load_generator(content, key, name=source)
    check_size("size", config.size, source, generator)
    return generator, g_ema


def _make_discriminator(
    config: TrainConfig,
    content: Mapping[str, Any],
    generator: Generator,
    resume: bool,
    source: str,
) -> Discriminator:
    """The checkpoint's, the teacher's where it has none, or a new one of their widths."""
    if not content:
        # As wide as the generator's last convolution at each resolution.
        return Discriminator(generator.size, channels=generator.channels[1::2])
    if "d" not in content and config.has_teacher:
        with blame("teacher_ckpt"):
            others = checkpoint.read(config.teacher_ckpt)
        content = {**content, **{key: others[key] for key in ("d",) if key in others}}
    scratch = config.discriminator == "scratch" and not resume
    if scratch and "d" not in content:
        return Discriminator(generator.size, config.channel_multiplier)
    if "d" not in content:
        also = f", nor does {config.teacher_ckpt}" if config.has_teacher else ""
        raise SettingError(
            "discriminator",
            f"{config.discriminator}: {source} holds none (d){also}; give a teacher_ckpt that has"
            " one, or train with discriminator scratch",
        )
    found = checkpoint.load_discriminator(content, name=source)
    return Discriminator(found.size, channels=found.channels) if scratch else found


def _make_parser(config: TrainConfig, device: torch.device) -> ContentParser | None:
    """What makes the teacher's mask, or None where nothing is masked."""
    if not (config.has_teacher and config.content_aware_KD):
        return None
    return parser_for(config.parser_ckpt, config.teacher_ckpt, device, config.content)


def _load_teacher(config: TrainConfig, size: int, device: torch.device) -> Generator | None:
    """The frozen full-size generator, or None without a teacher."""
    if not config.has_teacher:
        return None
    with blame("teacher_ckpt"):
        generator = checkpoint.load_generator(config.teacher_ckpt, device=device, size=size)
    return generator.eval().requires_grad_(False)


def _make_teacher(
    config: TrainConfig,
    generator: Generator | None,
    discriminator: Discriminator,
    device: torch.device,
    parser: ContentParser | None,
) -> Teacher | None:
    """The full-size generator with its mask and the terms, or None without a teacher."""
    if generator is None:
        return None
    mask = parser.soft if parser and config.kd_soft_mask else parser
    sources = distillation.Sources(config, generator, device, discriminator)
    return Teacher(generator, mask, distillation.make_terms(sources))


def _start(config: TrainConfig) -> tuple[str, bool]:
    """The checkpoint to start from, or empty, and whether that is to go on with its training."""
    if config.resume:
        file = Path(config.resume)
        if newest := file if file.is_file() else newest_checkpoint(file):
            return str(newest), True
        # A run that was ended before its first checkpoint starts again as it did.
    return config.ckpt, config.load_train_state


def reached(config: TrainConfig) -> int:
    """The iteration of the checkpoint to go on from if nothing is left to train, else 0."""
    source, resume = _start(config)
    name = Path(source).stem
    iteration = int(name) if resume and name.isdecimal() else 0
    return iteration if iteration >= config.iter and not config.dry_run else 0


def _make_trainer(
    config: TrainConfig, device: torch.device, announce: Callable[[str], None]
) -> tuple[Trainer, dict[str, Any]]:
    """Build networks, teacher and optimisers, and take up a saved state if asked.

    Returns:
        The trainer, and what the checkpoint remembers of its making.
    """
    source, resume = _start(config)
    torch.manual_seed(config.seed)
    named = "resume" if config.resume and resume else "ckpt" if source else "size and --channels:"
    with blame(named):
        content = checkpoint.read(source) if source else {}
        _check_teacher(config, source, content)
        generator, g_ema = _make_networks(config, content, source)
        discriminator = _make_discriminator(config, content, generator, resume, source)
    full = _load_teacher(config, generator.size, device)
    parser = _make_parser(config, device)
    if parser:
        _compare_content(source, content, parser, announce)
    teacher = _make_teacher(config, full, discriminator, device, parser)
    trainer = Trainer(generator, discriminator, config, device, teacher, g_ema)
    if distributed.world_size() > 1:
        torch.manual_seed(config.seed * distributed.world_size() + distributed.rank() + 1)
    if resume:
        name = Path(source).stem
        iteration = int(name) if name.isdecimal() else None
        with blame(f"{named} {source}:"):
            trainer.load_state(content, iteration)
        if "train_state" not in content:
            announce(
                f"{source}: written by the original code; going on at iteration {iteration}, as its"
                " name says, with the mean path length at 0 and new random streams"
            )
    origin = content.get("config")
    return trainer, dict(origin) if isinstance(origin, Mapping) else {}


def _making(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint remembers of a run: what made its weights, files by their names alone."""
    values = {k: v for k, v in _plain(config).items() if k not in NOT_REMEMBERED}
    settings = {k: Path(v).name if isinstance(v, str) else v for k, v in values.items()}
    return {"training": settings} | ({"recipe": config.recipe} if config.recipe else {})


def _check_teacher(config: TrainConfig, source: str, content: Mapping[str, Any]) -> None:
    """Ask for the teacher of a checkpoint that says it was pruned."""
    made = content.get("config")
    if isinstance(made, Mapping) and "channels_after" in made and not config.teacher_ckpt:
        raise SettingError(
            "teacher_ckpt",
            f"is missing; {source} was pruned and learns from its full-size teacher"
            f" ({made.get('source', 'unknown')}): name it, or none for the GAN losses alone",
        )


def _compare_content(
    source: str,
    content: Mapping[str, Any],
    parser: ContentParser,
    announce: Callable[[str], None],
) -> None:
    """Tell that a checkpoint was pruned for another content than it is trained for."""
    made = content.get("config")
    pruned_for = made.get("content") if isinstance(made, Mapping) else None
    if isinstance(pruned_for, str) and pruned_for and pruned_for != parser.content:
        announce(
            f"{source} was pruned for {pruned_for}, and learns {parser.content} from its teacher;"
            " set content to train for what it was pruned for"
        )


def _make_evaluation(config: TrainConfig, trainer: Trainer, images: Images) -> Evaluation | None:
    """What measures g_ema, or None where nothing is asked for."""
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

    def measure() -> dict[str, float]:
        features = sampled_features(
            trainer.g_ema, extractor, config.fid_n_sample, config.fid_batch, config.seed
        )
        figures = evaluate(metrics, extractor, features, real, config.seed)
        return {_log_name(name): value for name, value in figures.items()}

    best_by = distance_key(metrics, extractor)
    return Evaluation(measure, _log_name(best_by) if best_by else None, about)


def _log_name(figure: str) -> str:
    return figure.lower().replace(" ", "_")


def _stream(config: TrainConfig, trainer: Trainer, images: Images) -> Iterator[torch.Tensor]:
    """This process's share of the endless stream of batches, from where the run is."""
    stream = EndlessBatches(
        len(images),
        config.batch_size,
        config.seed,
        trainer.images_seen,
        config.mirror,
        distributed.rank(),
        distributed.world_size(),
    )
    return load_batches(images, stream, config.workers, trainer.device.type == "cuda")


def _new_folder() -> str:
    """A new folder of the current time; runs of the same second get one each. Of rank 0 only."""
    now = time.strftime("runs/%Y%m%d-%H%M%S")
    names = (now if i == 1 else f"{now}-{i}" for i in itertools.count(1))
    while distributed.rank() == 0:
        name = next(names)
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            return name
    return ""


def _plain(config: TrainConfig) -> dict[str, Any]:
    """All settings, those of terms among them, as values that JSON holds."""
    settings = plain(config)
    for options in settings.pop("options"):
        settings |= plain(options)
    return settings


def _open_log(
    config: TrainConfig, trainer: Trainer, evaluation: Evaluation | None
) -> RunLog | None:
    """The run's folder, in the first process only."""
    if distributed.rank() != 0:
        return None
    with blame("out"):
        return RunLog(
            config.out,
            _plain(config),
            checkpoint.save,
            trainer.iteration if config.resume or config.load_train_state else None,
            config.keep_checkpoints,
            evaluation.best_by if evaluation else None,
        )


class _Actions:
    """What happens now and then during training; all processes take part, the first one writes."""

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        log: RunLog | None,
        bar: Progress,
        evaluation: Evaluation | None,
        making: Mapping[str, Any],
    ) -> None:
        self.trainer, self.run_log, self.bar, self.evaluation = trainer, log, bar, evaluation
        self.making = dict(making)
        stream = torch.Generator().manual_seed(config.seed)
        z = torch.randn(config.n_sample, trainer.generator.style_dim, generator=stream)
        self.z = z.to(trainer.device)

    def log(self) -> None:
        """Write the means of the metrics since the last time."""
        trainer = self.trainer
        metrics = trainer.averages.flush() | {"peak_memory_gib": peak_memory_gib(trainer.device)}
        if self.run_log:
            self.run_log.metrics(trainer.iteration, metrics)
            shown = {k: v for k, v in metrics.items() if k.endswith("_loss") or k.startswith("kd_")}
            self.bar.figures(", ".join(f"{k} {v:.3f}" for k, v in shown.items()))

    def sample(self) -> None:
        """Write a grid of g_ema's images, always of the same latents."""
        if self.run_log:
            g_ema = self.trainer.g_ema
            samples = sampling.render(g_ema, sampling.from_z(g_ema, self.z))
            title = f"iteration {self.trainer.iteration:,}, moving average (g_ema)"
            grid = pictures.with_text(pictures.grid(samples), title, above=True)
            self.run_log.samples(self.trainer.iteration, grid)

    def evaluate(self) -> None:
        """Measure g_ema."""
        if self.evaluation:
            with self.trainer.averages.paused():
                figures = self.evaluation.measure()
            if self.run_log:
                self.run_log.metrics(self.trainer.iteration, figures)

    def checkpoint(self) -> None:
        """Write a checkpoint."""
        state = self.trainer.state()
        if self.run_log:
            self.run_log.checkpoint(self.trainer.iteration, state | {"config": self.making})


def _train(
    config: TrainConfig,
    trainer: Trainer,
    batches: Iterator[torch.Tensor],
    log: RunLog | None,
    evaluation: Evaluation | None,
    making: Mapping[str, Any],
) -> int:
    """Train under a progress bar until the end or a signal; returns the signal's number or 0."""
    bar = Progress(config.iter, "training", done=trainer.iteration, shown=bool(log))
    actions = _Actions(config, trainer, log, bar, evaluation, making)
    events = [
        Event(1, bar.update),
        Event(config.log_freq, actions.log),
        Event(config.val_sample_freq, actions.sample),
        Event(config.model_save_freq, actions.evaluate),
        Event(config.model_save_freq, actions.checkpoint),
    ]
    with bar, StopRequest() as stop:
        try:
            iterate(trainer, batches, config.iter, events, stop)
        except DatasetError as error:
            if distributed.world_size() == 1:  # the others would have to take part
                actions.checkpoint()
            raise SettingError("path", error) from None
        except NonFiniteError as error:
            kept = Path(config.out) / f"before_non_finite_{trainer.iteration:06d}.pt"
            checkpoint.save(kept, trainer.state(together=False))
            raise NonFiniteError(f"{error} (the state before it: {kept})") from None
        if trainer.iteration >= config.iter:
            return 0
        actions.checkpoint()
        show(f"stopped at iteration {trainer.iteration}; go on with --resume {config.out}")
    return stop.signal
