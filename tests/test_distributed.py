"""Two gloo processes with half the batch each against one process with all of it."""

import copy

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from Compression.distillation import Parts, Term, high_band, moments, pixels, relation
from Compression.distillation.teacher_discriminator import adversary
from Compression.training import Draws, Teacher, Trainer
from Evaluation.embeddings import Embedding
from Model.discriminator import Discriminator
from Model.generator import Generator
from train_hyperparams import TrainConfig

ITERATIONS, SIDE = 5, 16
BATCHES = (16, 4)
"""With 4, the discriminator compares images of both processes with each other."""
CPU = torch.device("cpu")


class SharedDraws(Draws):
    """Draws for the whole batch in every process, each of which takes its share."""

    def __init__(self, draws: Draws, rank: int, world: int) -> None:
        super().__init__(draws.style_dim, draws.mixing, draws.device)
        self.rank, self.world = rank, world
        self.stream = torch.Generator().manual_seed(5)

    def styles(self, n: int) -> list[Tensor]:
        count = 1 + int(torch.rand((), generator=self.stream) < self.mixing)
        z = torch.randn(count, n * self.world, self.style_dim, generator=self.stream)
        return list(z[:, self.rank :: self.world].unbind(0))

    def layer(self, n_latent: int) -> int:
        return int(torch.randint(1, n_latent, (), generator=self.stream))

    def image_noise(self, images: Tensor) -> Tensor:
        whole = (len(images) * self.world, *images.shape[1:])
        return torch.randn(whole, generator=self.stream)[self.rank :: self.world]


def left_half(images: Tensor) -> Tensor:
    return torch.ones(len(images), 1, SIDE, SIDE).cumsum(3).le(4).float()


def make_terms(rank: int, world: int) -> list[Term]:
    """One of every kind that the processes have in common."""
    stream = torch.Generator().manual_seed(6)

    def offsets(n: int) -> Tensor:
        return torch.randn(n * world, 1, 8, generator=stream)[rank::world]

    # Many features with means around the target: shares of the batch are on either side of it.
    values = {"dino": Embedding(lambda x: x.flatten(1), "pixels")}
    target = {"dino": (torch.zeros(3 * SIDE**2), torch.full((3 * SIDE**2,), 0.2))}
    settings = relation.RelationSettings(relation_gather=True)
    return [
        Term("l1", 3.0, pixels.term()),
        Term("relation", 30.0, relation.term([4], offsets, settings), features=True),
        Term("moments", 1.0, moments.term(values, {"dino": 20.0}, target)),
        Term("high_band", 10.0, Parts(critic=high_band.term(4, SIDE))),
        Term("teacher_discriminator", 1.0, adversary(Discriminator(SIDE, channels=(5, 4, 4)))),
    ]


def make_trainer(rank: int, world: int, batch: int) -> Trainer:
    torch.manual_seed(0)
    generator = Generator(SIDE, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4, 4, 4))
    frozen = copy.deepcopy(generator).requires_grad_(False)
    teacher = Teacher(frozen, left_half, make_terms(rank, world))
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for layer in (*generator.styled_convs, *teacher.generator.styled_convs):
        layer.noise.weight.data.zero_()  # layer noise is drawn per process
    settings = TrainConfig(
        batch_size=batch, freeze_noise=True, d_reg_every=2, g_reg_every=2, gan_ramp=3 * batch
    )
    trainer = Trainer(generator, Discriminator(SIDE, channels=(5, 4, 4)), settings, CPU, teacher)
    trainer.draws = SharedDraws(trainer.draws, rank, world)
    return trainer


def train(rank: int, world: int, batch: int) -> dict:
    """Weights, first gradients and metrics after some iterations."""
    trainer = make_trainer(rank, world, batch)
    stream = torch.Generator().manual_seed(1)
    gradients = {}
    for i in range(ITERATIONS):
        real = torch.randn(batch, 3, SIDE, SIDE, generator=stream)[rank::world]
        trainer.iterate(real)
        if i == 0:
            gradients = {
                f"{name}.{key}": parameter.grad.clone()
                for name in ("generator", "discriminator")
                for key, parameter in getattr(trainer, name).named_parameters()
                if parameter.grad is not None
            }
    weights = {
        f"{name}.{key}": value
        for name in ("generator", "g_ema", "discriminator")
        for key, value in getattr(trainer, name).state_dict().items()
    }
    (further,) = (network for network, _ in trainer.further.values())
    weights |= {f"further.{key}": value for key, value in further.state_dict().items()}
    metrics = {k: v for k, v in trainer.averages.flush().items() if k != "images_per_second"}
    return {
        "weights": weights,
        "gradients": gradients,
        "metrics": metrics,
        "mean_path_length": trainer.mean_path_length,
    }


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({n: train(rank, 2, n) for n in BATCHES}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=BATCHES)
def results(both, request):
    return train(0, 1, request.param), *(found[request.param] for found in both)


def test_two_processes_compute_what_one_does(results):
    one, first, _ = results
    assert one["gradients"].keys() == first["gradients"].keys()
    for kind in ("gradients", "weights"):
        for key, value in one[kind].items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                first[kind][key], value, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=key
            )
    torch.testing.assert_close(first["mean_path_length"], one["mean_path_length"])
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)


def test_processes_stay_the_same_to_the_bit(results):
    _, first, second = results
    for key, value in first["weights"].items():
        torch.testing.assert_close(second["weights"][key], value, rtol=0, atol=0)
