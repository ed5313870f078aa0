"""What a distillation term is: a distance of the student's pass to the teacher's.

    L_KD = sum over terms of  weight * term(student pass, teacher pass, content mask)

(Liu et al., CVPR 2021, eq. 4, with any terms.) A term is one file with its equation on top, and one
line in the table `Compression.distillation.TERMS`. Most are a `Call`; what needs more is a `Parts`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Model import bundled
from Model.discriminator import Discriminator
from Model.generator import Generator, Synthesis
from train_hyperparams import TrainConfig
from Util.settings import Settings


@dataclass(frozen=True)
class Pass:
    """One generator's run on the latents of a batch.

    Attributes:
        generator: student or teacher.
        w_plus: (N, n_latent, style_dim), of its own mapping network.
        noise: layer noise, (N, 1, h, w) per styled convolution; None was drawn afresh.
        features: `made` holds the activations of every layer.
        context: what the generator runs in: precision, and for the teacher no gradients.
    """

    generator: Generator
    w_plus: Tensor
    noise: Sequence[Tensor] | None
    features: bool
    context: Callable[[], AbstractContextManager[None]]

    @cached_property
    def made(self) -> Synthesis:
        """Compute `image`, `rgbs` and, if asked for, `features`, when they are first looked at."""
        with self.context():
            return self.generator.synthesis(self.w_plus, self.noise, features=self.features)

    def again(
        self, offset: Tensor, features: bool = False, noise: Sequence[Tensor] | None = None
    ) -> Synthesis:
        """Run the generator at w+ plus an offset (N, 1 or n_latent, style_dim), with other noise.

        Args:
            offset: what is added.
            features: see `Model.generator.Generator.synthesis`.
            noise: layer noise; None draws it, as maps where this pass had maps.
        """
        if noise is None and self.noise is not None:
            noise = self.generator.make_noise(len(self.w_plus))
        with self.context():
            return self.generator.synthesis(self.w_plus + offset, noise, features=features)


Call = Callable[[Pass, Pass, Tensor | None], Tensor]
"""Student pass, teacher pass, content mask (N, 1, H, W) of the teacher's image or None -> scalar
without weight; no gradient flows into the teacher."""

CriticCall = Callable[[Discriminator, Pass], Tensor]
"""Discriminator, teacher pass on the latents of a batch of its fakes -> scalar without weight."""


@dataclass(frozen=True)
class Parts:
    """A term that is more than a `Call`.

    Attributes:
        call: its share of the generator's loss, if it has one.
        critic: its share of the discriminator's loss, if it has one.
        network: a further discriminator that is trained beside the first, with its losses, its
            regularisation and its place in checkpoints; the call is then a GAN loss.
        prepare: work before the first iteration that all processes take part in.
    """

    call: Call | None = None
    critic: CriticCall | None = None
    network: Discriminator | None = None
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Sources:
    """What a term may be made from.

    Attributes:
        config: the run's settings.
        teacher: the full-size generator, frozen.
        device: where the run is.
        discriminator: of the run; None where there is none yet.
        options: the term's own settings, of the type that its entry in the table names.
    """

    config: TrainConfig
    teacher: Generator
    device: torch.device
    discriminator: Discriminator | None = None
    options: Settings | None = None

    def parser(self) -> str | Path:
        """Name the run's face parser: the one that its settings name, or its teacher's."""
        return self.config.parser_ckpt or bundled.default_parser(self.config.teacher_ckpt)


@dataclass(frozen=True)
class TermKind:
    """A kind of term, as the table lists it.

    Attributes:
        make: builds the term, loading what it needs.
        description: one line for the command line's help.
        label: of the term's options, or the run's settings where it has none: the log calls the
            term ``kd_LABEL``; None takes the table's name.
        options: dataclass of the term's own settings, each a flag of train.py; None if it has none.
        features: the passes of the generator's phase must hold the activations of every layer.
        whole_batch: it is no mean over images, so that a batch cannot be divided.
    """

    make: Callable[[Sources], Call | Parts]
    description: str
    label: Callable[[Any], str] | None = None
    options: type[Settings] | None = None
    features: bool = False
    whole_batch: bool = False


@dataclass(frozen=True)
class Term:
    """A term of a run.

    Attributes:
        name: what the log calls it, after ``kd_``.
        weight: its factor in the losses, > 0.
        made: computes it.
        features: it needs the activations of every layer.
    """

    name: str
    weight: float
    made: Call | Parts
    features: bool = False

    @property
    def parts(self) -> Parts:
        """Tell what the term consists of."""
        return self.made if isinstance(self.made, Parts) else Parts(self.made)
