"""DiME's second discriminator: it starts as the teacher's and is trained beside the first.

    generator's loss       mean softplus(-D_T(S))
    discriminator's loss   mean softplus(D_T(S)) + mean softplus(-D_T(real)), with R1 as the first's

(Yeo et al., "Nickel and Diming Your GAN", ECCV 2024.)
"""

from torch import Tensor

from Compression import losses
from Compression.distillation.terms import Parts, Pass, Sources
from Model import checkpoint
from Model.discriminator import Discriminator
from Util.settings import blame


def make(sources: Sources) -> Parts:
    """The term, with the discriminator of the teacher's checkpoint.

    Raises:
        SettingError: the checkpoint holds none.
    """
    with blame("teacher_ckpt"):
        network = checkpoint.load_discriminator(sources.config.teacher_ckpt, device=sources.device)

    return adversary(network)


def adversary(network: Discriminator) -> Parts:
    """The term of a discriminator."""

    def teacher_discriminator(student: Pass, teacher: Pass, mask: Tensor | None) -> Tensor:
        with student.context():
            logits = network(student.made.image)
        return losses.g_nonsaturating_loss(logits)

    return Parts(teacher_discriminator, network=network)
