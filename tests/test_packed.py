"""Prepared synthesis in float32: layers on packed weights, and whole generators."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from Model import bundled, prepared
from Model.checkpoint import load_generator
from Model.ops import Epilogue, dispatch, styled_conv3x3, styled_upsampling_conv3x3
from tests.test_convolution import CHANNELS, assert_rounding, layer, tensors, upsampled
from tests.test_tiles import TILES, small

if (reason := dispatch.why_not("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

NO_RGB = None, None, (), False
BIAS = [1.0, 2.0, 3.0]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def styled(n, inputs, outputs, height, width, maps=1):
    """Operands of a layer that keeps the size."""
    x, weight = tensors(n, inputs, outputs, height, width)
    epilogue = Epilogue(
        bias=torch.randn(outputs),
        noise=torch.randn(maps, 1, height, width),
        noise_strength=torch.randn(1),
        gain=torch.rand(n, outputs) + 0.5,
    )
    return x, weight, torch.rand(n, inputs) + 0.5, epilogue


def run(x, weight, style, epilogue, rgb=NO_RGB):
    packed = torch.ops.stylegan.packed_weights(weight, False)
    return torch.ops.stylegan.packed_conv3x3(x, packed, len(weight), style, *epilogue, *rgb)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_layer_is_that_of_weights_transformed_in_every_call(channels):
    for n, height, width, maps in ((1, 4, 4, 1), (3, 7, 9, 3), (2, 16, 13, 1)):
        case = styled(n, *channels, height, width, maps)
        y = run(*case)
        torch.testing.assert_close(y, styled_conv3x3(*case, "native"), rtol=0, atol=0)
        doubles = (t.to(torch.float64) for t in case)
        expected = styled_conv3x3(*doubles, "reference")
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", CHANNELS)
def test_an_upsampling_layer_is_that_of_weights_packed_in_every_call(channels):
    for n, height, width in ((1, 4, 4), (3, 5, 7), (1, 3, 300)):
        x, weight, style, kernel, epilogue = case = layer(n, *channels, height, width)
        packed = torch.ops.stylegan.packed_weights(weight, True)
        run_layer = torch.ops.stylegan.packed_up_conv3x3
        y = run_layer(x, packed, len(weight), style, kernel, *epilogue)
        native = styled_upsampling_conv3x3(*case, impl="native")
        torch.testing.assert_close(y, native, rtol=0, atol=0)
        assert_rounding(y, upsampled(*case))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("alone", [False, True])
def test_rgb_is_added_to_maps(channels, alone):
    case = styled(2, *channels, 9, 10)
    before, weight = torch.randn(2, 3, 9, 10), torch.randn(2, 3, channels[1])
    rgb = before.clone()
    y = run(*case, (rgb, weight, BIAS, alone))
    whole = run(*case)
    expected = before.double() + torch.einsum("nkc,nchw->nkhw", weight.double(), whole.double())
    expected += torch.tensor(BIAS)[:, None, None]
    torch.testing.assert_close(rgb.double(), expected, rtol=1e-5, atol=1e-4)
    assert y.shape == (0, *whole.shape[1:]) if alone else torch.equal(y, whole)


@pytest.mark.parametrize("size", [12, 40])  # all threads at one chunk; each at its own
def test_results_do_not_depend_on_the_number_of_threads(size):
    case, threads, made = styled(2, 40, 40, size, size), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            rgb = torch.zeros(2, 3, size, size)
            made.append((run(*case, (rgb, torch.ones(2, 3, 40), BIAS, False)), rgb))
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, made[0], strict=True))


def test_operands_that_do_not_fit_are_refused():
    x, weight, style, epilogue = case = styled(1, 5, 7, 8, 8)
    run_layer = torch.ops.stylegan.packed_conv3x3
    with pytest.raises(RuntimeError, match="packed weights"):
        run_layer(x, weight, 7, style, *epilogue, *NO_RGB)
    with pytest.raises(RuntimeError, match="RGB maps"):
        run(*case, (torch.zeros(1, 3, 8, 9), torch.zeros(1, 3, 7), BIAS, False))
    with pytest.raises(RuntimeError, match="floats"):
        torch.ops.stylegan.packed_weights(weight.double(), False)


def compare(network, w_plus, noise, tolerance):
    """Compare all RGB sums of a prepared generator with those of PyTorch's operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEGAN_OPS", "reference")
        expected = network.synthesis(w_plus, noise).rgbs
    made = network.prepare("float32").synthesis(w_plus, noise).rgbs
    assert network._prepared is not None
    assert network.precision is None
    for actual, other in zip(made, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=0, atol=tolerance * float(other.std()))


@pytest.mark.parametrize("n", [1, 3])
def test_a_prepared_generator_makes_the_images_of_the_other(n):
    network = small()
    compare(network, torch.randn(n, network.n_latent, 16), network.make_noise(n), 1e-5)
    w_plus = torch.randn(1, network.n_latent, 16)
    assert not torch.equal(*(network.synthesis(w_plus).image for _ in range(2)))  # fresh noise


@pytest.mark.parametrize("file", [bundled.MODEL, bundled.COMPRESSED])
def test_the_bundled_models_make_the_same_images(file):
    network = load_generator(file).requires_grad_(False)
    w_plus = network.w_plus([torch.randn(2, network.style_dim)])
    compare(network, w_plus, "fixed", 1e-4)  # largest of 24576 values


PRECISIONS = ["float32", pytest.param("bf16", marks=TILES)]


def change_in_place(network):
    network.convs[0].conv.weight.mul_(2)


def change_storage(network):
    network.to_rgbs[0].bias.data = torch.ones(1, 3, 1, 1)


def replace(network):
    network.conv1.activate.bias = nn.Parameter(torch.ones(20))


def load(network):
    network.load_state_dict(small().state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", [change_in_place, change_storage, replace, load])
def test_changed_parameters_are_refused_until_prepared_again(change, precision):
    network = small().prepare(precision)
    w_plus = torch.randn(1, network.n_latent, 16)
    network.synthesis(w_plus)
    change(network)
    with pytest.raises(prepared.StaleError, match="prepare"):
        network.synthesis(w_plus)
    network.prepare(precision).synthesis(w_plus)
    compare(network.prepare(None), w_plus, "fixed", 1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_features_and_copies_take_the_way_without_packed_weights(monkeypatch, precision):
    network = small().prepare(precision)
    w_plus = torch.randn(1, network.n_latent, 16)
    assert copy.deepcopy(network)._prepared is None

    def fail(*args):
        raise AssertionError("packed weights are used")

    monkeypatch.setattr(type(network._prepared), "__call__", fail)
    with pytest.raises(AssertionError, match="packed weights are used"):
        network.synthesis(w_plus)
    assert len(network.synthesis(w_plus, features=True).features) == 7
    with torch.enable_grad():
        network.synthesis(w_plus.requires_grad_()).image.sum().backward()
    assert w_plus.grad is not None
    network.synthesis(w_plus[:0].detach())
    monkeypatch.setenv("STYLEGAN_OPS", "reference")
    network.synthesis(w_plus.detach())
    assert small().prepare(precision)._prepared is None


def test_other_types_and_filters_are_not_prepared():
    assert small().double().prepare("float32")._prepared is None
    heter = small().like(small().channels, second_kernel=1)
    assert heter.prepare("float32")._prepared is heter.prepare("bf16")._prepared is None
    network = small()
    network.convs[0].conv.blur.kernel = F.pad(network.convs[0].conv.blur.kernel, (0, 1, 0, 1))
    assert network.prepare("float32")._prepared is None
    with pytest.raises(KeyError):
        network.prepare("fp8")
