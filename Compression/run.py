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
from Compression.batch_memory import check_batch
from Compression.content import ContentParser, parser_for
from Compression.parsers import ClassMapParser
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
from Model.discriminator import GROUP, Discriminator
from Model.generator import Generator, resolution_log2
from train_hyperparams import TrainConfig
from Util import distributed, pictures
from Util.cli import check_writable, if_interrupted
from Util.compiling import compile_method
from Util.device import (
    peak_memory_gib,
    pick_device,
    reserved_memory_gib,
    tune_convolutions,
)
from Util.progress import Progress, show
from Util.run_log import RunLog, check_wandb, newest_checkpoint
from Util.settings import SettingError, Settings, blame, check_files, plain
from Util.stopping import StoppedError, StopRequest
from Util.streams import stream

PRIMARY = TrainConfig.primary_device

NOT_REMEMBERED = (
    *("resume", "out", "dry_run", "workers", "threads"),
    *("device", "gpu_device_ids", "primary_device", "dist_timeout"),
    *("log_freq", "n_sample", "val_sample_freq", "model_save_freq", "keep_checkpoints"),
    "wandb",
)
"""Settings that do not change what a run computes: its checkpoints are the same without them."""


@dataclass(frozen=True)
class Evaluation:
    """What measures the moving average before a checkpoint.

    Attributes:
        measure: name of a figure -> value; asks the function that it is given between batches,
            and raises `StoppedError` if the answer was true in any process.
        best_by: the figure whose lowest value chooses the best checkpoint; None keeps none.
        about: features and real images in words.
    """

    measure: Callable[[Callable[[], bool]], dict[str, float]]
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
        DatasetError: the images gave out, in one process at least; a checkpoint has been written.
        OutOfStepError: the processes' weights differ; no checkpoint has been written.
        NonFiniteError: a loss became NaN or infinite; the state before it has been written.
    """
    check(config)
    tune_convolutions()
    device = distributed.join(_device(config), config.dist_timeout)
    if distributed.rank():
        announce = _nowhere
    config = _of_first_process(config)
    if device.type == "cpu":
        config = replace(config, threads=torch.get_num_threads())
    trainer, origin, parser = _make_trainer(config, device, announce)
    if config.dry_run:
        config = replace(config, iter=trainer.iteration + 2, log_freq=1)
    config = replace(config, size=trainer.generator.size, channels=trainer.generator.channels)
    # What can be refused is, before a folder is made.
    with blame("path"):
        images = Images(config.path, config.size, config.max_bad, config.resample)
    with torch.random.fork_rng(devices=()):  # new networks draw weights before they are loaded
        evaluation = _make_evaluation(config, trainer, images)
    check_batch(trainer, announce, always=config.dry_run)
    config = replace(config, out=config.out or distributed.from_first(_new_folder()))
    log = _open_log(config, trainer, evaluation)
    try:
        for term in trainer.teacher.terms if trainer.teacher else ():
            term.parts.prepare()
        if log:
            announce(
                f"{config.path}: {config.size} px; generator {config.channels};"
                f" {distributed.world_size()} x {device.type}; threads {config.threads};"
                f" run folder {config.out}" + (f"; recipe {config.recipe}" if config.recipe else "")
            )
            if evaluation:
                announce(f"{', '.join(config.fid_metrics)} by {evaluation.about}")
        batches = _stream(config, trainer, images)
        with if_interrupted(lambda: _way_on(config)):  # by a second Ctrl-C
            making = origin | _making(config, parser)
            signal = _train(config, trainer, batches, log, evaluation, making)
    finally:
        if log:
            log.close()
    rows = log.rows() if log else []
    return TrainResult(Path(config.out), trainer.iteration, signal, rows)


def _way_on(config: TrainConfig) -> str:
    """What an interrupted run has kept, and how it goes on, in words."""
    kept = newest_checkpoint(config.out)
    return f"{kept or 'no checkpoint'} is kept; --resume {config.out} goes on from there"


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
    _check_gpus(config)
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
    _check_parts(config, config.batch_size // processes)
    with blame("wandb"):
        check_wandb(config.wandb)


def _check_parts(config: TrainConfig, own: int) -> None:
    """Refuse parts of a process's images that would compute something else than all at once."""
    part = config.batch_gpu
    if not 0 < part < own:
        return
    if part % GROUP or own % GROUP:
        raise SettingError(
            "batch_gpu",
            f"{part} of {own} images: the discriminator compares groups of {GROUP}, so both must"
            f" be multiples of {GROUP}",
        )
    for name in distillation.weights(config):
        if distillation.TERMS[name].whole_batch:
            raise SettingError(
                "batch_gpu", f"{part}: the term {name} compares all {own} images; leave one out"
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


def _check_gpus(config: TrainConfig) -> None:
    """Refuse GPUs that are not there; a launcher's processes have theirs from it."""
    if config.cuda_graphs and not config.compile:
        raise SettingError("cuda_graphs", "replays what --compile compiles; give that too")
    gpus, primary = config.gpu_device_ids, config.primary_device
    if not gpus or len(set(gpus)) < len(gpus):
        raise SettingError("gpu_device_ids", f"{gpus}: name each GPU once, at least one")
    if PRIMARY != primary != f"cuda:{gpus[0]}" and gpus != (0,):
        raise SettingError("primary_device", f"{primary}: not the first of gpu_device_ids, {gpus}")
    if config.device != "auto" or distributed.launched() or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if not 0 <= min(gpus) <= max(gpus) < count:
        raise SettingError(
            "gpu_device_ids", f"{gpus}: there are {count} GPUs, 0 to {count - 1}, to be seen"
        )


def _device(config: TrainConfig) -> torch.device:
    """The device of the settings; auto means the first of the GPUs where there is CUDA.

    Raises:
        SettingError: it cannot do what another setting asks for.
    """
    name, gpus = config.device, config.gpu_device_ids
    if name == "auto" and torch.cuda.is_available():
        name = f"cuda:{gpus[0]}" if config.primary_device == PRIMARY else config.primary_device
    device = pick_device(name, config.tf32, gpus, config.threads)
    if config.cuda_graphs and device.type != "cuda":
        raise SettingError("cuda_graphs", f"is for GPUs, and this run is on {device}; leave it out")
    return device


def _of_first_process(config: TrainConfig) -> TrainConfig:
    """The settings of process 0 for all; where each one runs is its own."""
    first: TrainConfig = distributed.from_first(config)
    return replace(first, device=config.device, workers=config.workers)


def _nowhere(text: str) -> None:
    """Announce nothing."""


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
    parser = parser_for(config.parser_ckpt, config.teacher_ckpt, device, config.content)
    soft = config.kd_soft_mask or not isinstance(parser.network, ClassMapParser)
    compile_method(parser.network, "classify" if soft else "class_map", config.compile_mode)
    return parser


def _load_teacher(config: TrainConfig, size: int, device: torch.device) -> Generator | None:
    """The frozen full-size generator, or None without a teacher."""
    if not config.has_teacher:
        return None
    with blame("teacher_ckpt"):
        generator = checkpoint.load_generator(config.teacher_ckpt, device=device, size=size)
    compile_method(generator, "synthesis", config.compile_mode)
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
) -> tuple[Trainer, dict[str, Any], ContentParser | None]:
    """Build networks, teacher and optimisers, and take up a saved state if asked.

    Returns:
        The trainer, what the checkpoint remembers of its making, and what makes the masks.
    """
    source, resume = distributed.from_first(_start(config))
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
        else:
            _renew_streams(config, trainer, len(content["train_state"]["rng"]), announce)
    distributed.meet()  # one that downloads takes its time
    distributed.broadcast(_weights(trainer).values())
    origin = content.get("config")
    return trainer, dict(origin) if isinstance(origin, Mapping) else {}, parser


def _renew_streams(
    config: TrainConfig, trainer: Trainer, before: int, announce: Callable[[str], None]
) -> None:
    """Start random streams that have not been used yet if the number of processes has changed."""
    now, rank = distributed.world_size(), distributed.rank()
    if before == now:
        return
    numbers = (config.seed, trainer.iteration, now, rank)
    torch.manual_seed(stream(*numbers).initial_seed())
    announce(f"processes: {before} until now, {now} from here on, with new random streams")


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of the networks that are trained, which the processes hold in common."""
    networks = {"g": trainer.generator, "g_ema": trainer.g_ema, "d": trainer.discriminator}
    networks |= {name: network for name, (network, _) in trainer.further.items()}
    states = ((name, network.state_dict()) for name, network in networks.items())
    return {f"{name}.{key}": value for name, state in states for key, value in state.items()}


def _making(config: TrainConfig, parser: ContentParser | None) -> dict[str, Any]:
    """What a checkpoint remembers of a run: what made its weights, files by their names alone."""
    values = {k: v for k, v in _plain(config).items() if k not in NOT_REMEMBERED}
    settings = {k: Path(v).name if isinstance(v, str) else v for k, v in values.items()}
    if parser:
        settings |= {"parser_ckpt": parser.name, "content": parser.content}
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
        figures = evaluate(metrics, extractor, features, real, config.seed)
        return {_log_name(name): value for name, value in figures.items()}

    best_by = distance_key(metrics, extractor)
    return Evaluation(measure, _log_name(best_by) if best_by else None, about)


def _log_name(figure: str) -> str:
    return figure.lower().replace(" ", "_")


def _stream(config: TrainConfig, trainer: Trainer, images: Images) -> Iterator[torch.Tensor]:
    """This process's share of the endless stream of batches, from where the run is."""
    share = EndlessBatches(
        len(images),
        config.batch_size,
        config.seed,
        trainer.images_seen,
        config.mirror,
        distributed.rank(),
        distributed.world_size(),
    )
    return load_batches(images, share, config.workers, trainer.device)


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
            trainer.iteration if config.resume else None,
            config.keep_checkpoints,
            evaluation.best_by if evaluation else None,
            config.wandb,
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
        request: StopRequest,
    ) -> None:
        self.trainer, self.run_log, self.bar, self.evaluation = trainer, log, bar, evaluation
        self.making, self.request, self.iterations = dict(making), request, config.iter
        self.saved = -1  # iteration of the last checkpoint
        numbers = torch.Generator().manual_seed(config.seed)
        z = torch.randn(config.n_sample, trainer.generator.style_dim, generator=numbers)
        self.z = z.to(trainer.device)

    def log(self) -> None:
        """Write the means of the metrics since the last time."""
        trainer = self.trainer
        metrics = trainer.averages.flush() | trainer.clock.flush()
        left = (self.iterations - trainer.iteration) * trainer.settings.batch_size
        metrics |= {
            "peak_memory_gib": peak_memory_gib(trainer.device),
            "reserved_memory_gib": reserved_memory_gib(trainer.device),
            "seconds_left": left / metrics["images_per_second"],
            "time": time.time(),
        }
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
        distributed.meet()

    def evaluate(self) -> None:
        """Measure g_ema, unless the end is asked for meanwhile; `catch_up` does it then."""
        if self.evaluation:
            with self.trainer.averages.paused(), contextlib.suppress(StoppedError):
                figures = self.evaluation.measure(self.request)
                if self.run_log:
                    self.run_log.metrics(self.trainer.iteration, figures)
            distributed.meet()

    def catch_up(self, every: int) -> None:
        """Measure what a resumed run was stopped in measuring."""
        iteration, evaluation = self.trainer.iteration, self.evaluation
        if not (evaluation and evaluation.best_by and iteration and every):
            return
        known = self.run_log is not None and self.run_log.holds(iteration, evaluation.best_by)
        if iteration % every == 0 and not distributed.from_first(known):
            self.evaluate()
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a checkpoint, if the processes agree on the weights.

        Raises:
            OutOfStepError: see `Util.distributed.compare`.
        """
        distributed.compare(_weights(self.trainer))
        state = self.trainer.state()
        if self.run_log:
            self.run_log.checkpoint(self.trainer.iteration, state | {"config": self.making})
        self.saved = self.trainer.iteration
        distributed.meet()


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
    request = StopRequest()
    actions = _Actions(config, trainer, log, bar, evaluation, making, request)
    events = [
        Event(1, bar.update),
        Event(config.log_freq, actions.log),
        Event(config.val_sample_freq, actions.sample),
        Event(config.model_save_freq, actions.evaluate),
        Event(config.model_save_freq, actions.checkpoint),
    ]
    with bar, request, _state_before_failure(config, trainer):
        try:
            if config.resume:
                actions.catch_up(config.model_save_freq)
            iterate(trainer, _in_step(batches, request, actions.checkpoint), config.iter, events)
        except DatasetError as error:
            actions.checkpoint()
            raise SettingError("path", error) from None
        if trainer.iteration >= config.iter:
            return 0
        if actions.saved != trainer.iteration:
            actions.checkpoint()
        show(f"stopped at iteration {trainer.iteration}; go on with --resume {config.out}")
    return request.signal


@contextlib.contextmanager
def _state_before_failure(config: TrainConfig, trainer: Trainer) -> Iterator[None]:
    """Keep the state before a loss or gradient that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        kept = Path(config.out) / f"before_non_finite_{trainer.iteration:06d}.pt"
        checkpoint.save(kept, trainer.state(together=False))
        raise NonFiniteError(f"{error} (the state before it: {kept})") from None


def _in_step(
    batches: Iterator[torch.Tensor], request: StopRequest, save: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """Yield batches until, in any process, a signal asks for the end or the images give out.

    Before every batch the processes agree on the gravest of what they have met, as a number.

    Raises:
        DatasetError: in all processes.
    """
    stopping, broken = 1000, 2000  # added to the number of the signal and of the process
    while True:
        asked, batch, failure = request.signal, None, None
        try:
            batch = None if asked else next(batches)
        except DatasetError as error:
            failure = error
        wish = stopping + asked if asked else int(request.save)
        agreed = distributed.highest(broken + distributed.rank() if failure else wish)
        if agreed >= broken:
            text = f"the images gave out in process {agreed - broken}, which says why"
            raise failure or DatasetError(text)
        if agreed >= stopping:
            request.agree(agreed - stopping)
            return
        if agreed:
            request.save = False
            save()
        assert batch is not None
        yield batch
