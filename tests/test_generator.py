import pytest
import torch
import torch.nn.functional as F

from Model.generator import Generator
from Model.layers import ModulatedConv2d, StyledConv, ToRGB
from Model.ops import make_kernel, upfirdn2d
from tests.golden_fill import assert_golden


def tensors(arrays, *names):
    return [torch.as_tensor(arrays[name]) for name in names]


def test_images_equal_the_original(golden):
    generator, arrays = golden
    z1, z2, mean, w_plus = tensors(arrays, "z1", "z2", "mean_latent", "w_plus")
    assert_golden(generator.mapping(z1), arrays, "w1")
    assert_golden(generator([z1], randomize_noise=False), arrays, "image")
    mixed = generator([z1, z2], inject_index=3, randomize_noise=False)
    assert_golden(mixed, arrays, "image_mixed")
    truncated = generator([z1], truncation=0.7, truncation_latent=mean, randomize_noise=False)
    assert_golden(truncated, arrays, "image_truncated")
    from_w = generator([w_plus], input_is_latent=True, randomize_noise=False)
    assert_golden(from_w, arrays, "image_w_plus")
    noise = tensors(arrays, *(f"noise_{i}" for i in range(generator.n_latent - 1)))
    assert_golden(generator([z1], noise=noise), arrays, "image_explicit_noise")


def test_running_rgb_sums_equal_the_original(golden):
    generator, arrays = golden
    made = generator.synthesis(generator.w_plus(tensors(arrays, "z1")), "fixed")
    for i, rgb in enumerate(made.rgbs):
        assert_golden(rgb, arrays, f"rgb_{i}")


def weight_modulation(conv: ModulatedConv2d, x, w):
    """The textbook formulation: one modulated weight per sample, grouped convolution."""
    n, channels = x.shape[:2]
    style = conv.modulation(w)
    weight = conv.weight * conv.scale * style[:, None, :, None, None]
    if conv.demodulate:
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    grouped = x.reshape(1, n * channels, *x.shape[2:])
    if conv.upsample:
        weight = weight.transpose(1, 2).flatten(0, 1)
        y = F.conv_transpose2d(grouped, weight, stride=2, groups=n)
        y = upfirdn2d(y, make_kernel(gain=4.0), pad=(1, 1))
    else:
        y = F.conv2d(grouped, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


@pytest.mark.parametrize(("upsample", "side"), [(False, 3), (True, 3), (False, 1)])
def test_modulating_activations_equals_modulating_weights(upsample, side):
    x, w = torch.randn(3, 5, 8, 8), torch.randn(3, 7)
    layer = StyledConv(5, 4, 7, upsample, side)
    layer.noise.weight.data.fill_(0.3)
    layer.activate.bias.data.normal_()
    y = weight_modulation(layer.conv, x, w)
    noise = torch.randn(3, 1, *y.shape[2:])
    expected = F.leaky_relu(y + 0.3 * noise + layer.activate.bias[:, None, None], 0.2) * 2**0.5
    torch.testing.assert_close(layer(x, w, noise), expected, rtol=1e-4, atol=1e-5)
    to_rgb = ToRGB(5, 7, upsample=False)
    torch.testing.assert_close(to_rgb(x, w), weight_modulation(to_rgb.conv, x, w))


def test_full_size_channels():
    with torch.device("meta"):
        assert Generator(256).channels == (512,) * 10 + (256, 256, 128, 128)
        assert Generator(1024).channels[-4:] == (64, 64, 32, 32)
        assert Generator(256, channel_multiplier=1).channels[-4:] == (128, 128, 64, 64)


def small() -> Generator:
    generator = Generator(16, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4, 3, 3))
    for layer in generator.styled_convs:
        layer.noise.weight.data.fill_(0.5)
    return generator.requires_grad_(False)


def test_layer_noise_is_fresh_or_fixed_as_asked():
    generator, z = small(), torch.randn(2, 8)
    assert not torch.equal(generator([z]), generator([z]))
    fixed = generator([z], randomize_noise=False)
    torch.testing.assert_close(fixed, generator([z], randomize_noise=False), rtol=0, atol=0)
    made = generator.synthesis(generator.w_plus([z]), "fixed")
    torch.testing.assert_close(fixed, made.image, rtol=0, atol=0)
    twins = generator([z[:1].expand(2, -1)])  # fresh noise differs within a batch too
    assert not torch.equal(twins[0], twins[1])


def test_features_are_kept_where_asked_for():
    generator = small()
    w_plus = torch.randn(2, 6, 8)
    made = generator.synthesis(w_plus, "fixed", features=True)
    assert tuple(x.shape[1] for x in made.features) == generator.channels[1:]
    weight = generator._modulation(w_plus)[1][-1]
    last = generator.to_rgbs[-1](made.features[-1], w_plus[:, -1], made.rgbs[-2], weight)
    torch.testing.assert_close(last, made.image, rtol=0, atol=0)
    assert not generator.synthesis(w_plus, "fixed").features


def test_style_mixing_takes_the_second_latent_from_the_injected_layer_on():
    generator = small()
    a, b = torch.randn(2, 1, 8)
    w_plus = generator.w_plus([a, b], inject_index=2, input_is_latent=True)
    torch.testing.assert_close(w_plus[0, :2], a.expand(2, -1))
    torch.testing.assert_close(w_plus[0, 2:], b.expand(4, -1))


def test_a_network_made_in_inference_mode_can_be_prepared():
    with torch.inference_mode():
        generator, w = small().prepare("float32").freeze(), torch.randn(1, 8)
        made = generator([w], input_is_latent=True, randomize_noise=False)
        expected = generator.prepare(None)([w], input_is_latent=True, randomize_noise=False)
    torch.testing.assert_close(made, expected)


def test_truncation_above_one_moves_away_from_the_centre():
    generator, centre = small(), torch.randn(1, 8)
    w = torch.randn(2, 8)
    how = {"input_is_latent": True, "truncation": 1.5, "truncation_latent": centre}
    expected = (centre + 1.5 * (w - centre))[:, None].expand(-1, generator.n_latent, -1)
    torch.testing.assert_close(generator.w_plus([w], **how), expected)


@pytest.mark.parametrize("size", [0, 4, 48, -8])
def test_sizes_other_than_powers_of_two_are_refused(size):
    with pytest.raises(ValueError, match="power of two"):
        Generator(size)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="6 positive channel counts"):
        Generator(16, channels=(4, 4, 4))
    generator, z = small(), torch.randn(2, 8)
    for psi in (0.5, 1.5):
        with pytest.raises(ValueError, match="truncation_latent"):
            generator([z], truncation=psi)
    with pytest.raises(RuntimeError, match=r"[Ss]ize"):
        generator.w_plus([torch.randn(3, 8), torch.randn(1, 8)], inject_index=2)
    with pytest.raises(ValueError, match="5 noise maps"):
        generator([z], noise=generator.make_noise()[:3])


def test_latents_that_do_not_fit_are_refused():
    network = Generator(16, 8, 2, (4,) * 6)
    with pytest.raises(ValueError, match=r"expected w\+ \(N, 6, 8\), got \(1, 8, 8\)"):
        network.synthesis(torch.randn(1, 8, 8))
    z = [torch.randn(1, 8), torch.randn(1, 8)]
    for index in (-1, 7):
        with pytest.raises(ValueError, match=f"inject_index {index} is not in 0 to 6"):
            network.w_plus(z, inject_index=index)
    with pytest.raises(ValueError, match="two styles are z or w"):
        network.w_plus([torch.randn(1, 6, 8), z[0]], input_is_latent=True)
