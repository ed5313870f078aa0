import torch

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
