import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from Compression.content import ContentParser
from Compression.optimisation import divide
from Evaluation.distances import ParserDistance
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator
from Model.layers import FusedLeakyReLU, StyledConv
from tests.test_optimisation import big_trainer
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


def test_arguments_by_name_are_widened_too():
    generator = Generator(8, 8, 2, (4,) * 4)
    z = torch.randn(2, 8).bfloat16()
    expected = generator.mapping(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(generator.mapping(z=z), expected, rtol=0, atol=0)


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


def test_all_phases_but_path_length_run_in_half_precision(amp):
    trainer = make_trainer(config(amp=amp))
    seen = []
    trainer.discriminator.convs[0].register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    trainer.generator.conv1.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    half, full = HALVES[amp], torch.float32
    for phase, argument, expected in (
        (trainer._d_phase, images()[0], {half}),
        (trainer._r1_phase, images()[0], {half}),
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
        trainer.scaler.value.fill_(256)  # where it settles here; more, and R1 overflows at first
        torch.manual_seed(3)
        metrics.append([trainer.iterate(real) for real in images(3)])
    for full, half in zip(*metrics, strict=True):
        for name, value in full.items():
            torch.testing.assert_close(half[name], value, rtol=0.05, atol=0.05, msg=name)


def test_an_overflow_leaves_out_the_step_and_lowers_the_scale():
    trainer = make_trainer(config(amp="fp16"))
    before = copy.deepcopy(trainer.generator.state_dict())
    weight = trainer.generator.to_rgb1.bias
    scale = trainer.scaler.value.item()
    found = trainer._step(trainer._g, "generator", divide(4, 0), lambda part: (weight * 1e38).sum())
    assert found["amp_skipped_generator"] == 1
    assert trainer.scaler.value == scale / 2
    for name, value in trainer.generator.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_resumed_run_keeps_the_scale():
    trainer = make_trainer(config(amp="fp16"))
    trainer.iterate(images()[0])
    trainer.scaler.value.fill_(1024.0)
    resumed = make_trainer(config(amp="fp16"))
    resumed.load_state(trainer.state())
    assert resumed.scaler.value == 1024
    resumed.iterate(images()[0])


def test_float16_sums_do_not_overflow_before_demodulation():
    torch.manual_seed(0)
    conv = StyledConv(64, 4, 8)
    conv.conv.weight.data *= 100  # which demodulation cancels
    conv.conv.modulation.bias.data[:] = 50
    x, w = torch.full((2, 64, 4, 4), 200.0), torch.randn(2, 8)
    conv.conv.weight.data.abs_()
    noise = torch.zeros(1, 1, 4, 4)
    full = conv(x, w, noise)
    with torch.autocast("cpu", torch.float16):
        half = conv(x, w, noise)
        weight, style, _ = conv.conv.factors(w)
    # As the largest activations are 256, the largest possible sum is this one.
    assert (256 * weight.abs().sum((1, 2, 3)) * style.abs().max()).max() < 65504
    assert half.dtype == torch.float16
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), full.clamp(-256, 256), rtol=0.01, atol=0.5)


def test_factors_cancel_out_in_float32():
    torch.manual_seed(0)
    conv = StyledConv(6, 4, 8).conv
    w = torch.randn(2, 8)
    weight, style, gain = conv.factors(w)
    with torch.autocast("cpu", torch.float16):
        others = conv.factors(w)
    assert {t.dtype for t in others} == {torch.float32}

    def product(weight, style, gain):
        return weight * style[:, None, :, None, None] * gain[:, :, None, None, None]

    torch.testing.assert_close(product(*others), product(weight, style, gain))


def test_perceptual_and_parser_networks_run_in_half_precision_and_answer_in_float32(amp):
    torch.manual_seed(0)
    parser = BiSeNet(width=4, stem_stride=1, input_size=32)
    seen = []
    parser.cp.resnet.layer1.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    a, b = torch.randn(2, 2, 3, 32, 32).clamp(-1, 1)
    full, half = ParserDistance(parser), ParserDistance(parser, HALVES[amp])
    torch.testing.assert_close(half(a, b), full(a, b), rtol=0.1, atol=1e-3)
    assert half(a, b).dtype == torch.float32
    assert HALVES[amp] in seen
    content = ContentParser(parser)
    with torch.autocast("cpu", HALVES[amp]):
        mask = content(a)
    assert mask.dtype == torch.float32
    assert (mask == content(a)).float().mean() > 0.97


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_convolutions_of_a_phase_have_one_layout(layout, monkeypatch):
    monkeypatch.setattr("Model.layers.preferred_layout", lambda kind, half: layout)
    monkeypatch.setenv("STYLEGAN_OPS", "reference")
    trainer = big_trainer(0)
    trainer.discriminator.requires_grad_(True)
    other = {torch.contiguous_format: torch.channels_last}.get(layout, torch.contiguous_format)

    class Layouts(TorchDispatchMode):
        wrong = total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == "aten::convolution":
                x = args[0]
                # The RGB sums and the discriminator's last map stay in float32, and so in planes.
                self.total += x.shape[1] > 3 and x.shape[2] > 4
                if x.shape[1] > 3 and x.shape[2] > 4 and x.is_contiguous(memory_format=other):
                    self.wrong += not x.is_contiguous(memory_format=layout)
            return function(*args, **(kwargs or {}))

    with Layouts() as layouts:
        trainer._d_phase(torch.randn(4, 3, 16, 16))
        trainer._r1_phase(torch.randn(4, 3, 16, 16))
        trainer.discriminator.requires_grad_(False)
        trainer._g_phase(4)
        trainer._path_phase(2)
    assert layouts.total > 50
    assert layouts.wrong == 0
