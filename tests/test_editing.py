import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from Evaluation import editing, sampling
from Evaluation.distances import within_content
from Evaluation.sampling import Latents
from Model.generator import Generator
from Util.animation import save_gif
from Util.pictures import captioned, framed, rescale


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    generator = Generator(8, 6, 2, (5, 5, 4, 4)).eval().requires_grad_(False)
    for layer in generator.styled_convs:
        layer.noise.weight.fill_(0.5)  # so that pictures depend on the noise
    return generator


def drawn(generator, n, seed):
    """Faces with layer noise of their own."""
    noise = sampling.draw_noise(generator, range(n), seed)
    return sampling.from_z(generator, sampling.draw_z(generator, range(n), seed), noise=noise)


def l1(a, b):
    return (a - b).abs().mean(dim=(1, 2, 3))


def test_the_walk_is_a_circle_that_starts_and_ends_at_its_first_latent():
    a, b = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    walk = torch.cat([editing.circle(a, b, k / 8) for k in range(9)])
    assert_close(walk[[0, 2, 4, 8]], torch.cat([a, b, -a, a]), atol=1e-6, rtol=0)
    assert_close(walk.norm(dim=1), torch.ones(9))
    assert_close(walk.diff(dim=0).norm(dim=1), torch.full((8,), 2 * math.sin(math.pi / 8)))


def test_spherical_interpolation_follows_the_arc():
    a, b = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    for t in (0.0, 0.25, 1.0):
        angle = t * math.pi / 2
        arc = [2 * math.cos(angle), 2 * math.sin(angle)]
        line = [1 + 2 * t, 1 + 2 * t]  # the second pair is parallel
        assert_close(editing.spherical(a, b, t), torch.tensor([arc, line]), atol=1e-4, rtol=1e-4)


def test_latents_map_and_truncate_as_the_generator_does(generator):
    z, centre = sampling.draw_z(generator, range(3), 0), sampling.mean_latent(generator, 0, 64)
    latents = sampling.from_z(generator, z, 0.6, centre)
    expected = generator([z], truncation=0.6, truncation_latent=centre, randomize_noise=False)
    assert_close(sampling.render(generator, latents), expected)
    with pytest.raises(ValueError, match="needs its centre"):
        sampling.from_z(generator, z, 0.6)


def test_the_batch_does_not_change_pictures(generator):
    latents = drawn(generator, 5, 0)
    whole = sampling.render(generator, latents)
    assert_close(sampling.render(generator, latents, batch=2), whole)
    assert_close(sampling.render(generator, latents[[3, 1]]), whole[[3, 1]])


def test_a_morph_has_its_ends_and_goes_straight_in_w(generator):
    a, b = drawn(generator, 2, 0), drawn(generator, 2, 1)
    for t, end in ((0.0, a), (1.0, b)):
        pictures = sampling.render(generator, editing.morph(a, b, t))
        assert_close(pictures, sampling.render(generator, end), atol=1e-5, rtol=1e-5)
    assert_close(editing.morph(a, b, 0.25).w_plus, 0.75 * a.w_plus + 0.25 * b.w_plus)


def test_a_morph_keeps_the_strength_of_the_noise(generator):
    a, b = drawn(generator, 1, 0), drawn(generator, 1, 1)
    middle = editing.morph(a, b, 0.5).noise[-1].std().item()
    assert middle == pytest.approx(1, abs=0.2)  # a straight line would have 0.7
    stored = Latents(b.w_plus, generator.fixed_noise)
    for morphed, noise in zip(
        editing.morph(stored, stored, 0.3).noise, generator.fixed_noise, strict=True
    ):
        assert_close(morphed, noise)


def test_mixing_takes_layers_from_b_and_the_rest_from_a(generator):
    a, b = drawn(generator, 2, 0), drawn(generator, 3, 1)
    before = a.w_plus.clone()
    mixed = editing.mix(a, b, range(1, 3))
    assert len(mixed) == 6
    for i in range(2):
        for j in range(3):
            w_plus = mixed.w_plus[3 * i + j]
            assert_close(w_plus[1:3], b.w_plus[j, 1:3])
            assert_close(w_plus[[0, 3]], a.w_plus[i, [0, 3]])
            assert_close(mixed.noise[2][3 * i + j], a.noise[2][i])
    assert_close(a.w_plus, before, rtol=0, atol=0)
    crossed = editing.mix(a, b, range(1, 4), noise=True)  # layer 3 is a ToRGB
    for layer, maps in enumerate(crossed.noise):
        assert_close(maps[4], (a if layer == 0 else b).noise[layer][1])


@pytest.mark.parametrize(
    ("text", "n_latent", "layers"),
    [
        ("coarse", 10, range(4)),
        ("middle", 10, range(4, 8)),
        ("fine", 10, range(8, 10)),
        ("fine", 18, range(8, 18)),
        ("2-5", 10, range(2, 6)),
        ("9", 10, range(9, 10)),
    ],
)
def test_layers_by_name_and_number(text, n_latent, layers):
    assert editing.style_layers(text, n_latent) == layers


@pytest.mark.parametrize("text", ["fine", "middle", "0-4", "3-2", "-1", "1-", "x", "", "1-2-3"])
def test_layers_that_a_model_of_four_has_not(text):
    with pytest.raises(ValueError, match="layers 0-3"):
        editing.style_layers(text, 4)


def constant(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_mixing_distances_by_hand():
    a, b = constant(0.0, 1.0), constant(0.5, 2.0)
    mixed = constant(0.1, 0.2, 1.3, 1.4)  # a0 with b0, a0 with b1, a1 with b0, a1 with b1
    assert editing.mixing_distances(a, b, mixed, l1) == pytest.approx(
        {
            "a_to_mixed": (0.1 + 0.2 + 0.3 + 0.4) / 4,
            "b_to_mixed": (0.4 + 1.8 + 0.8 + 0.6) / 4,
            "a_to_b": (0.5 + 2.0 + 0.5 + 1.0) / 4,
        }
    )


def test_morphing_distances_by_hand():
    frames = [constant(*pair) for pair in ((0.0, 0.0), (0.1, 0.5), (0.6, 0.5), (1.0, 2.0))]
    assert editing.morphing_distances(frames, l1) == pytest.approx(
        {
            "nearer_end": (0.1 + 0.4 + 0.5 + 0.5) / 4,
            "step": (0.1 + 0.5 + 0.4 + 0.5 + 0.0 + 1.5) / 6,
            "largest_step": (0.5 + 1.5) / 2,
            "a_to_b": (1.0 + 2.0) / 2,
        }
    )


def test_pictures_without_content_are_left_out_of_the_means():
    known = within_content(l1)
    a, b = constant(0.0, 1.0), constant(0.5, 2.0)
    mixed = constant(0.1, 0.2, 1.3, 0.0)
    assert editing.mixing_distances(a, b, mixed, known) == pytest.approx(
        {"a_to_mixed": 0.3, "b_to_mixed": (0.4 + 1.8 + 0.8) / 3, "a_to_b": (0.5 + 1.0) / 2}
    )
    frames = [constant(*pair) for pair in ((0.2, 0.0), (0.3, 0.5), (0.8, 0.5), (1.2, 2.0))]
    assert editing.morphing_distances(frames, known) == pytest.approx(
        {
            "nearer_end": (0.1 + 0.4) / 2,
            "step": (0.1 + 0.5 + 0.4 + 0.0 + 1.5) / 5,
            "largest_step": 0.5,
            "a_to_b": 1.0,
        }
    )
    nowhere = editing.mixing_distances(constant(0.0), constant(1.0), constant(1.0), known)
    assert math.isnan(nowhere["a_to_b"])
    assert nowhere["b_to_mixed"] == 0


def test_an_animation_has_all_frames_one_palette_and_pure_white(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (12, 10, 3), dtype=np.uint8) for _ in range(5)]
    for frame in frames:
        frame[:3], frame[3:5], frame[5:7], frame[7] = 255, 0, 251, 4
    save_gif(tmp_path / "new" / "a.gif", frames, fps=20, colours=16)
    gif = Image.open(tmp_path / "new" / "a.gif")
    assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (5, 50, 0)
    colours = set()
    for k, frame in enumerate(frames):
        gif.seek(k)
        pixels = np.asarray(gif.convert("RGB"))
        assert (pixels[:3] == 255).all()
        assert (pixels[3:5] == 0).all()
        assert np.abs(pixels.astype(int) - frame).mean() < 40  # 85 for unrelated noise
        colours |= {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
    assert len(colours) <= 16


def test_a_failed_animation_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(image, file, *args, **kwargs):
        file.write_text("half a file")
        raise OSError("disk full")

    (tmp_path / "a.gif").write_text("old")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_gif(tmp_path / "a.gif", [np.zeros((4, 4, 3), np.uint8)] * 2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_rescaling_repeats_or_averages():
    images = torch.arange(4.0).view(1, 1, 2, 2)
    assert_close(rescale(images, 2)[0, 0, :, 0], torch.tensor([0.0, 0.0, 2.0, 2.0]))
    assert_close(rescale(rescale(images, 3), 1 / 3), images)
    assert rescale(images, 0.5).item() == 1.5


def test_captions_have_the_room_they_need():
    block = np.zeros((40, 20, 3), np.uint8)
    narrow, wide = captioned({"a": block}), captioned({"a much longer name": block, "b": block})
    assert narrow.shape[0] == 40
    assert wide.shape[0] == 84
    for picture in (narrow, wide):
        margin = picture[:, :-20]
        assert (picture[:40, -20:] == 0).all()
        assert (margin[:, :4] == 255).all()
        assert (margin[:, -4:] == 255).all()
        assert (margin < 128).any()
    assert wide.shape[1] > narrow.shape[1] + 50


def test_a_frame_of_sources():
    left, top, inside = (
        np.full(shape, value, np.uint8)
        for shape, value in (((4, 2, 3), 10), ((3, 5, 3), 20), ((4, 5, 3), 30))
    )
    picture = framed(left, top, inside, gap=1)
    np.testing.assert_array_equal(picture[:, 0, 0], [255] * 4 + [10] * 4)
    np.testing.assert_array_equal(picture[0, :, 0], [255] * 3 + [20] * 5)
    np.testing.assert_array_equal(picture[-1, :, 0], [10] * 2 + [255] + [30] * 5)
