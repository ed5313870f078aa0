"""Training of a generator against a discriminator, with distillation from a full-size teacher.

One iteration has up to four phases: discriminator, R1 penalty, generator (with distillation) and
path length penalty. Each computes a loss, and `Trainer._step` does the rest.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Adam

from Compression import losses
from Compression.averages import Averages
from Compression.distillation import Pass, Term
from Compression.optimisation import (
    Judge,
    LossScale,
    NonFiniteError,
    Part,
    Update,
    accumulate,
    divide,
    lazy_adam,
    restore,
)
from Evaluation.features import masks_of
from Model.checkpoint import load_discriminator
from Model.discriminator import GROUP, Discriminator
from Model.generator import Generator
from Model.precision import HALVES
from train_hyperparams import TrainConfig
from Util import distributed
from Util.clock import Clock
from Util.compiling import begin_step


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

    def __post_init__(self) -> None:
        """Keep what the generator need not compute in every iteration."""
        self.generator.freeze()


PartNoise = Mapping[Part, list[Tensor] | None]
"""Layer noise of a batch's parts; None is drawn layer by layer."""

CriticTerms = Callable[[Part], list[tuple[str, float, Tensor]]]
"""A batch's part -> names, weights and values of the terms that train the discriminator."""


class Sums:
    """Metrics of a batch, added up over its parts.

    Attributes:
        values: means over the parts so far.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, part: Part, name: str, mean: Tensor) -> None:
        """Take a part's mean."""
        value = part.weigh(mean.detach())
        self.values[name] = self.values[name] + value if name in self.values else value


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
        # Read as an array: of a tensor, the host would ask an operator for the number.
        count = 2 if self.mixing > 0 and torch.rand(1).numpy()[0] < self.mixing else 1
        return list(torch.randn(count, n, self.style_dim, device=self.device).unbind(0))

    def layer(self, n_latent: int) -> int:
        """Layer at which the second style takes over, in [1, n_latent - 1]."""
        return int(torch.randint(1, n_latent, (1,)).numpy()[0])

    def image_noise(self, images: Tensor) -> Tensor:
        """Standard normal direction of the path length, like the images."""
        return torch.randn_like(images)


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
        self.draws = Draws(generator.style_dim, settings.mixing, device)
        self.half = HALVES.get(settings.amp)
        self.judge = Judge(device)
        self.scaler = LossScale(device, settings.amp == "fp16")
        path_every = settings.g_reg_every if settings.path_regularize else 0
        self._g = self._update_of(generator, path_every, generator.backward_order())
        networks = {"": discriminator} | {
            f"_{term.name}": network
            for term in self._terms
            if (network := term.parts.network) is not None
        }
        for network in networks.values():
            network.requires_grad_(True)
            network.batch_over_processes = True
        r1_every = settings.d_reg_every if settings.r1 else 0
        self._discriminators = {
            suffix: self._update_of(network, r1_every) for suffix, network in networks.items()
        }
        self.averages, self.clock = Averages(), Clock(device)
        self.iteration = self.images_seen = 0
        self.mean_path_length = torch.zeros((), device=device)

    def _update_of(
        self, network: nn.Module, every: int, order: Iterable[nn.Parameter] | None = None
    ) -> Update:
        s = self.settings
        adam = lazy_adam(network.parameters(), s.lr, every)
        return Update(network, adam, self.judge, self.scaler, s.grad_clip, order)

    @property
    def updates(self) -> list[Update]:
        """Those of all trained networks."""
        return [self._g, *self._discriminators.values()]

    @property
    def g_optim(self) -> Adam:
        """The generator's optimiser."""
        return self._g.adam

    @property
    def d_optim(self) -> Adam:
        """The discriminator's optimiser."""
        return self._discriminators[""].adam

    @property
    def further(self) -> dict[str, tuple[nn.Module, Adam]]:
        """Further discriminators and their optimisers, by the names of their terms."""
        updates = {name[1:]: update for name, update in self._discriminators.items() if name}
        return {name: (update.network, update.adam) for name, update in updates.items()}

    def iterate(self, real: Tensor) -> dict[str, Tensor]:
        """Run one iteration on real images (N, 3, size, size) in [-1, 1].

        Returns:
            Scalars of the phases that ran, detached, still on the device.

        Raises:
            NonFiniteError: a loss or a gradient was not finite; the networks are as before it.
        """
        s = self.settings
        begin_step(s.compile_mode)
        # Of the iterations before a line of the log, as many as have one of each phase.
        self.clock.running = -(self.iteration + 1) % s.log_freq < max(s.d_reg_every, s.g_reg_every)
        for update in self.updates:
            update.slow_down(self._rate_left)
        for update in self._discriminators.values():
            update.network.requires_grad_(True)
        # 1. Discriminator: softplus(-D(x)) + softplus(D(G(z))) (Goodfellow et al., 2014).
        with self.clock.part("discriminator"):
            metrics = self._d_phase(real)
        # 2. Every 16 iterations, R1: 16 * r1 / 2 * |dD/dx|^2 (Mescheder et al., 2018, eq. 9).
        if s.r1 and self.iteration % s.d_reg_every == 0:
            with self.clock.part("r1"):
                metrics |= self._r1_phase(real)
        for update in self._discriminators.values():
            update.network.requires_grad_(False)
        # 3. Generator: softplus(-D(G(z))) + distillation inside the content (paper, eq. 4).
        with self.clock.part("generator"):
            metrics |= self._g_phase(real.shape[0])
        # 4. Every 4 iterations, path length: 4 * weight * (|J^T y| - a)^2 (StyleGAN2, eq. 4).
        if s.path_regularize and self.iteration % s.g_reg_every == 0:
            with self.clock.part("path"):
                metrics |= self._path_phase(s.path_batch(real.shape[0]))
        # The average of the generators of some hundred iterations is what is kept and measured.
        accumulate(self.g_ema, self.generator, s.ema_decay)
        self._look(now=(self.iteration + 1) % s.log_freq == 0)
        self.iteration += 1
        self.images_seen += s.batch_size
        self.averages.add(metrics, s.batch_size)
        return metrics

    @property
    def _terms(self) -> Sequence[Term]:
        return self.teacher.terms if self.teacher else ()

    @property
    def _gan_weight(self) -> float:
        """Weigh the GAN losses in the generator's phase: a ramp over the first images."""
        ramp = self.settings.gan_ramp
        return min(1.0, self.images_seen / ramp) if ramp else 1.0

    @property
    def _rate_left(self) -> float:
        """Share of the learning rates that is left: a line to nothing over the last images."""
        s = self.settings
        images = (s.iter - self.iteration) * s.batch_size
        return min(1.0, images / s.lr_decay) if s.lr_decay else 1.0

    def _autocast(self) -> torch.autocast:
        """Where the networks run in half precision, if --amp says so.

        The layers themselves keep styles, demodulation, RGB sums and logits in float32.
        """
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def _look(self, now: bool) -> None:
        """Ask for the verdict on the last iteration, and on this one if it is to be logged.

        Raises:
            NonFiniteError: as in `iterate`; the counts are those of the good iterations.
        """
        late = self.judge.posted()
        self.judge.post()
        if late or (now and self.judge.posted()):
            self._fail(self.iteration - late, averaged=1 + late)

    def _fail(self, good: int, averaged: int = 0) -> NoReturn:
        """Go back to the last good iteration, since which the average has moved some times."""
        if averaged and self.settings.ema_decay:
            # The generator has stood still meanwhile, so that its average can be taken back.
            accumulate(self.g_ema, self.generator, self.settings.ema_decay**-averaged)
        self.images_seen -= (self.iteration - good) * self.settings.batch_size
        self.iteration = good
        self.averages = Averages()  # those of the log so far hold what was not finite
        raise NonFiniteError(
            f"{self.judge.reason()} in iteration {good + 1}; lower lr, set grad_clip, or look at"
            " the data"
        )

    def _step(
        self,
        update: Update,
        phase: str,
        parts: Sequence[Part],
        loss_of: Callable[[Part], Tensor],
    ) -> dict[str, Tensor]:
        """Update a network; see `Update.step`.

        Returns:
            What it tells, named by the phase.

        Raises:
            NonFiniteError: on a CPU, at once.
        """
        found = update.step(phase, parts, loss_of)
        if self.judge.at_once:
            self.judge.post()
            if self.judge.posted():
                self._fail(self.iteration)
        name = phase.replace(" ", "_").lower()
        metrics = {f"grad_norm_{name}": found["norm"]}
        if self.scaler.enabled:
            metrics |= {f"amp_skipped_{name}": found["skipped"], "amp_scale": self.scaler.value + 0}
        return metrics

    def _parts(self, n: int, groups: int = GROUP) -> list[Part]:
        """Divide a batch as --batch_gpu says; by whole groups where a discriminator sees it."""
        return divide(n, self.settings.batch_gpu, groups)

    def _noise(self, generator: Generator, parts: Sequence[Part], n: int) -> PartNoise:
        """Draw each part's layer noise, that of the undivided batch of n; None: layer by layer."""
        if len(parts) == 1:
            return {parts[0]: None}
        maps = generator.make_noise(n)
        return {part: [part.of(noise) for noise in maps] for part in parts}

    def _d_phase(self, real: Tensor) -> dict[str, Tensor]:
        """Discriminators' losses on equal fakes, and the terms that train the first one."""
        g, n = self.generator, real.shape[0]
        z, layer = self.draws.styles(n), self.draws.layer(g.n_latent)
        parts = self._parts(n)
        fakes = {}
        with torch.no_grad(), self._autocast():
            for part, noise in self._noise(g, parts, n).items():
                w_plus = g.w_plus([part.of(rows) for rows in z], inject_index=layer)
                fakes[part] = g.synthesis(w_plus, noise).image
        metrics: dict[str, Tensor] = {}
        for suffix in self._discriminators:
            critics = None if suffix else self._critic_terms(z, layer, parts)
            metrics |= self._d_update(suffix, fakes, real, critics)
        return metrics

    def _d_update(
        self,
        suffix: str,
        fakes: Mapping[Part, Tensor],
        real: Tensor,
        critics: CriticTerms | None,
    ) -> dict[str, Tensor]:
        """Update one discriminator: mean softplus(-D(x)) + mean softplus(D(G(z))) and terms."""
        update, sums = self._discriminators[suffix], Sums()

        def loss_of(part: Part) -> Tensor:
            both = torch.cat([fakes[part], part.of(real)])
            with self._autocast():
                fake_logits, real_logits = update.network(both, batches=2).chunk(2)
            loss = losses.d_logistic_loss(real_logits, fake_logits)
            sums.add(part, f"d_loss{suffix}", loss)
            sums.add(part, f"real_score{suffix}", real_logits.mean())
            sums.add(part, f"fake_score{suffix}", fake_logits.mean())
            for name, weight, distance in critics(part) if critics else ():
                sums.add(part, f"kd_{name}", distance)
                loss = loss + weight * distance
            return part.weigh(loss)

        found = self._step(update, f"discriminator{suffix}", list(fakes), loss_of)
        return sums.values | found

    def _critic_terms(
        self, z: list[Tensor], layer: int, parts: Sequence[Part]
    ) -> CriticTerms | None:
        """Find the terms that train the discriminator: a part -> names, weights and values."""
        calls = [(t.name, t.weight, t.parts.critic) for t in self._terms if t.parts.critic]
        if self.teacher is None or not calls:
            return None
        teacher = self.teacher.generator
        noise = self._noise(teacher, parts, len(z[0]))

        def terms(part: Part) -> list[tuple[str, float, Tensor]]:
            rows = [part.of(row) for row in z]
            target = self._pass(
                teacher, rows, layer, noise[part], self._without_gradients, features=True
            )
            with self._autocast():
                return [(name, w, call(self.discriminator, target)) for name, w, call in calls]

        return terms

    def _r1_phase(self, real: Tensor) -> dict[str, Tensor]:
        weight = self.settings.r1 / 2 * self.settings.d_reg_every
        metrics: dict[str, Tensor] = {}
        for suffix, update in self._discriminators.items():
            metrics |= self._r1_update(suffix, update, real, weight)
        return metrics

    def _r1_update(
        self, suffix: str, update: Update, real: Tensor, weight: float
    ) -> dict[str, Tensor]:
        """Update one discriminator by its penalty: weight * mean |dD/dx|^2."""
        sums = Sums()

        def loss_of(part: Part) -> Tensor:
            images = part.of(real).detach().requires_grad_()
            with self._autocast():
                logits = update.network(images)
            # The first derivative passes through half precision as the second does: scaled.
            scale = self.scaler.value if self.scaler.enabled else None
            penalty = losses.r1_penalty(logits, images, scale)
            sums.add(part, f"r1{suffix}", penalty)
            return part.weigh(penalty * weight)

        found = self._step(update, f"R1{suffix}", self._parts(len(real)), loss_of)
        return sums.values | found

    def _g_phase(self, n: int) -> dict[str, Tensor]:
        """Generator loss, and distillation: mean softplus(-D(G(z))) + sum of weighted terms."""
        g, teacher = self.generator, self.teacher
        z, layer = self.draws.styles(n), self.draws.layer(g.n_latent)
        parts, sums = self._parts(n), Sums()
        shared = self.settings.kd_shared_noise and teacher is not None
        noise = self._noise(g, parts, n)
        if shared and len(parts) == 1:
            noise = {parts[0]: g.make_noise(n)}
        other = noise if shared or teacher is None else self._noise(teacher.generator, parts, n)
        features = any(term.features for term in self._terms)

        def loss_of(part: Part) -> Tensor:
            rows = [part.of(row) for row in z]
            student = self._pass(g, rows, layer, noise[part], self._autocast, features)
            with self._autocast():
                logits = self.discriminator(student.made.image)
            loss = losses.g_nonsaturating_loss(logits)
            sums.add(part, "g_loss", loss)
            loss = loss if self._gan_weight == 1 else self._gan_weight * loss
            if teacher is not None:
                target = self._pass(
                    teacher.generator, rows, layer, other[part], self._without_gradients, features
                )
                for name, weight, distance in self._distances(teacher, student, target):
                    sums.add(part, f"kd_{name}", distance)
                    loss = loss + weight * distance
            return part.weigh(loss)

        return self._step(self._g, "generator", parts, loss_of) | sums.values

    def _distances(
        self, teacher: Teacher, student: Pass, target: Pass
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Compute name, weight and value of every term of the generator's loss."""
        # The mask is the teacher's: what the student should keep (section 3.3).
        mask = None
        if teacher.content_mask:
            with self._autocast():
                mask = masks_of(teacher.content_mask, target.made.image)
        for term in teacher.terms:
            if term.parts.call is not None:
                weight = term.weight * (self._gan_weight if term.parts.network else 1)
                yield term.name, weight, term.parts.call(student, target, mask)

    def _pass(
        self,
        generator: Generator,
        z: list[Tensor],
        layer: int,
        noise: list[Tensor] | None,
        context: Callable[[], AbstractContextManager[None]],
        features: bool,
    ) -> Pass:
        """Map the latents of a batch; student or teacher draws when its pass is looked at."""
        if noise is None and self.settings.compile and generator is not self.generator:
            noise = generator.make_noise(len(z[0]))  # compiled code would draw other numbers
        with context():
            w_plus = generator.w_plus(z, inject_index=layer)
        if self.settings.compile:
            w_plus = w_plus.contiguous()  # one style's rows are views: other code would be compiled
        return Pass(generator, w_plus, noise, features, context)

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad(), self._autocast():
            yield

    def _path_phase(self, n: int) -> dict[str, Tensor]:
        """Update the generator by the path length penalty, 4 * weight * mean (|J^T y| - a)^2."""
        g, parts = self.generator, self._parts(n, groups=1)
        z, layer = self.draws.styles(n), self.draws.layer(g.n_latent)
        noise = self._noise(g, parts, n)
        weight = self.settings.path_regularize * self.settings.g_reg_every
        directions: dict[Part, Tensor] = {}

        def lengths_of(part: Part, again: bool = True) -> Tensor:
            w_plus = g.w_plus([part.of(row) for row in z], inject_index=layer)
            images = g.synthesis(w_plus, noise[part]).image
            if part not in directions:
                whole = self.draws.image_noise(_batch_like(images, n))
                directions.update({each: each.of(whole) for each in parts})
            return losses.path_lengths(images, w_plus, directions[part], again)

        if len(parts) == 1:
            made: list[Tensor] = []

            def loss_of(part: Part) -> Tensor:
                made.extend(self._length_penalty(lengths_of(part)))
                return made[0] * weight
        else:
            # The running mean ties all lengths to each other: they are computed once for the
            # penalty's slopes by them, and again, part by part, to be followed back from there.
            lengths = torch.cat([lengths_of(part, False) for part in parts]).requires_grad_()
            made = self._length_penalty(lengths)
            (slopes,) = torch.autograd.grad(made[0] * weight, lengths)

            def loss_of(part: Part) -> Tensor:
                return (part.of(slopes) * lengths_of(part)).sum()

        found = self._step(self._g, "path length", parts, loss_of)
        penalty, mean, lengths = (tensor.detach() for tensor in made)
        # Not that of a step that is left out because something was not finite.
        sound = mean.isfinite() & ~self.judge.failed
        self.mean_path_length = torch.where(sound, mean, self.mean_path_length)
        return {"path_penalty": penalty, "path_length": lengths.mean()} | found

    def _length_penalty(self, lengths: Tensor) -> list[Tensor]:
        """Compute the penalty, the updated mean and the lengths themselves."""
        penalty, mean = losses.length_penalty(
            lengths, self.mean_path_length, average=distributed.average
        )
        return [penalty, mean, lengths]

    def state(self, together: bool = True) -> dict[str, Any]:
        """Everything a run needs to go on, in the layout of `Model.checkpoint`.

        Args:
            together: take the random states of all processes, which must all make this call.

        Raises:
            NonFiniteError: the last iteration's losses or gradients were not finite.
        """
        own, averages = {"cpu": torch.get_rng_state()}, self.averages.state()
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if together and self.judge.posted():
            self._fail(self.iteration - 1, averaged=1)
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
                "averages": distributed.gather(averages) if together else [averages],
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
                restore(optimizer, content[name])
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
        averages = saved["averages"]
        if not isinstance(averages, Mapping):  # in older checkpoints, those of the first process
            same = len(averages) == distributed.world_size()
            averages = averages[distributed.rank() if same else 0]
        self.averages.load(averages, self.device)
        if saved.get("scaler"):  # empty without float16, absent in older checkpoints
            self.scaler.load_state_dict(saved["scaler"])
        if len(saved["rng"]) == distributed.world_size():
            streams = saved["rng"][distributed.rank()]
            torch.set_rng_state(streams["cpu"])
            if self.device.type == "cuda" and "cuda" in streams:
                torch.cuda.set_rng_state(streams["cuda"], self.device)


def _batch_like(images: Tensor, n: int) -> Tensor:
    """An empty batch of n images in the layout of others, since numbers are drawn in its order."""
    if len(images) == n:
        return images
    last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return images.new_empty((n, *images.shape[1:])).to(memory_format=layout)


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
    while trainer.iteration < iterations:
        with trainer.clock.part("data"):
            real = next(batches, None)
        if real is None:
            break
        trainer.iterate(real.to(trainer.device, non_blocking=True))
        end = trainer.iteration == iterations
        for event in events:
            if end or (event.every and trainer.iteration % event.every == 0):
                event.action()
