import copy
import itertools

import pytest
import torch

from Compression.averages import Averages
from Compression.distillation import Parts, Term, pixels
from Compression.distillation.teacher_discriminator import adversary
from Compression.run import networks
from Compression.training import (
    Event,
    NonFiniteError,
    Teacher,
    Trainer,
    accumulate,
    iterate,
    lazy_adam,
)
from Model.discriminator import Discriminator
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util import distributed

CPU = torch.device("cpu")


def config(**changes):
    return TrainConfig(batch_size=4, **changes)


def make_trainer(settings=None, teacher=None):
    torch.manual_seed(0)
    generator = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4))
    discriminator = Discriminator(8, channels=(5, 4))
    return Trainer(generator, discriminator, settings or config(), CPU, teacher)


def images(n=1, batch=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 8, 8, generator=generator).clamp(-1, 1) for _ in range(n)]


def snapshot(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def loss_of(update, phase, parts, loss_of):
    (part,) = parts
    return loss_of(part)


def changed(network, before):
    return {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}


def test_lazy_adam_follows_the_regularisation_interval():
    group = lazy_adam(iter([torch.nn.Parameter(torch.zeros(1))]), 0.002, 16).param_groups[0]
    assert group["lr"] == pytest.approx(0.002 * 16 / 17)
    assert group["betas"] == pytest.approx((0, 0.99 ** (16 / 17)))
    plain = lazy_adam(iter([torch.nn.Parameter(torch.zeros(1))]), 0.002, 0).param_groups[0]
    assert plain["lr"] == 0.002


def test_regularisers_run_at_their_intervals():
    trainer = make_trainer(config(d_reg_every=4, g_reg_every=2))
    seen = [set(trainer.iterate(real)) for real in images(5)]
    assert [("r1" in keys) for keys in seen] == [True, False, False, False, True]
    assert [("path_length" in keys) for keys in seen] == [True, False, True, False, True]
    assert "kd_l1" not in seen[0]


def test_each_phase_updates_its_own_network():
    trainer = make_trainer()
    g, d = snapshot(trainer.generator), snapshot(trainer.discriminator)
    trainer._d_phase(images()[0])
    assert not changed(trainer.generator, g)
    assert changed(trainer.discriminator, d)
    d = snapshot(trainer.discriminator)
    trainer.discriminator.requires_grad_(False)
    trainer._g_phase(4)
    assert not changed(trainer.discriminator, d)
    assert changed(trainer.generator, g)


def test_frozen_noise_strengths_stay():
    trainer = make_trainer(config(freeze_noise=True))
    for layer in trainer.generator.styled_convs:
        layer.noise.weight.data.fill_(0.25)
    for real in images(3):
        trainer.iterate(real)
    assert [layer.noise.weight.item() for layer in trainer.generator.styled_convs] == [0.25] * 3
    free = make_trainer()
    for real in images(3):
        free.iterate(real)
    assert any(layer.noise.weight.item() for layer in free.generator.styled_convs)


def test_moving_average():
    a, b = (Generator(8, 8, 1, channels=(2, 2, 2, 2)) for _ in range(2))
    expected = 0.9 * a.conv1.conv.weight + 0.1 * b.conv1.conv.weight
    accumulate(a, b, 0.9)
    torch.testing.assert_close(a.conv1.conv.weight, expected)


def test_distillation_pulls_the_student_to_its_teacher_inside_the_mask():
    # No GAN signal worth speaking of: the discriminator's learning rate is that of the student, so
    # the distillation weight is made to dominate.
    torch.manual_seed(3)
    generator = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4)).requires_grad_(False)

    def left_half(x):
        mask = torch.zeros(x.shape[0], 1, *x.shape[2:])
        mask[..., :4] = 1
        return mask

    settings = config(mixing=0.0, path_regularize=0.0, lr=0.01)
    terms = [Term("l1", 100.0, pixels.term())]
    trainer = make_trainer(settings, Teacher(generator, left_half, terms))
    history = [trainer.iterate(real)["kd_l1"].item() for real in images(150)]
    assert sum(history[-10:]) < 0.7 * sum(history[:10])


def test_a_mask_of_the_wrong_shape_is_told_before_any_step():
    trainer = make_trainer(config())
    teacher = copy.deepcopy(trainer.generator).requires_grad_(False)
    trainer.teacher = Teacher(teacher, lambda x: x, [Term("l1", 3.0, pixels.term())])
    before = copy.deepcopy(trainer.generator.state_dict())
    with pytest.raises(ValueError, match=r"mask makes \(4, 3, 8, 8\) of images"):
        trainer.iterate(images()[0])
    for name, value in trainer.generator.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("every_resolution", [False, True])
def test_student_and_teacher_see_the_same_mixed_latents(every_resolution):
    trainer = make_trainer(config(mixing=1.0, path_regularize=0.0, r1=0.0))
    teacher = copy.deepcopy(trainer.generator).requires_grad_(False)
    trainer.teacher = Teacher(teacher, None, [Term("l1", 3.0, pixels.term(every_resolution))])
    # Noise strengths are zero at the start, so equal networks make equal pictures.
    assert trainer.iterate(images()[0])["kd_l1"].item() == pytest.approx(0, abs=1e-6)


def test_a_resumed_run_equals_one_that_was_not_interrupted():
    whole, data = make_trainer(), images(6)
    for real in data:
        whole.iterate(real)
    first = make_trainer()
    for real in data[:3]:
        first.iterate(real)
    content = copy.deepcopy(
        {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in first.state().items()}
    )
    torch.manual_seed(99)
    second = make_trainer()
    second.generator.load_state_dict(content["g"])
    second.g_ema.load_state_dict(content["g_ema"])
    second.discriminator.load_state_dict(content["d"])
    second.load_state(content)
    assert second.iteration == 3
    for real in data[3:]:
        second.iterate(real)
    for name in ("generator", "g_ema", "discriminator"):
        expected = getattr(whole, name).state_dict()
        for key, value in getattr(second, name).state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    torch.testing.assert_close(second.mean_path_length, whole.mean_path_length, rtol=0, atol=0)


def second_discriminator(weight=1.0):
    torch.manual_seed(7)
    teacher = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4)).requires_grad_(False)
    network = Discriminator(8, channels=(3, 4))
    return Teacher(teacher, None, [Term("teacher_discriminator", weight, adversary(network))])


def test_a_second_discriminator_is_trained_beside_the_first():
    trainer = make_trainer(config(), second_discriminator())
    ((network, _),) = trainer.further.values()
    before = snapshot(network)
    metrics = trainer.iterate(images()[0])
    assert changed(network, before)
    assert {"d_loss", "r1", "d_loss_teacher_discriminator", "r1_teacher_discriminator"} <= set(
        metrics
    )
    before = snapshot(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    trainer._g_phase(4)
    assert not changed(network, before)


def test_losses_of_both_discriminators_by_their_definition(monkeypatch):
    trainer = make_trainer(config(r1=0.0, path_regularize=0.0, lr=0.0), second_discriminator(0.5))
    ((further, _),) = trainer.further.values()
    seen, steps = [], []
    monkeypatch.setattr(trainer, "_step", lambda *step: steps.append(loss_of(*step)) or {})
    for network in (trainer.discriminator, further):
        network.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    trainer.iterate(images()[0])
    both, both_t, g, g_t = seen
    (fake, real), (fake_t, real_t) = both.chunk(2), both_t.chunk(2)
    softplus = torch.nn.functional.softplus
    torch.testing.assert_close(steps[0], softplus(fake).mean() + softplus(-real).mean())
    torch.testing.assert_close(steps[1], softplus(fake_t).mean() + softplus(-real_t).mean())
    torch.testing.assert_close(steps[2], softplus(-g).mean() + 0.5 * softplus(-g_t).mean())


def test_a_resumed_run_with_a_second_discriminator_equals_one_that_was_not_interrupted():
    whole, data = make_trainer(config(), second_discriminator()), images(4)
    for real in data:
        whole.iterate(real)
    first = make_trainer(config(), second_discriminator())
    for real in data[:2]:
        first.iterate(real)
    content = copy.deepcopy(
        {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in first.state().items()}
    )
    second = make_trainer(config(), second_discriminator())
    for name, key in (("generator", "g"), ("g_ema", "g_ema"), ("discriminator", "d")):
        getattr(second, name).load_state_dict(content[key])
    second.load_state(content)
    for real in data[2:]:
        second.iterate(real)
    pairs = [(whole.generator, second.generator), (whole.discriminator, second.discriminator)]
    pairs.append(tuple(t.further["teacher_discriminator"][0] for t in (whole, second)))
    for a, b in pairs:
        for key, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[key], value, rtol=0, atol=0)
    del content["teacher_discriminator"]
    with pytest.raises(ValueError, match="no 'teacher_discriminator' in the checkpoint"):
        make_trainer(config(), second_discriminator()).load_state(content)


def test_the_gan_loss_grows_over_the_first_images(monkeypatch):
    settings = config(r1=0.0, path_regularize=0.0, gan_ramp=16)  # four iterations
    trainer = make_trainer(settings, second_discriminator(2.0))
    shares = []

    def step(update, phase, parts, loss_of):
        losses = [loss_of(part).item() for part in parts]
        if phase == "generator":
            shares.extend(losses)
        return {}

    monkeypatch.setattr(trainer, "_step", step)
    for i, real in enumerate(images(6)):
        metrics = trainer.iterate(real)
        whole = metrics["g_loss"] + 2 * metrics["kd_teacher_discriminator"]
        assert shares[-1] == pytest.approx(min(1, i / 4) * whole.item(), rel=1e-5)


def test_the_learning_rates_fall_over_the_last_images():
    settings = config(lr=0.008, lr_decay=16, iter=6, d_reg_every=3)  # the last four iterations
    trainer, rates = make_trainer(settings, second_discriminator()), []
    adams = [update.adam for update in trainer.updates]
    whole = [adam.param_groups[0]["lr"] for adam in adams]
    for real in images(6):
        before = snapshot(trainer.generator)
        trainer.iterate(real)
        rates.append([adam.param_groups[0]["lr"] for adam in adams])
        assert changed(trainer.generator, before)
    for share, found in zip((1, 1, 1, 0.75, 0.5, 0.25), rates, strict=True):
        assert found == pytest.approx([share * rate for rate in whole])


def test_a_term_may_train_the_discriminator_and_sees_the_teachers_pass(monkeypatch):
    torch.manual_seed(5)
    teacher = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4)).requires_grad_(False)
    seen, steps = [], {}

    def critic(discriminator, target):
        seen.append(target)
        return discriminator(target.made.image).square().mean()

    trainer = make_trainer(config(r1=0.0, path_regularize=0.0))
    trainer.teacher = Teacher(teacher, None, [Term("critic", 10.0, Parts(critic=critic))])
    monkeypatch.setattr(
        trainer, "_step", lambda *step: steps.update({step[1]: loss_of(*step).item()}) or {}
    )
    metrics = trainer.iterate(images()[0])
    assert [f.shape[1] for f in seen[0].made.features] == [5, 4, 4]
    expected = metrics["d_loss"] + 10 * metrics["kd_critic"]
    assert steps["discriminator"] == pytest.approx(expected.item(), rel=1e-6)
    assert steps["generator"] == pytest.approx(metrics["g_loss"].item(), rel=1e-6)


def test_the_teacher_draws_only_for_terms_that_look_at_its_pass(monkeypatch):
    teacher = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4)).requires_grad_(False)
    drawn = []
    synthesis = teacher.synthesis
    monkeypatch.setattr(
        teacher, "synthesis", lambda *a, **k: drawn.append(len(a[0])) or synthesis(*a, **k)
    )

    def alone(student, target, mask):
        return student.made.image.square().mean()

    def beside(student, target, mask):
        return (student.made.image - target.made.image + target.made.rgbs[0].mean()).abs().mean()

    trainer, (real,) = make_trainer(config(r1=0.0, path_regularize=0.0)), images()
    trainer.teacher = Teacher(teacher, None, [Term("alone", 1.0, alone)])
    trainer.iterate(real)
    assert not drawn
    trainer.teacher = Teacher(teacher, None, [Term("a", 1.0, beside), Term("b", 1.0, beside)])
    trainer.iterate(real)
    assert drawn == [len(real)]


def test_events_come_at_their_periods_and_at_the_end():
    trainer, events = make_trainer(), []
    periods = {"log": 2, "checkpoint": 3, "sample": 0}
    due = [
        Event(every, lambda name=name: events.append((name, trainer.iteration)))
        for name, every in periods.items()
    ]
    iterate(trainer, itertools.cycle(images(2)), 5, due)
    assert events == [
        ("log", 2), ("checkpoint", 3), ("log", 4), ("log", 5), ("checkpoint", 5), ("sample", 5),
    ]  # fmt: skip


def test_the_end_of_the_batches_ends_the_training():
    trainer = make_trainer()
    iterate(trainer, iter(images(2)), 9, [])
    assert trainer.iteration == 2


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update():
    trainer = make_trainer()
    trainer.iterate(images()[0])
    before = snapshot(trainer.discriminator)
    with pytest.raises(NonFiniteError, match="the discriminator loss is nan in iteration 2"):
        trainer.iterate(torch.full((4, 3, 8, 8), float("nan")))
    assert not changed(trainer.discriminator, before)
    assert trainer.iteration == 1


def test_gradients_are_clipped_when_asked():
    trainer = make_trainer(config(grad_clip=1e-3))
    trainer.iterate(images()[0])
    grads = [p.grad for p in trainer.discriminator.parameters() if p.grad is not None]
    assert torch.cat([g.flatten() for g in grads]).norm() <= 1e-3 * 1.001


def test_averages_are_those_of_all_iterations_since_the_last_line():
    averages = Averages()
    averages.add({"d_loss": torch.tensor(1.0), "r1": torch.tensor(5.0)}, 4)
    averages.add({"d_loss": torch.tensor(2.0)}, 4)
    resumed = Averages()
    resumed.load(averages.state(), CPU)
    for one in (averages, resumed):
        means = one.flush()
        assert (means["d_loss"], means["r1"]) == (1.5, 5.0)


def test_the_speed_counts_from_the_first_iteration(monkeypatch):
    now = iter([0.0, 100.0, 102.0, 102.0])
    monkeypatch.setattr("Compression.averages.time.perf_counter", lambda: next(now))
    averages = Averages()  # what is loaded and counted before training takes the 100 s
    averages.begin()
    averages.add({"d_loss": torch.tensor(1.0)}, 8)
    assert averages.flush()["images_per_second"] == 4


def test_every_process_goes_on_with_its_own_averages(monkeypatch):
    trainer = make_trainer(config())
    trainer.iterate(images()[0])
    state = trainer.state()
    own = state["train_state"]["averages"][0]
    second = {key: [0.5] * len(values) for key, values in own.items()}
    state["train_state"] |= {"averages": [own, second], "rng": [None, None, None]}
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for processes, expected in ((2, second), (1, own)):
        monkeypatch.setattr(distributed, "world_size", lambda n=processes: n)
        resumed = make_trainer(config())
        resumed.load_state(state)
        assert resumed.averages.state() == expected


def test_shared_noise_makes_equal_networks_make_equal_pictures():
    settings = config(path_regularize=0.0, r1=0.0, kd_shared_noise=True)
    trainer = make_trainer(settings)
    for layer in trainer.generator.styled_convs:
        layer.noise.weight.data.fill_(1.0)
    teacher = copy.deepcopy(trainer.generator).requires_grad_(False)
    trainer.teacher = Teacher(teacher, None, [Term("l1", 3.0, pixels.term())])
    assert trainer.iterate(images()[0])["kd_l1"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("processes", "batch", "said"),
    [(2, 6, "on 2 images, not on 3"), (16, 16, "on 16 images, not on 8"), (2, 16, ""), (1, 1, "")],
)
def test_another_batch_of_the_path_length_is_announced(monkeypatch, processes, batch, said):
    monkeypatch.setattr(networks.distributed, "world_size", lambda: processes)
    lines = []
    networks._announce_path_batch(TrainConfig(batch_size=batch), lines.append)
    assert (said in lines[0]) if said else not lines
    networks._announce_path_batch(TrainConfig(batch_size=batch, path_regularize=0.0), lines.append)
    assert len(lines) == bool(said)
