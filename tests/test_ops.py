import pytest
import torch
import torch.nn.functional as F

from Model.ops import fused_leaky_relu, make_kernel, upfirdn2d


def upfirdn2d_by_definition(x, kernel, up, down, pad):
    """Zeros inserted, padded or cropped, convolved channel by channel, every ``down``th kept."""
    n, c, h, w = x.shape
    zeros = x.new_zeros(n, c, h, up, w, up)
    zeros[:, :, :, 0, :, 0] = x
    y = F.pad(zeros.reshape(n, c, h * up, w * up), (pad[0], pad[1], pad[0], pad[1]))
    y = y.reshape(n * c, 1, *y.shape[2:])
    y = F.conv2d(y, kernel.flip((0, 1))[None, None])
    return y.reshape(n, c, *y.shape[2:])[:, :, ::down, ::down]


CASES = [
    (1, 1, (1, 1)), (1, 1, (2, 1)), (1, 2, (1, 1)), (1, 2, (2, 2)), (2, 1, (2, 1)), (2, 1, (0, 0)),
    (2, 1, (3, 3)), (2, 1, (5, 4)), (3, 2, (1, 2)), (2, 2, (2, 1)), (1, 1, (-1, 2)),
    (2, 1, (-1, -1)),
]  # fmt: skip


@pytest.mark.parametrize(("up", "down", "pad"), CASES)
@pytest.mark.parametrize("taps", [3, 4])
def test_upfirdn2d_equals_its_definition(up, down, pad, taps):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(taps, taps, generator=generator, dtype=torch.float64)  # not symmetric
    actual = upfirdn2d(x, kernel, up, down, pad)
    expected = upfirdn2d_by_definition(x, kernel, up, down, pad)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("up", "down", "pad"), [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1))])
def test_upfirdn2d_is_differentiable_twice(up, down, pad):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    kernel = make_kernel().double()
    assert torch.autograd.gradgradcheck(lambda x: upfirdn2d(x, kernel, up, down, pad).square(), x)


def test_make_kernel_sums_to_its_gain():
    kernel = make_kernel((1, 3, 3, 1), gain=4.0)
    torch.testing.assert_close(kernel.sum(), torch.tensor(4.0))
    torch.testing.assert_close(kernel[0, 1] / kernel[0, 0], torch.tensor(3.0))


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_leaky_relu_equals_three_passes(shape, with_bias):
    x = torch.randn(shape, dtype=torch.float64)
    kept = x.clone()
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    shifted = x if bias is None else x + bias.view(1, -1, *[1] * (x.ndim - 2))
    expected = F.leaky_relu(shifted, 0.1) * 1.7
    torch.testing.assert_close(fused_leaky_relu(x, bias, 0.1, 1.7), expected)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)  # the input is not written to


def test_fused_leaky_relu_is_differentiable_twice():
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fused_leaky_relu, (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: fused_leaky_relu(x, b).square(), (x, bias))


def test_impl_is_checked():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="impl must be"):
        fused_leaky_relu(x, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no compiled operators for meta"):
        upfirdn2d(x.to("meta"), make_kernel(), impl="native")


def test_cropping_may_leave_nothing_but_inserted_zeros():
    found = upfirdn2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1), up=3, pad=(-2, 0), impl="reference")
    torch.testing.assert_close(found, torch.zeros(1, 1, 1, 1))
