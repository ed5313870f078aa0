"""Training of a generator against a discriminator, with distillation from a full-size teacher.

One iteration has up to four phases: discriminator, R1 penalty, generator (with distillation) and
path length penalty. Each computes a loss, and `Trainer._step` does the rest.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from Model.discriminator import Discriminator
from Model.generator import Generator
from Util import distributed, losses


class Settings(Protocol):
    """What the loop needs of the configuration; train_hyperparams.TrainConfig has it all."""

    batch_size: int
    lr: float
    mixing: float
    ema_decay: float
    r1: float
    path_regularize: float
    path_batch_shrink: int
    d_reg_every: int
    g_reg_every: int
    freeze_noise: bool
    kd_l1_lambda: float
    kd_lpips_lambda: float
    kd_mode: str


@dataclass
class Teacher:
    """What the student learns from.

    Attributes:
        generator: full-size network, frozen.
        content_mask: images (N, 3, H, W) -> mask (N, 1, H, W); None distils everywhere.
        perceptual: distance of image pairs; None for L1 alone.
    """

    generator: Generator
    content_mask: Callable[[Tensor], Tensor] | None = None
    perceptual: losses.Perceptual | None = None


class NonFiniteError(RuntimeError):
    """A loss became NaN or infinite; the message names the loss and the iteration."""


def lazy_adam(parameters: Iterator[nn.Parameter], lr: float, every: int) -> Adam:
    """Adam with betas (0, 0.99), corrected for a regulariser of its own step every k iterations.

    StyleGAN2, appendix B: with c = k / (k + 1), the learning rate is lr * c and the betas are to
    the power of c. ``every`` 0 means no such regulariser.
    """
    ratio = every / (every + 1) if every else 1.0
    return Adam(parameters, lr=lr * ratio, betas=(0.0, 0.99**ratio))


def draw_styles(n: int, style_dim: int, mixing: float, device: torch.device) -> list[Tensor]:
    """One z (n, style_dim), or two with probability ``mixing`` (style mixing, for all images)."""
    count = 2 if mixing > 0 and torch.rand(()).item() < mixing else 1
    return list(torch.randn(count, n, style_dim, device=device).unbind(0))


@torch.no_grad()
def accumulate(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move an exponential moving average towards a network's parameters."""
    old: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(old, list(network.parameters()), 1 - decay)


class Trainer:
    """Networks, optimisers and the state of a run.

    Args:
        generator: trained; its moving average starts as a copy unless ``g_ema`` is given.
        discriminator: trained.
        settings: see `Settings`.
        device: where everything runs.
        teacher: adds distillation to the generator's phase.
        g_ema: moving average to go on with.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        settings: Settings,
        device: torch.device,
        teacher: Teacher | None = None,
        g_ema: Generator | None = None,
    ) -> None:
        self.settings, self.device, self.teacher = settings, device, teacher
        self.generator = generator.to(device)
        self.discriminator = discriminator.to(device)
        self.g_ema = (g_ema or copy.deepcopy(generator)).to(device).eval().requires_grad_(False)
        if settings.freeze_noise:
            for layer in generator.styled_convs:
                layer.noise.weight.requires_grad_(False)
        path_every = settings.g_reg_every if settings.path_regularize else 0
        self.g_optim = lazy_adam(generator.parameters(), settings.lr, path_every)
        r1_every = settings.d_reg_every if settings.r1 else 0
        self.d_optim = lazy_adam(discriminator.parameters(), settings.lr, r1_every)
        self.iteration = 0
        self.mean_path_length = torch.zeros((), device=device)

    def iterate(self, real: Tensor) -> dict[str, Tensor]:
        """Run one iteration on real images (N, 3, size, size) in [-1, 1].

        Returns:
            Scalars of the phases that ran, detached, still on the device.
        """
        s = self.settings
        self.discriminator.requires_grad_(True)
        metrics = self._d_phase(real)
        if s.r1 and self.iteration % s.d_reg_every == 0:
            metrics |= self._r1_phase(real)
        self.discriminator.requires_grad_(False)
        metrics |= self._g_phase(real.shape[0])
        if s.path_regularize and self.iteration % s.g_reg_every == 0:
            metrics |= self._path_phase(max(1, real.shape[0] // s.path_batch_shrink))
        accumulate(self.g_ema, self.generator, s.ema_decay)
        self.iteration += 1
        return metrics

    def _step(self, optimizer: Optimizer, loss: Tensor) -> None:
        """Back-propagate, average the gradients over the processes, and update."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            distributed.average_gradients(group["params"])
        optimizer.step()

    def _latents(self, n: int) -> Tensor:
        """Draw w+ (n, n_latent, style_dim) of the generator, mixed as configured."""
        z = draw_styles(n, self.generator.style_dim, self.settings.mixing, self.device)
        return self.generator.broadcast_latents([self.generator.mapping(part) for part in z])

    def _d_phase(self, real: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.generator.synthesis(self._latents(real.shape[0]))
        fake_logits, real_logits = self.discriminator(fake), self.discriminator(real)
        loss = losses.d_logistic_loss(real_logits, fake_logits)
        self._step(self.d_optim, loss)
        return {
            "d_loss": loss.detach(),
            "real_score": real_logits.detach().mean(),
            "fake_score": fake_logits.detach().mean(),
        }

    def _r1_phase(self, real: Tensor) -> dict[str, Tensor]:
        real = real.detach().requires_grad_()
        penalty = losses.r1_penalty(self.discriminator(real), real)
        self._step(self.d_optim, penalty * (self.settings.r1 / 2 * self.settings.d_reg_every))
        return {"r1": penalty.detach()}

    def _g_phase(self, n: int) -> dict[str, Tensor]:
        g = self.generator
        z = draw_styles(n, g.style_dim, self.settings.mixing, self.device)
        layer = int(torch.randint(1, g.n_latent, ()))
        rgbs = g(z, inject_index=layer, return_rgbs=True)
        gan_loss = losses.g_nonsaturating_loss(self.discriminator(rgbs[-1]))
        metrics = {"g_loss": gan_loss.detach()}
        loss = gan_loss
        if self.teacher is not None:
            l1, perceptual = self._distillation(self.teacher, rgbs, z, layer)
            s = self.settings
            loss = gan_loss + s.kd_l1_lambda * l1 + s.kd_lpips_lambda * perceptual
            metrics |= {"kd_l1": l1.detach(), "kd_lpips": perceptual.detach()}
        self._step(self.g_optim, loss)
        return metrics

    def _distillation(
        self, teacher: Teacher, rgbs: list[Tensor], z: list[Tensor], layer: int
    ) -> tuple[Tensor, Tensor]:
        """Distance of the student's images to the teacher's of the same latents."""
        with torch.no_grad():
            teacher_rgbs = teacher.generator(z, inject_index=layer, return_rgbs=True)
            mask = teacher.content_mask(teacher_rgbs[-1]) if teacher.content_mask else None
        perceptual = teacher.perceptual if self.settings.kd_lpips_lambda else None
        if self.settings.kd_mode == "Output_Only":
            rgbs, teacher_rgbs = rgbs[-1:], teacher_rgbs[-1:]
        return losses.distillation_loss(rgbs, teacher_rgbs, mask, perceptual)

    def _path_phase(self, n: int) -> dict[str, Tensor]:
        w_plus = self._latents(n)
        images = self.generator.synthesis(w_plus)
        assert isinstance(images, Tensor)
        penalty, self.mean_path_length, lengths = losses.path_length_penalty(
            images, w_plus, self.mean_path_length
        )
        distributed.average(self.mean_path_length)
        self._step(
            self.g_optim, penalty * (self.settings.path_regularize * self.settings.g_reg_every)
        )
        return {"path_penalty": penalty.detach(), "path_length": lengths.mean()}

    def state(self) -> dict[str, Any]:
        """Everything a run needs to go on, in the layout of `Model.checkpoint`."""
        cuda = self.device.type == "cuda"
        return {
            "g": self.generator,
            "g_ema": self.g_ema,
            "d": self.discriminator,
            "g_optim": self.g_optim.state_dict(),
            "d_optim": self.d_optim.state_dict(),
            "train_state": {
                "iteration": self.iteration,
                "mean_path_length": self.mean_path_length.item(),
                "images_seen": self.iteration * self.settings.batch_size,
                "rng_cpu": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Go on from `state`; the networks have been loaded already.

        The learning rates stay those of the settings.

        Raises:
            ValueError: the checkpoint has no training state, or of another architecture.
        """
        missing = [k for k in ("g_optim", "d_optim", "train_state") if k not in content]
        if missing:
            raise ValueError(f"no {missing[0]!r} in the checkpoint, so training cannot go on")
        for name in ("g_optim", "d_optim"):
            optimizer: Optimizer = getattr(self, name)
            options = [
                {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
            ]
            optimizer.load_state_dict(content[name])
            for group, own in zip(optimizer.param_groups, options, strict=True):
                group.update(own)
        saved = content["train_state"]
        self.iteration = saved["iteration"]
        self.mean_path_length = torch.tensor(saved["mean_path_length"], device=self.device)
        torch.set_rng_state(saved["rng_cpu"])
        if self.device.type == "cuda" and saved["rng_cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng_cuda"], self.device)


class Averages:
    """Means of the metrics since the last line of the log, without waiting for the device."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._images, self._since = 0, time.perf_counter()

    def add(self, metrics: Mapping[str, Tensor], images: int) -> None:
        """Take one iteration's metrics."""
        for key, value in metrics.items():
            self._values.setdefault(key, []).append(value)
        self._images += images

    def flush(self, iteration: int) -> dict[str, float]:
        """Return the means and the images per second, and start afresh.

        Raises:
            NonFiniteError: a mean is NaN or infinite.
        """
        means = {k: torch.stack(v).mean().item() for k, v in self._values.items()}
        for key, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{key} is {value} by iteration {iteration}; lower --lr or raise --r1, and"
                    " start again from the last checkpoint"
                )
        means["images_per_second"] = self._images / (time.perf_counter() - self._since)
        self.__init__()  # type: ignore[misc]
        return means


def train(
    trainer: Trainer,
    batches: Iterator[Tensor],
    iterations: int,
    every: Mapping[str, int],
    on_event: Callable[[str, dict[str, float]], None],
    on_iteration: Callable[[], None] = lambda: None,
) -> None:
    """Iterate up to iteration ``iterations``.

    Args:
        trainer: goes on at its own iteration.
        batches: real images (N, 3, size, size) in [-1, 1].
        iterations: where to stop.
        every: event name -> iterations between its calls; 0 never. "log" is averaged metrics.
        on_event: called with the event's name and, for "log", the metrics.
        on_iteration: called after every iteration (for a progress bar).

    Raises:
        NonFiniteError: see `Averages.flush`.
    """
    averages = Averages()
    while trainer.iteration < iterations:
        real = next(batches).to(trainer.device, non_blocking=True)
        averages.add(trainer.iterate(real), real.shape[0])
        on_iteration()
        last = trainer.iteration == iterations
        for name, period in every.items():
            due = period and trainer.iteration % period == 0
            if due or last:
                # Losses are looked at before a checkpoint is written, so that none is poisoned.
                on_event(name, averages.flush(trainer.iteration) if name == "log" else {})
