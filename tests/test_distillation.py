import pytest
import torch

from Compression import distillation
from Compression.distillation.perceptual import masked_distance
from Compression.distillation.pixels import masked_l1
from train_hyperparams import TrainConfig
from Util.settings import SettingError


def mean_square(a, b):
    return (a - b).square().mean(dim=(1, 2, 3))


def test_distillation_counts_only_what_is_inside_the_mask():
    student, teacher = torch.randn(2, 2, 3, 8, 8).unbind(0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:5] = 1
    inside = (student - teacher).abs()[:, :, 2:5].sum() / student.numel()
    l1 = masked_l1([student], [teacher], mask)
    torch.testing.assert_close(l1, inside)
    perceptual = masked_distance(student, teacher, mask, mean_square)
    torch.testing.assert_close(perceptual, mean_square(student * mask, teacher * mask).mean())
    outside = student + 5 * (1 - mask)
    torch.testing.assert_close(masked_l1([outside], [teacher], mask), l1)


def test_l1_of_equal_pictures_is_zero_at_every_resolution():
    # The original leaves the mask out there.
    rgbs = [torch.randn(2, 3, side, side) for side in (4, 8, 16)]
    mask = (torch.rand(2, 1, 16, 16) > 0.5).float()
    assert masked_l1(rgbs, rgbs, mask) == 0
    assert masked_distance(rgbs[-1], rgbs[-1], mask, mean_square) == 0


def test_l1_of_every_resolution_adds_the_terms_up():
    students = [torch.ones(1, 3, side, side) for side in (4, 8)]
    teachers = [torch.zeros_like(s) for s in students]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1  # the left half, at any resolution
    torch.testing.assert_close(masked_l1(students, teachers, mask), torch.tensor(0.5 + 0.5))


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(2, 1, 3, 8, 8, requires_grad=True).unbind(0)
    teacher.retain_grad()
    loss = masked_l1([student], [teacher], None)
    (loss + masked_distance(student, teacher, None, mean_square)).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("side", [128, 512])
def test_perceptual_distance_sees_at_most_256_px(side):
    seen = []

    def spy(a, b):
        seen.append((a.shape[-1], b.shape[-1]))
        return mean_square(a, b)

    zeros = torch.zeros(1, 3, side, side)
    masked_distance(zeros, zeros, None, spy)
    assert seen == [(min(side, 256),) * 2]


def test_weights_of_the_terms():
    assert distillation.weights(TrainConfig()) == {"l1": 3, "perceptual": 3}
    config = TrainConfig(kd_lpips_lambda=0.0, kd=("l1=0.5",))
    assert distillation.weights(config) == {"l1": 0.5}


@pytest.mark.parametrize("text", ["l1", "l1=", "l1=x", "l1=-1", "l1=nan", "none=1"])
def test_a_term_that_makes_no_sense_is_named(text):
    with pytest.raises(SettingError, match=f"^kd {text}: "):
        distillation.weights(TrainConfig(kd=(text,)))
