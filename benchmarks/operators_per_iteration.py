"""Operators that a training iteration asks for at 256 px: on a GPU with few images, its time.

``python -m benchmarks.operators_per_iteration``. Counted on a CPU at 2 images, with layers of a few
channels, since their number does not depend on the width. What is chosen by the device is chosen as
on a GPU, with the compiled operators and without. R1 counts for a sixteenth and path length for a
quarter, as often as they come. Views take no kernel of a GPU, and the host's time all the same.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import lpips
import torch
from torch import nn

from benchmarks.counting import Operators
from benchmarks.timing import Measurement, run_benchmark, table
from Compression.content import ContentParser
from Compression.distillation import Term, perceptual, pixels
from Compression.optimisation import accumulate
from Compression.training import Draws, Teacher, Trainer
from Evaluation.distances import Lpips
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet, fold_batch_norm
from Model.generator import Generator, full_size_channels
from Model.precision import preferred_layout
from train_hyperparams import TrainConfig

IMAGES, NARROWER = 2, 32


class MixedDraws(Draws):
    """Always two styles: an iteration of the more costly kind, which nine in ten are."""

    def styles(self, n: int) -> list[torch.Tensor]:
        """Two z (n, style_dim)."""
        return list(torch.randn(2, n, self.style_dim).unbind(0))


def narrow(network: nn.Module) -> nn.Module:
    """Divide the channels of all convolutions."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d):
                inputs = layer.in_channels if layer.in_channels == 3 else layer.in_channels // 16
                outputs, bias = max(1, layer.out_channels // 16), layer.bias is not None
                side = layer.kernel_size[0]
                other = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=bias)
                setattr(module, name, other)
    return network.eval().requires_grad_(False)


def make_trainer(size: int, amp: str) -> Trainer:
    """Make a trainer with every part of the paper's job at 1/32 of its width."""
    torch.manual_seed(0)
    widths = [width // NARROWER for width in full_size_channels(size)]
    teacher = Generator(size, channels=widths).requires_grad_(False)
    student = Generator(size, channels=[max(1, w - int(0.7 * w)) for w in widths])
    parser = ContentParser(fold_batch_norm(BiSeNet(width=4)).requires_grad_(False))
    network = Lpips(narrow(lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)))
    terms = [Term("l1", 3.0, pixels.term()), Term("lpips", 3.0, perceptual.term(network))]
    settings = TrainConfig(batch_size=IMAGES, size=size, amp=amp)
    discriminator = Discriminator(size, channels=widths[1::2])
    cpu = torch.device("cpu")
    trainer = Trainer(student, discriminator, settings, cpu, Teacher(teacher, parser, terms))
    trainer.draws = MixedDraws(student.style_dim, 1.0, cpu)
    trainer.judge.at_once = False
    return trainer


@contextmanager
def as_on_a_gpu(native: bool) -> Iterator[None]:
    """Choose operators and layouts as on a GPU, with or without compiled operators."""
    with (
        mock.patch("Model.ops.convolution._pays", return_value=False),
        mock.patch("Model.ops.convolution._up_pays", return_value=False),
        mock.patch("Model.ops.dispatch.WORTH_IT", 0),
        mock.patch("Model.face_parser.STEM_PIXELS", 2**62),
        mock.patch("Model.layers.preferred_layout", lambda _, half: preferred_layout("cuda", half)),
        mock.patch.dict(os.environ, {"STYLEGAN_OPS": "auto" if native else "reference"}),
    ):
        yield


def count(trainer: Trainer, size: int) -> dict[str, Operators]:
    """Count the operators of every phase, each with its step of Adam."""
    real = torch.randn(IMAGES, 3, size, size)
    trainer.iterate(real)  # makes the optimisers' state
    found: dict[str, Operators] = {}

    def phase(name: str, function: Callable[[], object]) -> None:
        with Operators() as found[name]:
            function()

    trainer.discriminator.requires_grad_(True)
    phase("discriminator", lambda: trainer._d_phase(real))
    phase("R1", lambda: trainer._r1_phase(real))
    trainer.discriminator.requires_grad_(False)
    phase("generator", lambda: trainer._g_phase(IMAGES))
    phase("path length", lambda: trainer._path_phase(trainer.settings.path_batch(IMAGES)))
    s = trainer.settings
    average = lambda: accumulate(trainer.g_ema, trainer.generator, s.ema_decay)  # noqa: E731
    phase("moving average", average)
    return found


def per_iteration(found: Mapping[str, Operators]) -> dict[str, float]:
    """Add up the phases, each as often as it comes."""
    often = {"R1": 1 / 16, "path length": 1 / 4}
    counts = {
        "operators": lambda o: o.operators,
        "without views": lambda o: o.computing,
        "waits": lambda o: o.waits,
    }
    return {
        kind: sum(often.get(name, 1.0) * number(operators) for name, operators in found.items())
        for kind, number in counts.items()
    }


def measure(settings: Measurement) -> dict[str, dict[str, float]]:
    """Print a table; return the numbers of an iteration by case."""
    size, results = 256, {}
    rows: list[list[object]] = []
    for case, native in (("compiled operators", True), ("plain PyTorch", False)):
        with as_on_a_gpu(native):
            found = count(make_trainer(size, "none"), size)
        for name, operators in found.items():
            row = [case, name, operators.operators, operators.computing, operators.waits]
            rows.append([str(cell) for cell in row])
        results[case] = per_iteration(found)
        numbers = (f"{value:.0f}" for value in results[case].values())
        rows.append([case, "an iteration", *numbers])
    print(table(("", "phase", "operators", "without views", "host waits"), rows))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Operators of a training iteration."
    return run_benchmark(Measurement, measure, argv, "operators_per_iteration", what)


if __name__ == "__main__":
    sys.exit(main())
