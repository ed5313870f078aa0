"""Training of a generator against a discriminator, with distillation from a full-size teacher.

One iteration has up to four phases: discriminator, R1 penalty, generator (with distillation) and
path length penalty. Each computes a loss, and `Trainer._step` does the rest.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from Compression import losses
from Compression.averages import Averages
from Compression.distillation import Pass, Term
from Evaluation.features import masks_of
from Model.checkpoint import load_discriminator
from Model.discriminator import Discriminator
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util import distributed


@dataclass(frozen=True)
class Teacher:
    """What the student learns from.

    Attributes:
        generator: full-size network, frozen.
        content_mask: images (N, 3, H, W) -> mask (N, 1, H, W); None distils everywhere.
        terms: what the student's pass is compared by.
    """

    generator: Generator
    content_mask: Callable[[Tensor], Tensor] | None = None
    terms: Sequence[Term] = ()


class NonFiniteError(RuntimeError):
    """A loss became NaN or infinite; the message names the loss and the iteration."""


def lazy_adam(parameters: Iterator[nn.Parameter], lr: float, every: int) -> Adam:
    """Adam with betas (0, 0.99), corrected for a regulariser of its own step every k iterations.

    StyleGAN2, appendix B: with c = k / (k + 1), the learning rate is lr * c and the betas are to
    the power of c. ``every`` 0 means no such regulariser.
    """
    ratio = every / (every + 1) if every else 1.0
    return Adam(parameters, lr=lr * ratio, betas=(0.0, 0.99**ratio))


class Draws:
    """Where a run's random numbers come from: PyTorch's global streams.

    A separate object, so that a test can give two processes the shares of one.

    Args:
        style_dim: size of z.
        mixing: probability that a batch mixes two styles.
        device: where the numbers go.
    """

    def __init__(self, style_dim: int, mixing: float, device: torch.device) -> None:
        self.style_dim, self.mixing, self.device = style_dim, mixing, device

    def styles(self, n: int) -> list[Tensor]:
        """One z (n, style_dim), or two where styles are mixed."""
        count = 2 if self.mixing > 0 and torch.rand(()).item() < self.mixing else 1
        return list(torch.randn(count, n, self.style_dim, device=self.device).unbind(0))

    def layer(self, n_latent: int) -> int:
        """Layer at which the second style takes over, in [1, n_latent - 1]."""
        return int(torch.randint(1, n_latent, ()))

    def image_noise(self, images: Tensor) -> Tensor:
        """Standard normal direction of the path length, like the images."""
        return torch.randn_like(images)


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
        settings: of the run.
        device: where everything runs.
        teacher: adds distillation to the generator's phase.
        g_ema: moving average to go on with.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        settings: TrainConfig,
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
        self.further = {
            term.name: (network, lazy_adam(network.parameters(), settings.lr, r1_every))
            for term in self._terms
            if (network := term.parts.network) is not None
        }
        self.draws = Draws(generator.style_dim, settings.mixing, device)
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.averages = Averages()
        self.iteration = self.images_seen = 0
        self.mean_path_length = torch.zeros((), device=device)

    def iterate(self, real: Tensor) -> dict[str, Tensor]:
        """Run one iteration on real images (N, 3, size, size) in [-1, 1].

        Returns:
            Scalars of the phases that ran, detached, still on the device.
        """
        s = self.settings
        for network, _ in self._discriminators.values():
            network.requires_grad_(True)
        # 1. Discriminator: softplus(-D(x)) + softplus(D(G(z))) (Goodfellow et al., 2014).
        metrics = self._d_phase(real)
        # 2. Every 16 iterations, R1: 16 * r1 / 2 * |dD/dx|^2 (Mescheder et al., 2018, eq. 9).
        if s.r1 and self.iteration % s.d_reg_every == 0:
            metrics |= self._r1_phase(real)
        for network, _ in self._discriminators.values():
            network.requires_grad_(False)
        # 3. Generator: softplus(-D(G(z))) + distillation inside the content (paper, eq. 4).
        metrics |= self._g_phase(real.shape[0])
        # 4. Every 4 iterations, path length: 4 * weight * (|J^T y| - a)^2 (StyleGAN2, eq. 4).
        if s.path_regularize and self.iteration % s.g_reg_every == 0:
            metrics |= self._path_phase(max(1, real.shape[0] // s.path_batch_shrink))
        # The average of the generators of some hundred iterations is what is kept and measured.
        accumulate(self.g_ema, self.generator, s.ema_decay)
        self.iteration += 1
        self.images_seen += s.batch_size
        self.averages.add(metrics, s.batch_size)
        return metrics

    @property
    def _terms(self) -> Sequence[Term]:
        return self.teacher.terms if self.teacher else ()

    @property
    def _discriminators(self) -> dict[str, tuple[Discriminator, Adam]]:
        """Give all discriminators and optimisers, by what follows their metrics' names."""
        further = {f"_{name}": pair for name, pair in self.further.items()}
        return {"": (self.discriminator, self.d_optim), **further}

    @property
    def _gan_weight(self) -> float:
        """Weigh the GAN losses in the generator's phase: a ramp over the first images."""
        ramp = self.settings.gan_ramp
        return min(1.0, self.images_seen / ramp) if ramp else 1.0

    def _autocast(self) -> torch.autocast:
        """Where the networks run in half precision, if --amp says so.

        The layers themselves keep styles, demodulation, RGB sums and logits in float32.
        """
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def _step(self, optimizer: Optimizer, phase: str, loss: Tensor) -> None:
        """Back-propagate, average the gradients over the processes, and update.

        In float16 the loss is scaled up, so that small gradients do not vanish, and a step whose
        gradients overflowed is left out and lowers the scale.

        Raises:
            NonFiniteError: the loss is NaN or infinite; nothing has been updated.
        """
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the {phase} loss is {loss.item()} in iteration {self.iteration + 1}; lower lr,"
                " set grad_clip, or look at the data"
            )
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        _fill_gradients(optimizer)
        for group in optimizer.param_groups:
            # Before they are unscaled, so that all processes leave out the same steps.
            distributed.average_gradients(group["params"])
        if self.settings.grad_clip:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.settings.grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def _latents(self, n: int) -> Tensor:
        """Draw w+ (n, n_latent, style_dim) of the generator, mixed as configured."""
        g = self.generator
        return g.w_plus(self.draws.styles(n), inject_index=self.draws.layer(g.n_latent))

    def _d_phase(self, real: Tensor) -> dict[str, Tensor]:
        """Discriminators' losses on equal fakes, and the terms that train the first one."""
        g, n = self.generator, real.shape[0]
        z, layer = self.draws.styles(n), self.draws.layer(g.n_latent)
        with torch.no_grad(), self._autocast():
            fake = g.synthesis(g.w_plus(z, inject_index=layer)).image
        metrics: dict[str, Tensor] = {}
        for suffix, (network, optimizer) in self._discriminators.items():
            with self._autocast():
                fake_logits, real_logits = network(fake), network(real)
            loss = losses.d_logistic_loss(real_logits, fake_logits)
            metrics |= {
                f"d_loss{suffix}": loss.detach(),
                f"real_score{suffix}": real_logits.detach().mean(),
                f"fake_score{suffix}": fake_logits.detach().mean(),
            }
            if not suffix:
                distances = self._critic_terms(z, layer)
                loss = loss + sum(weight * distance for weight, distance in distances.values())
                metrics |= {f"kd_{name}": d.detach() for name, (_, d) in distances.items()}
            self._step(optimizer, f"discriminator{suffix}", loss)
        return metrics

    def _critic_terms(self, z: list[Tensor], layer: int) -> dict[str, tuple[float, Tensor]]:
        """Compute weights and values of the terms that train the discriminator, by name."""
        calls = {t.name: (t.weight, t.parts.critic) for t in self._terms if t.parts.critic}
        if not calls:
            return {}
        assert self.teacher is not None
        target = self._pass(
            self.teacher.generator, z, layer, None, self._without_gradients, features=True
        )
        with self._autocast():
            return {
                name: (weight, call(self.discriminator, target))
                for name, (weight, call) in calls.items()
            }

    def _r1_phase(self, real: Tensor) -> dict[str, Tensor]:
        real = real.detach().requires_grad_()
        weight = self.settings.r1 / 2 * self.settings.d_reg_every
        metrics: dict[str, Tensor] = {}
        for suffix, (network, optimizer) in self._discriminators.items():
            penalty = losses.r1_penalty(network(real), real)
            self._step(optimizer, f"R1{suffix}", penalty * weight)
            metrics[f"r1{suffix}"] = penalty.detach()
        return metrics

    def _g_phase(self, n: int) -> dict[str, Tensor]:
        """Generator loss, and distillation: mean softplus(-D(G(z))) + sum of weighted terms."""
        g, teacher = self.generator, self.teacher
        z, layer = self.draws.styles(n), self.draws.layer(g.n_latent)
        noise = g.make_noise(n) if self.settings.kd_shared_noise and teacher else None
        features = any(term.features for term in self._terms)
        student = self._pass(g, z, layer, noise, self._autocast, features)
        with self._autocast():
            logits = self.discriminator(student.made.image)
        gan_loss = losses.g_nonsaturating_loss(logits)
        metrics = {"g_loss": gan_loss.detach()}
        loss = self._gan_weight * gan_loss
        if teacher is not None:
            target = self._pass(
                teacher.generator, z, layer, noise, self._without_gradients, features
            )
            # The mask is the teacher's: what the student should keep (section 3.3).
            shown, content = target.made.image, teacher.content_mask
            mask = masks_of(content, shown) if content else None
            for term in teacher.terms:
                if term.parts.call is None:
                    continue
                distance = term.parts.call(student, target, mask)
                weight = term.weight * (self._gan_weight if term.parts.network else 1)
                loss = loss + weight * distance
                metrics[f"kd_{term.name}"] = distance.detach()
        self._step(self.g_optim, "generator", loss)
        return metrics

    def _pass(
        self,
        generator: Generator,
        z: list[Tensor],
        layer: int,
        noise: list[Tensor] | None,
        context: Callable[[], AbstractContextManager[None]],
        features: bool,
    ) -> Pass:
        """Run student or teacher on the latents of a batch."""
        with context():
            w_plus = generator.w_plus(z, inject_index=layer)
            made = generator.synthesis(w_plus, noise, features=features)
        return Pass(generator, w_plus, noise, made, context)

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad(), self._autocast():
            yield

    def _path_phase(self, n: int) -> dict[str, Tensor]:
        w_plus = self._latents(n)
        images = self.generator.synthesis(w_plus).image
        penalty, mean_length, lengths = losses.path_length_penalty(
            images,
            w_plus,
            self.mean_path_length,
            noise=self.draws.image_noise(images),
            average=distributed.average,
        )
        weight = self.settings.path_regularize * self.settings.g_reg_every
        self._step(self.g_optim, "path length", penalty * weight)
        self.mean_path_length = mean_length
        return {"path_penalty": penalty.detach(), "path_length": lengths.mean()}

    def state(self, together: bool = True) -> dict[str, Any]:
        """Everything a run needs to go on, in the layout of `Model.checkpoint`.

        Args:
            together: take the random states of all processes, which must all make this call.
        """
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        further: dict[str, Any] = {}
        for name, (network, optimizer) in self.further.items():
            further |= {name: network, f"{name}_optim": optimizer.state_dict()}
        return {
            **further,
            "g": self.generator,
            "g_ema": self.g_ema,
            "d": self.discriminator,
            "g_optim": self.g_optim.state_dict(),
            "d_optim": self.d_optim.state_dict(),
            "train_state": {
                "iteration": self.iteration,
                "images_seen": self.images_seen,
                "mean_path_length": self.mean_path_length.item(),
                "averages": self.averages.state(),
                "scaler": self.scaler.state_dict(),
                "rng": distributed.gather(own) if together else [own],
            },
        }

    def load_state(self, content: Mapping[str, Any], iteration: int | None = None) -> None:
        """Go on from `state`; generators and first discriminator have been loaded already.

        The learning rates stay those of the settings. The random streams go on where they were if
        the number of processes is the same; otherwise each process keeps its own fresh one.

        Args:
            content: the checkpoint.
            iteration: where to go on if it has optimisers but no ``train_state``, as the original
                code writes it; the mean path length then starts at 0.

        Raises:
            ValueError: the checkpoint has no training state, or of another architecture.
        """
        optimizers = {"g_optim": self.g_optim, "d_optim": self.d_optim}
        optimizers |= {f"{name}_optim": pair[1] for name, pair in self.further.items()}
        wanted = [*self.further, *optimizers, *(["train_state"] if iteration is None else [])]
        missing = [key for key in wanted if key not in content]
        if missing:
            raise ValueError(f"no {missing[0]!r} in the checkpoint, so training cannot go on")
        try:
            for name, (network, _) in self.further.items():
                network.load_state_dict(load_discriminator(content, name).state_dict())
            for name, optimizer in optimizers.items():
                _restore(optimizer, content[name])
            if "train_state" in content:
                self._load_progress(content["train_state"])
            else:
                self.iteration = iteration or 0
                self.images_seen = self.iteration * self.settings.batch_size
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"its training state is damaged or of other networks ({reason})"
            ) from None

    def _load_progress(self, saved: Mapping[str, Any]) -> None:
        self.iteration, self.images_seen = (
            operator.index(saved[key]) for key in ("iteration", "images_seen")
        )
        self.mean_path_length = torch.tensor(float(saved["mean_path_length"]), device=self.device)
        self.averages.load(saved["averages"], self.device)
        if saved.get("scaler"):  # empty without float16, absent in older checkpoints
            self.scaler.load_state_dict(saved["scaler"])
        if len(saved["rng"]) == distributed.world_size():
            streams = saved["rng"][distributed.rank()]
            torch.set_rng_state(streams["cpu"])
            if self.device.type == "cuda" and "cuda" in streams:
                torch.cuda.set_rng_state(streams["cuda"], self.device)


def _fill_gradients(optimizer: Optimizer) -> None:
    """Give every trained parameter that the loss did not reach a gradient of zero.

    The regularisers do not reach the last biases. Adam passes over parameters without a gradient;
    with a zero one their averages decay and the step counts, as in the original.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _restore(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimiser's state, but for the options, which are those of the settings.

    Raises:
        ValueError: a moment is not finite or not of its parameter's shape.
    """
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                shape = torch.Size() if key == "step" else parameter.shape
                if value.shape != shape or not value.isfinite().all():
                    raise ValueError(f"the optimiser's {key} does not fit")


@dataclass(frozen=True)
class Event:
    """Something that happens now and then during training.

    Attributes:
        every: iterations between its calls; 0: only at the end.
        action: called without arguments, in every process.
    """

    every: int
    action: Callable[[], object]


def iterate(
    trainer: Trainer,
    batches: Iterator[Tensor],
    iterations: int,
    events: Sequence[Event],
) -> None:
    """Iterate up to iteration ``iterations``.

    Args:
        trainer: goes on at its own iteration.
        batches: real images (N, 3, size, size) in [-1, 1], this process's share of every batch;
            where they end, training does.
        iterations: where to end.
        events: those that are due are called after an iteration, in this order; all at the end.

    Raises:
        NonFiniteError: a loss became NaN or infinite.
    """
    while trainer.iteration < iterations and (real := next(batches, None)) is not None:
        trainer.iterate(real.to(trainer.device, non_blocking=True))
        end = trainer.iteration == iterations
        for event in events:
            if end or (event.every and trainer.iteration % event.every == 0):
                event.action()
