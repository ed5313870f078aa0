"""The loop of a run until its end or a signal: log, samples, evaluation, checkpoints."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from Compression.run.evaluation import Evaluation
from Compression.run.networks import weights
from Compression.training import Event, NonFiniteError, Trainer, iterate
from Dataset import DatasetError
from Evaluation import sampling
from Model import checkpoint
from train_hyperparams import TrainConfig
from Util import distributed, pictures
from Util.device import peak_memory_gib, reserved_memory_gib
from Util.progress import Progress, show
from Util.run_log import RunLog, measured
from Util.settings import SettingError
from Util.stopping import StoppedError, StopRequest


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
        self.unmeasured = False  # the last measurement was left
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
            self.unmeasured = True
            with self.trainer.averages.paused(), contextlib.suppress(StoppedError):
                figures = self.evaluation.measure(self.request)
                if self.run_log:
                    self.run_log.metrics(self.trainer.iteration, figures)
                self.unmeasured = False
            distributed.meet()

    def catch_up(self, every: int) -> None:
        """Measure what a resumed run was stopped in measuring."""
        iteration = self.trainer.iteration
        due = iteration == self.iterations or (every and iteration and iteration % every == 0)
        if not (self.evaluation and due):
            return
        if not distributed.from_first(
            self.run_log is None or measured(self.run_log.folder, iteration)
        ):
            self.evaluate()
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a checkpoint, if the processes agree on the weights.

        Raises:
            OutOfStepError: see `Util.distributed.compare`.
        """
        distributed.compare(weights(self.trainer))
        state = self.trainer.state()
        if self.run_log:
            self.run_log.checkpoint(self.trainer.iteration, state | {"config": self.making})
        self.saved = self.trainer.iteration
        distributed.meet()


def run_loop(
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
            trainer.averages.begin()
            iterate(trainer, _in_step(batches, request, actions.checkpoint), config.iter, events)
        except DatasetError as error:
            actions.checkpoint()
            raise SettingError("path", error) from None
        if trainer.iteration >= config.iter and not actions.unmeasured:
            return 0
        if actions.saved != trainer.iteration:
            actions.checkpoint()
        if not config.dry_run:
            show(f"stopped at iteration {trainer.iteration}; go on with --resume {config.out}")
    return request.signal


@contextlib.contextmanager
def _state_before_failure(config: TrainConfig, trainer: Trainer) -> Iterator[None]:
    """Keep the state before a loss or gradient that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        kept = Path(config.out) / f"before_non_finite_{trainer.iteration:06d}.pt"
        if distributed.rank() == 0:
            checkpoint.save(kept, trainer.state(together=False))
        distributed.meet()  # a launcher would end the first one in the middle of it
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
