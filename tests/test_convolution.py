"""The compiled 3x3 convolution against PyTorch's in double precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import Model.ops.convolution as module
from Model.ops import (
    Epilogue,
    apply_epilogue,
    conv2d,
    conv3x3,
    dispatch,
    filtered_leaky_relu,
    make_kernel,
    scaled_maps,
    styled_conv3x3,
    styled_upsampling_conv3x3,
)

if (reason := dispatch.why_not("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

# Vectors hold 4, 8 or 16 values, panels up to 48 columns: below, at and above each.
CHANNELS = [(1, 1), (3, 5), (16, 16), (17, 31), (32, 48), (47, 64), (49, 50), (100, 97)]


def tensors(n, inputs, outputs, height, width, dtype=torch.float32):
    x = torch.randn(n, inputs, height, width, dtype=dtype)
    weight = torch.randn(outputs, inputs, 3, 3, dtype=dtype) / (9 * inputs) ** 0.5
    return x, weight


def assert_rounding(actual, expected):
    """Of the outputs' spread, which is one, `expected` being in double precision."""
    error = {torch.float32: 3e-5, torch.float64: 1e-13}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=error)


def exact(x, weight, bias=None):
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS)
def test_equals_pytorch(channels, dtype):
    for n, height, width in ((1, 4, 4), (2, 8, 8), (3, 7, 9), (1, 1, 1), (1, 2, 13)):
        x, weight = tensors(n, *channels, height, width, dtype)
        bias = torch.randn(channels[1], dtype=dtype)
        for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
            y = conv3x3(given_x, weight, impl="native")
            assert_rounding(y, exact(x, weight))
            assert y.is_contiguous(memory_format=torch.channels_last)
        assert_rounding(conv3x3(x, weight, bias, impl="native"), exact(x, weight, bias))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), *[st.integers(1, 20)] * 4, st.booleans())
def test_equals_pytorch_for_any_shape(n, inputs, outputs, height, width, turned):
    x, weight = tensors(n, inputs, outputs, height, width, torch.float64)
    if turned:  # neither is contiguous
        x, weight = x.transpose(2, 3), weight.flip(2).transpose(2, 3)
    assert_rounding(conv3x3(x, weight, impl="native"), exact(x, weight))


def test_rounding_is_as_documented():
    x, weight = tensors(1, 512, 64, 32, 32)
    error = (conv3x3(x, weight, impl="native") - exact(x, weight)).square().mean().sqrt()
    assert 1e-8 < error < 1.3e-6


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("maps", [1, 2])
def test_styled_convolution_is_the_steps_in_turn(channels, maps):
    x, weight = tensors(2, *channels, 9, 10)
    style = torch.rand(2, channels[0]) + 0.5
    whole = Epilogue(
        bias=torch.randn(channels[1]),
        noise=torch.randn(maps, 1, 9, 10),
        noise_strength=torch.randn(1),
        gain=torch.rand(2, channels[1]) + 0.5,
        negative_slope=0.3,
    )
    for left_out in ((), *((name,) for name in Epilogue._fields[:4])):
        some = whole._replace(**dict.fromkeys(left_out))
        y = styled_conv3x3(x, weight, style, some, "native")
        convolved = exact(x * style[:, :, None, None].double(), weight)
        expected = apply_epilogue(convolved, some.to(torch.float64), "reference")
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [12, 40])  # all threads at one chunk; each at its own
def test_results_do_not_depend_on_the_number_of_threads(size):
    x, weight = tensors(2, 40, 40, size, size)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(conv3x3(x, weight, impl="native"))
    torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_results_do_not_depend_on_the_batch():
    x, weight = tensors(5, 40, 40, 16, 16)
    together = conv3x3(x, weight, impl="native")
    apart = torch.cat([conv3x3(image[None], weight, impl="native") for image in x])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


def upsampled(x, weight, style, kernel, epilogue):
    """The steps one by one, in double precision."""
    x, weight, style, kernel = (t.double() for t in (x, weight, style, kernel))
    y = F.conv_transpose2d(x * style[:, :, None, None], weight.transpose(0, 1), stride=2)
    return filtered_leaky_relu(y, kernel, (1, 1), epilogue.to(torch.float64), "reference")


def layer(n, inputs, outputs, height, width, dtype=torch.float32):
    """Arguments of an upsampling layer."""
    x, weight = tensors(n, inputs, outputs, height, width, dtype)
    epilogue = Epilogue(
        bias=torch.randn(outputs, dtype=dtype),
        noise=torch.randn(n, 1, 2 * height, 2 * width, dtype=dtype),
        noise_strength=torch.randn(1, dtype=dtype),
        gain=torch.rand(n, outputs, dtype=dtype) + 0.5,
    )
    style = torch.rand(n, inputs, dtype=dtype) + 0.5
    return x, weight, style, make_kernel(gain=4.0).to(dtype), epilogue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS)
def test_an_upsampling_convolution_is_the_steps_in_turn(channels, dtype):
    # 256 pixels are multiplied at once: part of them, several rows, one row; three images.
    for n, height, width in ((1, 4, 4), (1, 1, 1), (3, 5, 7), (1, 9, 64), (1, 3, 300)):
        arguments = layer(n, *channels, height, width, dtype)
        y = styled_upsampling_conv3x3(*arguments, impl="native")
        assert_rounding(y, upsampled(*arguments))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_upsampling_convolution_takes_any_filter_and_part_of_an_epilogue():
    x, weight, style, _, whole = layer(2, 20, 18, 6, 5)
    kernel = torch.randn(4, 4)  # no outer product, not symmetric
    for left_out in ((), *((name,) for name in Epilogue._fields[:4])):
        some = whole._replace(**dict.fromkeys(left_out))
        y = styled_upsampling_conv3x3(x, weight, style, kernel, some, "native")
        expected = upsampled(x, weight, style, kernel, some)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="expected a 4 x 4 filter"):
        styled_upsampling_conv3x3(x, weight, style, kernel[:3, :3], whole, "native")


def test_an_upsampling_convolution_does_not_depend_on_threads_or_batch():
    x, weight, style, kernel, epilogue = layer(3, 40, 20, 21, 30)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(styled_upsampling_conv3x3(x, weight, style, kernel, epilogue, impl="native"))
    torch.set_num_threads(threads)
    for i in range(3):
        own = epilogue._replace(noise=epilogue.noise[i : i + 1], gain=epilogue.gain[i : i + 1])
        alone = (x[i : i + 1], weight, style[i : i + 1], kernel, own, "native")
        torch.testing.assert_close(
            styled_upsampling_conv3x3(*alone), results[0][i : i + 1], rtol=0, atol=0
        )
        torch.testing.assert_close(results[i], results[0], rtol=0, atol=0)


def test_auto_takes_the_upsampling_operator_where_its_weights_stay_in_the_cache(chosen):
    for inputs, outputs, asked in ((64, 64, 1), (512, 256, 0)):
        chosen.clear()
        styled_upsampling_conv3x3(*layer(1, inputs, outputs, 4, 4))
        assert len(chosen) == asked
    chosen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y = styled_upsampling_conv3x3(*layer(1, 64, 64, 4, 4))
    assert y.dtype == torch.bfloat16
    assert not chosen


def test_an_upsampling_convolution_has_gradients():
    x, weight, style, kernel, epilogue = layer(2, 3, 4, 5, 6, torch.float64)
    for wanted in (x, style, epilogue.gain):
        wanted.requires_grad_()
        grads = [
            torch.autograd.grad(function.square().sum(), wanted)
            for function in (
                styled_upsampling_conv3x3(x, weight, style, kernel, epilogue, "native"),
                upsampled(x, weight, style, kernel, epilogue),
            )
        ]
        torch.testing.assert_close(*grads)
        wanted.requires_grad_(False)


def test_weights_are_modulated_instead_of_a_single_half_precision_image():
    for n in (1, 2):
        x, weight = tensors(n, 24, 24, 32, 32)
        style = torch.rand(n, 24) + 0.5
        with torch.autocast("cpu", torch.bfloat16):
            y = styled_conv3x3(x.bfloat16(), weight, style, Epilogue())
        expected = apply_epilogue(exact(x * style[:, :, None, None], weight), Epilogue())
        torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)


def test_it_is_differentiable_twice():
    x, weight = (t.requires_grad_() for t in tensors(2, 3, 4, 5, 6, torch.float64))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(*args):
        return conv3x3(*args, impl="native")

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *a: function(*a).square(), (x, weight, bias))


def test_a_styled_convolution_has_gradients_too():
    x, weight = tensors(2, 3, 4, 5, 6, torch.float64)
    wanted = [torch.randn(s, dtype=x.dtype, requires_grad=True) for s in ((2, 3), (4,), (2, 4))]
    for only in wanted:  # any of them alone must be enough
        style, bias, gain = (t if t is only else t.detach() for t in wanted)
        grads = []
        for impl in ("native", "reference"):
            y = styled_conv3x3(x, weight, style, Epilogue(bias, gain=gain), impl)
            grads.append(torch.autograd.grad(y.square().sum(), only))
        torch.testing.assert_close(*grads)


def test_it_is_registered_as_pytorch_asks():
    x, weight = tensors(2, 3, 4, 6, 6)
    bias, noise, gain = torch.randn(4), torch.randn(1, 1, 6, 6), torch.randn(2, 4)
    differentiable = (t.requires_grad_() for t in (x.clone(), weight.clone(), bias.clone()))
    torch.library.opcheck(torch.ops.stylegan.conv3x3.default, tuple(differentiable))
    styled = (x, weight, torch.randn(2, 3), bias, noise, torch.ones(1), gain, 0.2, 1.4)
    torch.library.opcheck(torch.ops.stylegan.styled_conv3x3.default, styled)
    *arguments, epilogue = layer(2, 3, 4, 5, 6)
    upsampling = torch.ops.stylegan.styled_up_conv3x3.default
    torch.library.opcheck(upsampling, (*arguments, *epilogue))


@pytest.fixture
def chosen(monkeypatch):
    """Where ``auto`` asked for the compiled operator, and was told no."""
    asked = []
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(module, "use_native", lambda *_: asked.append(True))
    return asked


@pytest.mark.parametrize(
    ("n", "inputs", "outputs", "size", "worth"),
    [(1, 64, 64, 32, 1), (8, 512, 512, 8, 1), (1, 512, 512, 15, 0), (4, 3, 64, 64, 0),
     (4, 14, 14, 64, 0), (1, 24, 24, 32, 1)],
)  # fmt: skip
def test_auto_takes_it_where_it_pays(chosen, n, inputs, outputs, size, worth):
    conv3x3(*tensors(n, inputs, outputs, size, size))
    assert len(chosen) == worth


@pytest.mark.parametrize(("channels", "worth"), [(8, 1), (12, 0)])
def test_narrow_layers_take_it_where_transforms_cost_less(chosen, monkeypatch, channels, worth):
    monkeypatch.setattr(module, "TRANSFORM", channels)
    conv3x3(*tensors(4, 16, 16, 64, 64))
    assert len(chosen) == worth


@pytest.mark.parametrize(
    ("side", "stride", "padding", "asked"),
    [(3, 1, 1, 1), (3, (1, 1), (1, 1), 1), (3, 2, 1, 0), (3, 1, 0, 0), (1, 1, 0, 0)],
)
def test_conv2d_takes_it_for_its_own_case_alone(chosen, side, stride, padding, asked):
    x, weight = tensors(1, 64, 64, 32, 32)
    weight, bias = weight[:, :, :side, :side], torch.randn(64)
    y = conv2d(x, weight, bias, stride, padding)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, stride, padding), rtol=0, atol=0)
    assert len(chosen) == asked


def test_auto_leaves_half_precision_to_pytorch(chosen):
    x, weight = tensors(1, 64, 64, 32, 32)
    assert conv3x3(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight).dtype == torch.bfloat16
        assert styled_conv3x3(x, weight, torch.ones(1, 64), Epilogue()).dtype == torch.bfloat16
    assert not chosen


def test_wrong_arguments_are_named():
    x, weight = tensors(1, 3, 4, 5, 5)
    for bad_x, bad_weight in (
        (x, weight[:, :2]), (x, weight[..., :2]), (x, weight.double()), (x[0], weight),
        (x.half(), weight.half()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="conv3x3: expected"):
            torch.ops.stylegan.conv3x3(bad_x, bad_weight, None)
    with pytest.raises(RuntimeError, match="style must have 1 \\* 3 elements"):
        styled_conv3x3(x, weight, torch.ones(2, 3), Epilogue(), "native")
    with pytest.raises(RuntimeError, match="bias must have 1 \\* 4 elements"):
        conv3x3(x, weight, torch.ones(3), impl="native")


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_scaled_maps_is_a_product_with_its_derivatives(impl):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(scaled_maps(x, factors, impl), x * factors[:, :, None, None])
    assert torch.autograd.gradcheck(lambda *args: scaled_maps(*args, impl), (x, factors))
    assert torch.autograd.gradgradcheck(lambda *args: scaled_maps(*args, impl), (x, factors))
    with torch.no_grad():
        expected = x * factors[:, :, None, None]
        torch.testing.assert_close(scaled_maps(x, factors, impl), expected)
