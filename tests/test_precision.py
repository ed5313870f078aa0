import copy

import pytest
import torch

from Model.discriminator import Discriminator
from Model.generator import Generator
from Model.layers import FusedLeakyReLU, StyledConv
from tests.test_training import config, images, make_trainer

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=list(HALVES))
def amp(request):
    return request.param


def test_half_precision_changes_images_and_logits_little_and_not_their_type(amp):
    generator = Generator(16, 16, 2, (12,) * 6).requires_grad_(False)
    discriminator = Discriminator(16, channels=(12,) * 3).requires_grad_(False)
    z = torch.randn(4, 16)
    dtypes = {}
    for network in (generator, discriminator):
        for name, module in network.named_modules():

            def note(module, inputs, output, name=name):
                dtypes.setdefault(name, output.dtype)

            module.register_forward_hook(note)
    with torch.autocast("cpu", HALVES[amp]):
        image = generator([z], randomize_noise=False)
        logits = discriminator(image)
    assert image.dtype == logits.dtype == torch.float32
    full = generator([z], randomize_noise=False)
    tolerance = {"bf16": 0.05, "fp16": 0.01}[amp]
    assert (image - full).abs().max() < tolerance * full.abs().max()
    assert (logits - discriminator(image)).abs().max() < 0.1
    half = {name for name, dtype in dtypes.items() if dtype == HALVES[amp]}
    assert {"conv1", "convs.2", "convs.3", "convs.1.conv2"} <= half
    full_precision = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {"style", "to_rgbs.1", "to_rgbs.1.upsample", "final_conv"} <= full_precision


def test_a_generator_synthesises_in_the_precision_it_is_told():
    generator = Generator(16, 16, 2, (20,) * 6).requires_grad_(False)
    w_plus = torch.randn(1, generator.n_latent, 16)
    full = generator.synthesis(w_plus, "fixed").image
    generator.precision = torch.bfloat16
    with torch.no_grad():
        made = generator.synthesis(w_plus, "fixed", features=True)
    assert made.image.dtype == torch.float32
    assert {x.dtype for x in made.features} == {torch.bfloat16}
    assert 0 < (made.image - full).abs().max() < 0.05 * full.abs().max()
    # Where gradients are recorded, nothing is rounded.
    torch.testing.assert_close(generator.synthesis(w_plus, "fixed").image, full, rtol=0, atol=0)
    assert generator.synthesis(w_plus, "fixed", features=True).features[0].dtype == torch.float32


def test_styles_and_demodulation_stay_in_float32(amp):
    conv = StyledConv(3, 4, 8).conv
    w = torch.randn(2, 8)
    with torch.autocast("cpu", HALVES[amp]):
        style = conv.style(w)
        gain = conv.demodulation(style)
    torch.testing.assert_close(style, conv.style(w), rtol=0, atol=0)
    torch.testing.assert_close(gain, conv.demodulation(style), rtol=0, atol=0)


def test_float16_activations_are_clamped():
    x = torch.tensor([[1e4, -1e5, 3.0]])
    activate = FusedLeakyReLU(3)
    assert activate(x.half()).tolist()[0][:2] == [256, -256]
    assert activate(x.bfloat16()).abs().max() > 1000


def test_only_the_gan_phases_run_in_half_precision(amp):
    trainer = make_trainer(config(amp=amp))
    seen = []
    trainer.discriminator.convs[0].register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    trainer.generator.conv1.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    half, full = HALVES[amp], torch.float32
    for phase, argument, expected in (
        (trainer._d_phase, images()[0], {half}),
        (trainer._r1_phase, images()[0], {full}),
        (trainer._g_phase, 4, {half}),
        (trainer._path_phase, 2, {full}),
    ):
        seen.clear()
        phase(argument)
        assert set(seen) == expected, phase.__name__
    assert {p.dtype for p in trainer.generator.parameters()} == {full}


def test_training_in_half_precision_follows_float32(amp):
    trainers = [make_trainer(config(amp=kind)) for kind in ("none", amp)]
    metrics = []
    for trainer in trainers:
        torch.manual_seed(3)
        metrics.append([trainer.iterate(real) for real in images(3)])
    for full, half in zip(*metrics, strict=True):
        for name, value in full.items():
            torch.testing.assert_close(half[name], value, rtol=0.05, atol=0.05, msg=name)


def test_an_overflow_leaves_out_the_step_and_lowers_the_scale():
    trainer = make_trainer(config(amp="fp16"))
    before = copy.deepcopy(trainer.generator.state_dict())
    weight = trainer.generator.to_rgb1.bias
    scale = trainer.scaler.get_scale()
    trainer._step(trainer.g_optim, "generator", (weight * 1e38).sum())
    assert trainer.scaler.get_scale() == scale / 2
    for name, value in trainer.generator.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_resumed_run_keeps_the_scale():
    trainer = make_trainer(config(amp="fp16"))
    trainer.iterate(images()[0])
    trainer.scaler.update(1024.0)
    resumed = make_trainer(config(amp="fp16"))
    resumed.load_state(trainer.state())
    assert resumed.scaler.get_scale() == 1024
    resumed.iterate(images()[0])
