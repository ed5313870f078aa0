"""StyleKD's relation loss against its equations, written as loops in float64."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from Compression import distillation
from Compression.distillation import Pass, relation
from Compression.distillation.relation import RelationSettings
from Evaluation.directions import modulation_directions
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.settings import SettingError

CPU = torch.device("cpu")


def generator(size=32, width=5):
    return Generator(size, 8, 2, [width] * (2 * int(math.log2(size)) - 2)).double()


def run(network, z):
    """A pass without layer noise."""
    for layer in network.styled_convs:
        layer.noise.weight.data.zero_()
    w_plus = network.w_plus([z])
    return Pass(network, w_plus, None, True, nullcontext)


@pytest.fixture
def networks():
    torch.manual_seed(2)
    return generator(width=4), generator(width=6)


def fixed(n):
    return torch.randn(n, 1, 8, generator=torch.Generator().manual_seed(3)).double()


def slow(student, teacher, offset, loss="kl"):
    """Every pair of pictures of every layer, one number after another."""
    total = 0.0
    for layer in (4, 6):  # the second convolutions at 16 and 32 px
        rows = []
        for one in (student, teacher):
            still = one.made.features[layer].flatten(1).tolist()
            moved = one.generator.synthesis(one.w_plus + offset, features=True).features[layer]
            cosines = []
            for a in still:
                cosines.append([])
                for b in moved.flatten(1).tolist():
                    dot = sum(x * y for x, y in zip(a, b, strict=True))
                    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
                    cosines[-1].append(dot / norms)
            rows.append(cosines)
        n = len(rows[0])
        for s, t in zip(*rows, strict=True):
            if loss == "mse":
                total += sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / n**2
                continue
            p = [math.exp(x) / sum(math.exp(y) for y in t) for x in t]
            q = [math.exp(x) / sum(math.exp(y) for y in s) for x in s]
            total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / n
    return total


def term(**changes):
    return relation.term([4, 6], fixed, RelationSettings(**changes))


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_relation_by_its_definition(networks, loss):
    z = torch.randn(3, 8).double()
    student, teacher = (run(network, z) for network in networks)
    actual = term(relation_loss=loss)(student, teacher, None)
    assert actual.item() == pytest.approx(slow(student, teacher, fixed(3), loss), rel=1e-9)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_groups_know_their_own_pictures_alone(networks, loss):
    z = torch.randn(5, 8).double()
    groups = [slice(0, 2), slice(2, 4), slice(4, 5)]
    parts = [
        slow(*(run(network, z[g]) for network in networks), fixed(5)[g], loss) * len(z[g]) / 5
        for g in groups
    ]
    passes = [run(network, z) for network in networks]
    actual = term(relation_loss=loss, relation_group=2)(*passes, None)
    assert actual.item() == pytest.approx(sum(parts), rel=1e-9)
    whole = [term(relation_loss=loss, relation_group=n)(*passes, None).item() for n in (0, 5, 9)]
    assert whole[0] == whole[1] == whole[2] != pytest.approx(actual.item(), rel=1e-3)


def test_equal_networks_have_no_loss_whatever_the_scale_of_features(networks):
    network, other = networks
    z = torch.randn(4, 8).double()
    assert term()(run(network, z), run(network, z), None).item() == pytest.approx(0, abs=1e-12)
    student, teacher = run(network, z), run(other, z)
    one = relation.similarities(student.made.features[4], teacher.made.features[4][:, :4])
    scaled = relation.similarities(
        7 * student.made.features[4], 0.1 * teacher.made.features[4][:, :4]
    )
    torch.testing.assert_close(one, scaled)


def test_moved_pictures_have_layer_noise_of_their_own(networks, monkeypatch):
    drawn, make = [], Generator.make_noise

    def make_noise(self, n=1):
        drawn.append(self)
        return [noise.double() for noise in make(self, n)]

    monkeypatch.setattr(Generator, "make_noise", make_noise)
    student, teacher = (run(network, torch.randn(2, 8).double()) for network in networks)
    maps = student.generator.make_noise(2)
    for noises, expected in (
        ((None, None), []),  # drawn layer by layer
        ((None, maps), [teacher.generator]),  # as where the teacher is compiled
        ((maps, maps), [student.generator]),  # shared: once for both
    ):
        drawn.clear()
        passes = [replace(p, noise=n) for p, n in zip((student, teacher), noises, strict=True)]
        term()(*passes, None)
        assert drawn == expected


def test_gradient_by_finite_differences_and_none_into_the_teacher(networks):
    student, teacher = networks
    z = torch.randn(2, 8).double()
    weight = student.convs[2].conv.weight

    def loss():
        return term()(run(student, z), run(teacher, z), None)

    loss().backward()
    assert all(p.grad is None for p in teacher.parameters())
    for index in ((0, 0, 0, 0, 0), (0, 3, 2, 1, 2), (0, 1, 3, 2, 0)):
        values = []
        for step in (1e-6, -2e-6):
            weight.data[index] += step
            values.append(loss().item())
        weight.data[index] += 1e-6
        assert weight.grad[index].item() == pytest.approx(
            (values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-10
        )


def test_layers_are_those_that_exist():
    layers = {8: [], 16: [4], 64: [4, 6, 8], 128: [4, 6, 8, 10], 256: [4, 6, 8, 10]}
    for size, expected in layers.items():
        assert relation.layers_of(generator(size, 2)) == expected


def test_offsets_lie_along_the_teachers_directions():
    directions = modulation_directions(generator().float())
    found = relation.offsets(directions, 5.0)(2000)
    assert found.shape == (2000, 1, 8)
    lengths = found.norm(dim=2)[:, 0]
    along = (found[:, 0] @ directions.T).abs() / lengths[:, None]
    torch.testing.assert_close(along.max(dim=1).values, torch.ones(2000))
    signed = (found[:, 0] / directions[along.argmax(dim=1)]).median(dim=1).values
    assert abs(signed.mean().item()) < 0.4
    assert signed.std().item() == pytest.approx(5.0, rel=0.1)
    counts = torch.bincount(along.argmax(dim=1), minlength=len(directions))
    assert counts.min() > 60  # 133 are expected of each


def test_an_8_px_model_is_refused():
    teacher = generator(8).float()
    config = TrainConfig(teacher_ckpt="x", kd=("relation=1",), kd_l1_lambda=0, kd_lpips_lambda=0)
    with pytest.raises(SettingError, match="relation compares blocks from 16 px on; 8 px has none"):
        distillation.make_terms(distillation.Sources(config, teacher, CPU))


def test_a_picture_that_has_none_to_be_compared_with_is_refused():
    config = TrainConfig(teacher_ckpt="x", kd=("relation=1",), kd_l1_lambda=0, kd_lpips_lambda=0)
    sources = distillation.Sources(replace(config, batch_size=1), generator(16).float(), CPU)
    with pytest.raises(SettingError, match="batch_size 1: relation compares the pictures"):
        distillation.make_terms(sources)
    squared = (RelationSettings(relation_loss="mse"),)
    other = replace(sources.config, options=squared)
    assert distillation.make_terms(replace(sources, config=other))


def test_the_terms_settings_arrive():
    teacher = copy.deepcopy(generator(16).float())
    options = (RelationSettings(relation_loss="mse", relation_step=2.0),)
    config = TrainConfig(
        teacher_ckpt="x", kd=("relation=30",), kd_l1_lambda=0, kd_lpips_lambda=0, options=options
    )
    (made,) = distillation.make_terms(distillation.Sources(config, teacher, CPU))
    assert (made.name, made.weight, made.features) == ("relation", 30, True)
    one = run(teacher, torch.randn(2, 8))
    assert made.parts.call(one, one, None).item() == 0
