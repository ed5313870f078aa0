"""Prepared synthesis in bfloat16 on AMX tiles, and what runs where it can not."""

import pytest
import torch
import torch.nn.functional as F

from Evaluation.generated import grey_levels_off
from Evaluation.sampling import draw_z, from_z
from Model import bundled, prepared
from Model.checkpoint import load_generator
from Model.generator import Generator
from Model.ops import make_kernel, upfirdn2d
from Model.ops.dispatch import tiles_available

TILES = pytest.mark.skipif(not tiles_available(), reason="this processor has no AMX tiles")
ROUNDING = 2**-8
"""Twice what rounding to bfloat16 moves a value by: the rest is room for float32 sums."""

# Planes hold 32 channels, tiles 16 outputs: below, at and above each.
CHANNELS = [(1, 1), (5, 16), (32, 17), (39, 39), (77, 32), (33, 77), (154, 5), (96, 64)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def whole(*shape):
    """Small whole numbers: bfloat16 holds them exactly, and what a blur makes of them."""
    return torch.randint(-8, 9, shape).float()


def pixels(planes, n, channels, height, width):
    """The images in planes, (N, C, H, W), and everything around them."""
    pitch = width + 1
    values = planes.float().clone()
    first = torch.arange(n)[:, None] * (height + 1) + torch.arange(height) + 2
    at = (first[:, :, None] * pitch + 1 + torch.arange(width)).flatten()
    images = values[:, at].unflatten(1, (n, height, width)).permute(1, 0, 4, 2, 3).flatten(1, 2)
    values[:, at] = 0
    border = values[:, pitch : ((n * (height + 1)) + 2) * pitch + 1]
    return images[:, :channels], (border, images[:, channels:])


class Case:
    """Operands of a layer that bfloat16 holds exactly."""

    def __init__(self, n, inputs, outputs, height, width, up, maps=1):
        self.n, self.outputs, self.up = n, outputs, up
        self.x, self.weight = whole(n, inputs, height, width), whole(outputs, inputs, 3, 3)
        self.size = (n, inputs, height, width)
        self.out = (n, outputs, height * (1 + up), width * (1 + up))
        self.gain = torch.rand(n, outputs) + 0.5
        self.bias, self.style = torch.randn(outputs), torch.randn(n, outputs)
        self.noise = torch.randn(maps, 1, *self.out[2:])
        self.kernel = make_kernel(gain=4.0)

    def run(self, style=True, rgb=(None, None, ())):
        taps, groups, filter = self.weight.flatten(2), [9], []
        if self.up:
            column, row = prepared.separated(self.kernel)
            taps, groups = prepared.blurred(8 * self.weight, column), [6, 3, 6, 3]
            filter = (row / 8).tolist()
        ops = torch.ops.stylegan
        x = ops.tiles_input(self.x, torch.ones(self.size[:2]))
        packed = ops.tiles_pack(taps, groups)
        arguments = self.gain, self.bias, self.noise, 0.5, 0.2, self.style if style else None
        return ops.tiles_conv3x3(x, self.size, packed, *arguments, filter, *rgb)

    def activations(self):
        """What follows from the definition, in double precision."""
        x, weight = self.x.double(), self.weight.double()
        if self.up:
            y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            y = upfirdn2d(y, self.kernel.double(), pad=(1, 1), impl="reference")
        else:
            y = F.conv2d(x, weight, padding=1)
        y = y * self.gain[:, :, None, None] + 0.5 * self.noise + self.bias[:, None, None]
        return F.leaky_relu(y, 0.2)


@TILES
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("up", [False, True])
def test_a_layer_is_exact_up_to_the_rounding_of_its_output(channels, up):
    for n, height, width, maps in ((1, 4, 4, 1), (3, 8, 8, 3), (2, 7, 40, 1), (1, 33, 16, 1)):
        case = Case(n, *channels, height, width, up, maps)
        actual, others = pixels(case.run(), *case.out)
        expected = case.activations() * case.style[:, :, None, None]
        # Sums of up to a thousand whole numbers leave float32 some digits before a difference.
        torch.testing.assert_close(actual.double(), expected, rtol=ROUNDING, atol=2e-3)
        assert all((part == 0).all() for part in others)


@TILES
def test_filters_are_turned_as_a_convolution_says():
    case = Case(2, 5, 20, 6, 9, True)
    case.kernel = torch.outer(torch.tensor([1.0, 2, -3, 8]), torch.tensor([2.0, 1, -1, 4]))
    expected = case.activations() * case.style[:, :, None, None]
    actual, _ = pixels(case.run(), *case.out)
    torch.testing.assert_close(actual.double(), expected, rtol=ROUNDING, atol=2e-3)


@TILES
@pytest.mark.parametrize("side", [8, 64])
def test_rgb_is_added_to_maps_without_the_style_of_the_next_layer(side):
    case = Case(2, 384, 40, side, side, False)
    case.style[0, 3] = 0  # which can not be divided by
    before, weight = torch.randn(2, 3, side, side), torch.randn(2, 3, 40)
    y = case.activations()
    expected = before + torch.einsum("nkc,nchw->nkhw", weight.double(), y)
    expected += torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    largest = torch.einsum("nkc,nchw->nkhw", weight.double().abs(), y.abs())
    for style in (True, False):
        rgb = before.clone()
        made = case.run(style, (rgb, weight, [1.0, 2.0, 3.0]))
        assert made.numel() > 0
        # Activations and weights are rounded.
        assert ((rgb - expected).abs() <= 2 * ROUNDING * largest + 1e-3).all()


@TILES
def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    case = Case(2, 384, 70, 64, 64, False)
    made = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            rgb = torch.zeros(2, 3, 64, 64)
            planes = case.run(rgb=(rgb, torch.ones(2, 3, 70), [0.0] * 3))
            made.append((pixels(planes, *case.out)[0], rgb))
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, made[0], strict=True))


def small(**kwargs):
    network = Generator(32, 16, 2, (39, 20, 33, 5, 16, 17, 1, 40), **kwargs)
    for layer in network.styled_convs:
        layer.noise.weight.fill_(0.3)
    return network.requires_grad_(False)


@TILES
@pytest.mark.parametrize("n", [1, 3])
def test_a_prepared_generator_makes_the_images_of_the_other(n):
    network = small()
    w_plus, noise = torch.randn(n, network.n_latent, 16), network.make_noise(n)
    full = network.synthesis(w_plus, noise).rgbs
    made = network.prepare().synthesis(w_plus, noise).rgbs
    assert network._prepared is not None
    for expected, actual in zip(full, made, strict=True):
        # Roundings of a layer are independent; their squares add up over the layers before.
        error = (actual - expected).square().mean().sqrt() / expected.std()
        assert 0 < error < ROUNDING * len(full) ** 0.5
        assert actual.dtype == torch.float32
    assert not torch.equal(*(network.synthesis(w_plus).image for _ in range(2)))  # fresh noise


@TILES
@pytest.mark.parametrize("file", [bundled.MODEL, bundled.COMPRESSED])
def test_grey_levels_off_on_the_bundled_models(file):
    network = load_generator(file)
    latents = from_z(network, draw_z(network, range(8), 0))
    network.precision = torch.bfloat16
    by_autocast, _ = grey_levels_off(network, latents)
    mean, most = grey_levels_off(network.prepare(), latents)
    assert mean < min(0.6, by_autocast)
    assert most < 32


def test_without_tiles_a_prepared_generator_is_one_in_bfloat16(monkeypatch):
    monkeypatch.setattr(prepared, "tiles_available", lambda: False)
    network = small().prepare()
    assert network._prepared is None
    w_plus = torch.randn(1, network.n_latent, 16)
    made = network.synthesis(w_plus, "fixed").image
    other = small()
    other.load_state_dict(network.state_dict())
    other.precision = torch.bfloat16
    torch.testing.assert_close(made, other.synthesis(w_plus, "fixed").image, rtol=0, atol=0)


def test_filters_that_are_no_product_and_other_types_are_not_prepared():
    assert prepared.separated(torch.eye(4)) is None
    assert prepared.separated(torch.zeros(4, 4)) is None
    assert prepared.separated(torch.ones(3, 3)) is None
    network = small()
    network.convs[0].conv.blur.kernel.copy_(torch.eye(4))
    assert network.prepare()._prepared is None
    assert small().double().prepare()._prepared is None
