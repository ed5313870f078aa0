"""The training step against a plain one: four phases, Adam and averages written from the formulas.

Both draw the same numbers from the same seed and run in float64, so that after many iterations
every weight agrees to rounding. The networks themselves are held by the golden vectors.
"""

import copy
import math

import pytest
import torch

from Compression.distillation import Term, pixels
from Compression.training import Teacher, Trainer
from Model.discriminator import Discriminator
from Model.generator import Generator
from tests.helpers import left_half
from train_hyperparams import TrainConfig

ITERATIONS, BATCH, STYLE_DIM = 18, 4, 8
CONFIG = TrainConfig(batch_size=BATCH, d_reg_every=4, g_reg_every=2, r1=10.0, path_regularize=2.0)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks():
    torch.manual_seed(0)
    generator = Generator(8, STYLE_DIM, 2, (6, 5, 4, 4))
    for layer in generator.styled_convs:
        layer.noise.weight.data.fill_(0.1)
    teacher = Generator(8, STYLE_DIM, 2, (6, 6, 6, 6)).requires_grad_(False)
    return generator, Discriminator(8, channels=(5, 4)), teacher


def real_images():
    stream = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 3, 8, 8, generator=stream) for _ in range(ITERATIONS)]


class PlainAdam:
    """Adam with beta1 = 0 (Kingma and Ba, 2015, algorithm 1), corrected for lazy regularisation."""

    def __init__(self, network, every):
        ratio = every / (every + 1)
        self.lr, self.beta = 0.002 * ratio, 0.99**ratio
        self.parameters = list(network.parameters())
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    def step(self, loss):
        """Where a parameter has no part in the loss its gradient is zero, and it moves still."""
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.steps += 1
        for p, v, g in zip(self.parameters, self.squares, grads, strict=True):
            g = torch.zeros_like(p) if g is None else g
            v.copy_(self.beta * v + (1 - self.beta) * g**2)
            p.data -= self.lr * g / ((v / (1 - self.beta**self.steps)).sqrt() + 1e-8)


def draw_w_plus(generator, n):
    """Style mixing with probability 0.9: the second w from a random layer on."""
    mixed = torch.rand(()).item() < 0.9
    z = torch.randn(2 if mixed else 1, n, STYLE_DIM)
    layer = int(torch.randint(1, generator.n_latent, ()))
    return z, layer


def spread(generator, z, layer):
    rows = [generator.mapping(part) for part in z]
    return torch.stack(
        [rows[-1] if i >= layer else rows[0] for i in range(generator.n_latent)], dim=1
    )


def softplus(x):
    return torch.log1p(torch.exp(x))


def plain_training():
    g, d, teacher = networks()
    average = copy.deepcopy(g)
    g_adam, d_adam = PlainAdam(g, 2), PlainAdam(d, 4)
    mean_length = torch.zeros(())
    torch.manual_seed(7)
    for i, real in enumerate(real_images()):
        # Discriminator: softplus(-D(x)) + softplus(D(G(z))).
        with torch.no_grad():
            fake = g.synthesis(spread(g, *draw_w_plus(g, BATCH))).image
        d_adam.step((softplus(-d(real)) + softplus(d(fake))).mean())
        if i % 4 == 0:  # R1: 10 / 2 |dD/dx|^2, times the interval.
            x = real.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
            d_adam.step(10 / 2 * 4 * (gradient**2).sum() / BATCH)
        # Generator: softplus(-D(G(z))) + 3 mean |m (S - T)|.
        z, layer = draw_w_plus(g, BATCH)
        student = g.synthesis(spread(g, z, layer)).image
        adversarial = softplus(-d(student)).mean()
        target = teacher.synthesis(spread(teacher, z, layer)).image
        g_adam.step(adversarial + 3 * (left_half(target) * (student - target)).abs().mean())
        if i % 2 == 0:  # Path length: 2 (|J^T y| - a)^2, times the interval, on half the batch.
            w_plus = spread(g, *draw_w_plus(g, BATCH // 2))
            image = g.synthesis(w_plus).image
            y = torch.randn_like(image) / math.sqrt(8 * 8)
            (jacobian,) = torch.autograd.grad((image * y).sum(), w_plus, create_graph=True)
            lengths = (jacobian**2).sum(2).mean(1).sqrt()
            mean = mean_length + 0.01 * (lengths.mean() - mean_length)
            g_adam.step(2 * 2 * ((lengths - mean) ** 2).mean())
            mean_length = mean.detach()
        for a, p in zip(average.parameters(), g.parameters(), strict=True):
            decay = 0.5 ** (32 / 10_000)
            a.data.copy_(decay * a + (1 - decay) * p)
    return g, average, d, mean_length


def our_training():
    g, d, teacher = networks()
    distilled = Teacher(teacher, left_half, [Term("l1", 3.0, pixels.term())])
    trainer = Trainer(g, d, CONFIG, torch.device("cpu"), distilled)
    torch.manual_seed(7)
    for real in real_images():
        trainer.iterate(real)
    return trainer


def test_the_training_step_is_that_of_the_formulas():
    trainer = our_training()
    *expected, mean_length = plain_training()
    ours = (trainer.generator, trainer.g_ema, trainer.discriminator)
    for network, plain in zip(ours, expected, strict=True):
        for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(
                p, q, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(trainer.mean_path_length, mean_length, rtol=1e-9, atol=0)


def test_every_trained_parameter_takes_every_step():
    # 18 main steps and 5 of R1; 18 and 9 of path length.
    trainer = our_training()
    for optimizer, steps in ((trainer.d_optim, 18 + 5), (trainer.g_optim, 18 + 9)):
        counts = {int(state["step"]) for state in optimizer.state.values()}
        assert counts == {steps}
