"""One update: judged on the device, divided into parts, without waiting for the device."""

import copy

import pytest
import torch

from benchmarks import operators_per_iteration
from benchmarks.counting import Operators
from Compression.distillation import Term, pixels
from Compression.optimisation import Judge, LossScale, NonFiniteError, Update, divide, lazy_adam
from Compression.training import Teacher, Trainer
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from Model.ops import dispatch
from tests.test_training import CPU, changed, config, images, make_trainer, snapshot


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def poisoned_from(trainer, iteration):
    """A teacher's term that is finite, with a gradient that from an iteration on is not."""

    def term(student, teacher, mask):
        mean = student.made.image.square().mean()
        return NanGradient.apply(mean) if trainer.iteration >= iteration else mean

    torch.manual_seed(5)
    teacher = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4)).requires_grad_(False)
    trainer.teacher = Teacher(teacher, None, [Term("poison", 1.0, term)])
    return trainer


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_a_gradient_that_is_not_finite_destroys_nothing(late, tmp_path):
    settings = config(path_regularize=0.0, r1=0.0, log_freq=50)
    trainer = poisoned_from(make_trainer(settings), 2)
    trainer.judge.at_once = not late
    data = images(4)
    for real in data[:2]:
        trainer.iterate(real)
    g, adam = snapshot(trainer.generator), copy.deepcopy(trainer.g_optim.state_dict())
    message = r"the gradient of the generator loss \(.*\) by .*style.1.weight is not finite .*"
    if late:  # a device is asked one iteration later
        trainer.iterate(data[2])
    with pytest.raises(NonFiniteError, match=message + "in iteration 3"):
        trainer.iterate(data[3])
    assert not changed(trainer.generator, g)
    for key, state in trainer.g_optim.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, adam["state"][key][name])
    assert (trainer.iteration, trainer.images_seen) == (2, 8)
    assert trainer.judge.at_once != late
    # What is kept of it goes on.
    checkpoint.save(tmp_path / "kept.pt", trainer.state(together=False))
    content = checkpoint.read(tmp_path / "kept.pt")
    resumed = make_trainer(settings)
    resumed.generator.load_state_dict(checkpoint.load_generator(content, "g").state_dict())
    resumed.load_state(content)
    resumed.iterate(data[2])
    assert resumed.iteration == 3


def test_a_failure_late_in_a_line_of_the_log_is_told_before_the_line():
    trainer = poisoned_from(make_trainer(config(path_regularize=0.0, r1=0.0, log_freq=3)), 2)
    trainer.judge.at_once = False
    for real in images(2):
        trainer.iterate(real)
    with pytest.raises(NonFiniteError, match="in iteration 3"):
        trainer.iterate(images()[0])


def test_a_moving_average_comes_back_from_a_failure_that_is_seen_late():
    trainer = poisoned_from(make_trainer(config(path_regularize=0.0, r1=0.0, ema_decay=0.9)), 2)
    trainer.judge.at_once = False
    for real in images(2):
        trainer.iterate(real)
    before = [p.clone() for p in trainer.g_ema.parameters()]
    trainer.iterate(images()[0])
    with pytest.raises(NonFiniteError, match="in iteration 3"):
        trainer.iterate(images()[0])
    for now, then in zip(trainer.g_ema.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


def test_a_mean_path_length_survives_a_failure():
    trainer = make_trainer(config(r1=0.0, g_reg_every=1))
    trainer.judge.at_once = False
    trainer.iterate(images()[0])
    before = trainer.mean_path_length.clone()
    trainer.generator.conv1.noise.weight.data.fill_(float("nan"))
    trainer.iterate(images()[0])
    assert trainer.mean_path_length == before
    assert before > 0


def small_update(scale, clip=0.0):
    network = torch.nn.Linear(2, 1, bias=False)
    judge = Judge(CPU)
    update = Update(network, lazy_adam(network.parameters(), 0.1, 0), judge, scale, clip)
    return network, judge, update


@pytest.mark.parametrize("poison", [NanGradient.apply, lambda x: x * float("nan")])
def test_a_scale_that_has_shrunk_forgives_no_longer(poison):
    network, judge, update = small_update(LossScale(CPU, True))
    before, steps = network.weight.clone(), 0
    while not judge.failed:
        update.step("main", divide(1, 0), lambda part: poison(network.weight.sum()))
        steps += 1
    assert steps == 16 + 8 + 1  # from 2 ** 16 to 2 ** -8
    assert torch.equal(network.weight, before)


def test_the_scale_moves_as_gradscaler_does():
    ours, theirs = LossScale(CPU, True), torch.amp.GradScaler("cpu", growth_interval=2000)
    network = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(network.parameters(), 0.0)
    for i in range(2005):
        bad = i in (0, 1)
        theirs.scale(network.weight.sum() * (float("inf") if bad else 1)).backward()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(torch.tensor(float(bad)))
    assert ours.state_dict() == theirs.state_dict()
    assert ours.value.item() == 2.0**15


def test_scaled_and_clipped_gradients_make_the_plain_step():
    def train(scaled):
        torch.manual_seed(0)
        network, _, update = small_update(LossScale(CPU, scaled), clip=0.5)
        for _ in range(3):
            found = update.step("main", divide(3, 0), lambda part: network(x).square().mean())
        return network.weight.detach(), found["norm"]

    x = torch.randn(3, 2)
    torch.testing.assert_close(train(True), train(False))


def big_trainer(batch_gpu, batch=16):
    torch.manual_seed(0)
    generator = Generator(16, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4, 4, 4))
    for layer in generator.styled_convs:
        layer.noise.weight.data.fill_(0.1)
    frozen = copy.deepcopy(generator).requires_grad_(False)
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    settings = config(d_reg_every=2, g_reg_every=2, batch_gpu=batch_gpu)
    teacher = Teacher(
        frozen, lambda x: (x[:, :1] > 0).to(x.dtype), [Term("l1", 3.0, pixels.term())]
    )
    return Trainer(generator, Discriminator(16, channels=(5, 4, 4)), settings, CPU, teacher)


@pytest.mark.parametrize("size", [4, 8, 12])
def test_a_divided_batch_computes_what_a_whole_one_does(size):
    torch.set_default_dtype(torch.float64)
    try:
        trainers, metrics = [big_trainer(0), big_trainer(size)], []
        stream = torch.Generator().manual_seed(1)
        data = [torch.randn(16, 3, 16, 16, generator=stream) for _ in range(3)]
        for trainer in trainers:
            torch.manual_seed(3)
            metrics.append([trainer.iterate(real) for real in data])
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(*metrics, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12, msg=name)
    for name in ("generator", "discriminator", "g_ema"):
        expected = getattr(trainers[0], name).state_dict()
        for key, value in getattr(trainers[1], name).state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-8, msg=key)


def test_the_gradient_of_a_divided_batch_in_float32():
    gradients = []
    for size in (0, 4):
        trainer = big_trainer(size)
        torch.manual_seed(3)
        trainer.discriminator.requires_grad_(False)
        trainer._g_phase(16)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.generator.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 1e-6


def test_no_iteration_waits_for_the_device():
    trainer = big_trainer(0)
    trainer.judge.at_once = False
    data = torch.randn(16, 3, 16, 16)
    trainer.iterate(data)
    seen = {}
    for i in range(1, 6):
        with Operators() as operators:
            trainer.iterate(data)
        seen[i] = operators.waits
    assert seen == dict.fromkeys(range(1, 6), 0)


def test_an_iteration_of_two_images_asks_for_fewer_than_2000_operators():
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)
    with operators_per_iteration.as_on_a_gpu(native=True):
        trainer = operators_per_iteration.make_trainer(256, "none")
        found = operators_per_iteration.per_iteration(operators_per_iteration.count(trainer, 256))
    assert found["operators"] <= 1966
    assert found["without views"] <= 1400
    assert found["waits"] == 0


def test_the_counter_sees_what_waits():
    with Operators() as operators:
        bool(torch.ones(3).sum() > 2)
        torch.ones(3)[torch.ones(3) > 2]
    assert operators.waits == 2
