import pytest
import torch

from Compression.distillation import distillation_loss
from Compression.losses import path_length_penalty
from tests.golden_fill import assert_golden


def test_path_length_equals_the_original(golden):
    generator, arrays = golden
    conv1 = generator.conv1.conv.weight.requires_grad_()
    w_plus = generator.w_plus([torch.as_tensor(arrays["z1"])]).detach().requires_grad_()
    images = generator.synthesis(w_plus, "fixed").image
    noise = torch.as_tensor(arrays["path_noise"])
    penalty, mean, lengths = path_length_penalty(
        images, w_plus, torch.tensor(0.3), decay=0.01, noise=noise
    )
    assert_golden(lengths, arrays, "path_lengths")
    assert_golden(mean, arrays, "path_mean_next")
    assert_golden(penalty, arrays, "path_penalty")
    (grad,) = torch.autograd.grad(penalty, conv1)
    assert_golden(grad, arrays, "path_penalty_grad_conv1")


def mean_square(a, b):
    return (a - b).square().mean(dim=(1, 2, 3))


def test_distillation_counts_only_what_is_inside_the_mask():
    student, teacher = torch.randn(2, 2, 3, 8, 8).unbind(0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:5] = 1
    inside = (student - teacher).abs()[:, :, 2:5].sum() / student.numel()
    l1, perceptual = distillation_loss(student, teacher, mask, mean_square)
    torch.testing.assert_close(l1, inside)
    torch.testing.assert_close(perceptual, mean_square(student * mask, teacher * mask).mean())
    outside = student + 5 * (1 - mask)
    torch.testing.assert_close(distillation_loss(outside, teacher, mask, mean_square)[0], l1)


def test_distillation_of_equal_pictures_is_zero_at_every_resolution():
    # The original masked one side only, so that equal pictures had a distance.
    rgbs = [torch.randn(2, 3, side, side) for side in (4, 8, 16)]
    mask = (torch.rand(2, 1, 16, 16) > 0.5).float()
    l1, perceptual = distillation_loss(rgbs, rgbs, mask, mean_square)
    assert l1 == 0
    assert perceptual == 0


def test_distillation_of_every_resolution_adds_the_terms_up():
    students = [torch.ones(1, 3, side, side) for side in (4, 8)]
    teachers = [torch.zeros_like(s) for s in students]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1  # the left half, at any resolution
    torch.testing.assert_close(
        distillation_loss(students, teachers, mask)[0], torch.tensor(0.5 + 0.5)
    )


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(2, 1, 3, 8, 8, requires_grad=True).unbind(0)
    teacher.retain_grad()
    l1, perceptual = distillation_loss(student, teacher, None, mean_square)
    (l1 + perceptual).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("side", [128, 512])
def test_perceptual_distance_sees_at_most_256_px(side):
    seen = []

    def spy(a, b):
        seen.append((a.shape[-1], b.shape[-1]))
        return mean_square(a, b)

    distillation_loss(torch.zeros(1, 3, side, side), torch.zeros(1, 3, side, side), None, spy)
    assert seen == [(min(side, 256),) * 2]
