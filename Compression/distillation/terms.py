"""What a distillation term is: a distance of the student's pass to the teacher's.

    L_KD = sum over terms of  weight * term(student pass, teacher pass, content mask)

(Liu et al., CVPR 2021, eq. 4, with any terms.) A term is one file with its equation on top, and one
line in the table `Compression.distillation.TERMS`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

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
        made: `image`, `rgbs` and, where a term asked for them, `features`.
        context: what the generator runs in: precision, and for the teacher no gradients.
    """

    generator: Generator
    w_plus: Tensor
    noise: Sequence[Tensor] | None
    made: Synthesis
    context: Callable[[], AbstractContextManager[None]]

    def again(self, offset: Tensor) -> Synthesis:
        """Run the generator at w+ plus an offset (N, 1 or n_latent, style_dim)."""
        with self.context():
            return self.generator.synthesis(self.w_plus + offset, self.noise)


Call = Callable[[Pass, Pass, Tensor | None], Tensor]
"""Student pass, teacher pass, content mask (N, 1, H, W) of the teacher's image or None -> scalar
without weight; no gradient flows into the teacher."""


@dataclass(frozen=True)
class Sources:
    """What a term may be made from.

    Attributes:
        config: the run's settings.
        teacher: the full-size generator, frozen.
        device: where the run is.
        options: the term's own settings, of the type that its entry in the table names.
    """

    config: TrainConfig
    teacher: Generator
    device: torch.device
    options: Settings | None = None


@dataclass(frozen=True)
class TermKind:
    """A kind of term, as the table lists it.

    Attributes:
        make: builds the term's call, loading what it needs.
        description: one line for the command line's help.
        label: the log calls the term ``kd_LABEL``; None takes the table's name.
        options: dataclass of the term's own settings, each a flag of train.py; None if it has none.
        features: the passes must hold the activations of every layer.
    """

    make: Callable[[Sources], Call]
    description: str
    label: Callable[[TrainConfig], str] | None = None
    options: type[Settings] | None = None
    features: bool = False


@dataclass(frozen=True)
class Term:
    """A term of a run.

    Attributes:
        name: what the log calls it, after ``kd_``.
        weight: its factor in the generator's loss, > 0.
        call: computes it.
        features: it needs the activations of every layer.
    """

    name: str
    weight: float
    call: Call
    features: bool = False
