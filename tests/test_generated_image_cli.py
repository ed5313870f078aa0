import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import get_edited_image
import get_generated_image
from Evaluation import settings as evaluation_settings
from Evaluation.projection import Projection, load_projection, save_projection
from Evaluation.settings import PrecisionSettings
from Model import bundled, checkpoint
from Model.face_parser import BiSeNet
from Model.generator import Generator
from tests.helpers import error_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with tiny generators, projections that belong to them, and a parser."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    for name, size, channels in (("full", 16, 8), ("small", 16, 4), ("other", 8, 8)):
        generator = Generator(size, 6, 2, (channels,) * (6 if size == 16 else 4))
        for layer in generator.styled_convs:
            layer.noise.weight.data.fill_(0.5)  # so that pictures depend on the noise
        checkpoint.save(folder / f"{name}.pt", {"g_ema": generator})
        w_plus, unknown = torch.randn(2, generator.n_latent, 6), torch.zeros(2)
        projection = Projection(w_plus, generator.make_noise(2), unknown, unknown)
        save_projection(folder / f"{name}.npz", projection, generator, f"{name}.pt", ["x", "y"])
    network = BiSeNet(19, width=4, stem_stride=1, input_size=32)
    network.train()(torch.randn(4, 3, 32, 32))
    checkpoint.save(folder / "parser.pt", {"parser": network, "config": network.config})
    return folder


def generate(files, *flags, models=("full", "small")):
    ckpt = [str(files / f"{name}.pt") for name in models]
    return get_generated_image.main(["--ckpt", *ckpt, "--frames", "4", *map(str, flags)])


def edit(files, *flags, models=("full", "small")):
    arguments = ["--ckpt", *(str(files / f"{name}.pt") for name in models)]
    arguments += ["--parser_ckpt", str(files / "parser.pt"), "--perceptual", "parser"]
    return get_edited_image.main([*arguments, "--frames", "4", *map(str, flags)])


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_pictures_and_walk(files, tmp_path, capsys):
    out = tmp_path / "new" / "faces.v2"
    assert generate(files, "--n_sample", 3, "--out", out, "--json", "--fps", 10) == 0
    written = [str(out) + ending for ending in (".png", ".gif")]
    line = last_json(capsys)
    assert line["figures"]["files"] == written
    costs = line["figures"]["models"]
    assert costs["full"]["macs"] > costs["small"]["macs"]
    assert line["settings"]["seed"] == 0

    picture, gif = pixels(written[0]), Image.open(written[1])
    assert picture.shape[0] == 2 * 128 + 8
    assert (gif.n_frames, gif.info["duration"]) == (4, 100)
    # The walk starts at the pictures; its palette of 128 colours is near.
    assert np.abs(pixels(written[1]) - picture).mean() < 8
    gif.seek(2)
    assert np.abs(np.asarray(gif.convert("RGB")) - picture).mean() > 8


def test_the_same_seed_and_any_number_of_latents_give_the_same_faces(files, tmp_path):
    pictures = {}
    for name, flags in {
        "four": ["--n_sample", 4],
        "two": ["--n_sample", 2],
        "seed": ["--n_sample", 2, "--seed", 1],
        "noise": ["--n_sample", 2, "--noise", "random"],
        "rows": ["--n_sample", 4, "--columns", 2],
    }.items():
        flags += ["--frames", 0, "--truncation", 1, "--scale", 1, "--out", tmp_path / name]
        assert generate(files, *flags) == 0
        pictures[name] = pixels(tmp_path / f"{name}.png")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}
    four, two, rows = (pictures[name] for name in ("four", "two", "rows"))
    margin = two.shape[1] - 36
    assert np.array_equal(four[:, : margin + 36], two)
    assert np.array_equal(rows[:16, margin:], two[:16, margin:])
    assert np.array_equal(rows[20:36, margin:], four[:16, margin + 40 :])
    assert not np.array_equal(pictures["seed"], two)
    assert not np.array_equal(pictures["noise"], two)


@pytest.mark.parametrize("noise", ["fixed", "random"])
def test_one_file_for_every_image(files, tmp_path, noise):
    flags = ["--n_sample", 2, "--noise", noise, "--scale", 1, "--frames", 0, "--files", 18]
    assert generate(files, *flags, "--out", tmp_path / "out") == 0
    names = [f"{i:06d}.png" for i in range(18)]
    for row, model in enumerate(("full", "small")):
        folder = tmp_path / "out_files" / model
        assert sorted(file.name for file in folder.iterdir()) == names
        grid = pixels(tmp_path / "out.png")[24 * row : 24 * row + 16]
        for i in range(2):
            shown = grid[:, grid.shape[1] - 36 + 20 * i :][:, :16]
            assert np.abs(pixels(folder / names[i]) - shown).max() <= 1


def test_pictures_of_two_calls_are_not_mixed(files, tmp_path, capsys):
    flags = ["--frames", 0, "--out", tmp_path / "out", "--files"]
    assert generate(files, *flags, 3) == 0
    assert generate(files, *flags, 3) == 0
    assert generate(files, *flags, 2) == 2
    assert "out_files/full holds 000002.png already; remove the folder" in capsys.readouterr().err


def test_truncation_goes_to_each_models_own_mean(files, tmp_path):
    flags = ["--n_sample", 3, "--frames", 0, "--scale", 1, "--truncation", 1e-6, "--out", tmp_path]
    assert generate(files, *flags) == 0
    picture = pixels(tmp_path / "generated.png")[:, -56:]
    for row in (picture[:16], picture[24:]):
        assert np.abs(row[:, :16] - row[:, 20:36]).max() <= 1
        assert np.abs(row[:, :16] - row[:, 40:]).max() <= 1
    assert np.abs(picture[:16] - picture[24:]).max() > 10


def test_a_mixture(files, tmp_path, capsys):
    flags = ["--a", "0,1", "--b", "2,3,4", "--layers", "0-3", "--scale", 1, "--json"]
    assert edit(files, *flags, "--out", tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["style_mixing.png"]
    captured = capsys.readouterr()
    assert "content-aware parser distance" in captured.err
    line = json.loads(captured.out)
    for distances in line["figures"]["models"].values():
        assert set(distances) == {"a_to_mixed", "b_to_mixed", "a_to_b"}
        assert all(value > 0 for value in distances.values())
    # Two models of 1 + 2 rows and 1 + 3 columns of 16 px.
    picture = pixels(tmp_path / "style_mixing.png")
    block = 16 + 12 + 2 * 16 + 4
    assert 0 < picture.shape[0] - (2 * block + 24) < 300  # the caption below
    corner = picture[:16, -(16 + 12 + 3 * 16 + 2 * 4) :][:, :16]
    assert (corner == 255).all()


def test_noise_crosses_over_with_the_styles(files, tmp_path, capsys):
    found = {}
    for name, flags in {"plain": [], "crossed": ["--mix_noise"]}.items():
        flags += ["--projection_a", files / "full.npz", "--projection_b", files / "full.npz"]
        out = ["--layers", "0-5", "--json", "--out", tmp_path / name]
        assert edit(files, *flags, *out, models=("full",)) == 0
        found[name] = last_json(capsys)["figures"]["models"]["full"]["b_to_mixed"]
    assert found["crossed"] == pytest.approx(0, abs=1e-5)
    assert found["plain"] > 1e-3
    assert edit(files, "--layers", "0-5", "--mix_noise", "--json", "--out", tmp_path) == 0
    for distances in last_json(capsys)["figures"]["models"].values():
        assert distances["b_to_mixed"] == pytest.approx(0, abs=1e-5)


def test_mixing_every_layer_gives_b_and_none_of_a(files, tmp_path, capsys):
    assert edit(files, "--layers", "0-5", "--out", tmp_path, "--json") == 0
    for distances in last_json(capsys)["figures"]["models"].values():
        assert distances["b_to_mixed"] == pytest.approx(0, abs=1e-5)
        assert distances["a_to_mixed"] == pytest.approx(distances["a_to_b"], rel=1e-4)


@pytest.mark.parametrize("space", ["w", "z"])
def test_a_morph(files, tmp_path, capsys, space):
    ends = ["--a", "0,1", "--b", "2,3", "--scale", 1]
    flags = ["--mode", "morphing", *ends, "--space", space, "--steps", 5, "--json"]
    assert edit(files, *flags, "--out", tmp_path / "m.png") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m.png", "m.gif"}
    for distances in last_json(capsys)["figures"]["models"].values():
        assert distances["nearer_end"] > 0
        assert 0 < distances["step"] <= distances["largest_step"]
    # The first column is A and the last is B: the sources of a mixture of the same faces.
    strip = pixels(tmp_path / "m.png")[:36, -(5 * 16 + 4 * 4) :]
    assert edit(files, *ends, "--out", tmp_path / "mixed") == 0
    block = pixels(tmp_path / "mixed.png")[:64, -(16 + 12 + 2 * 16 + 4) :]
    assert np.abs(strip[:, :16] - block[28:, :16]).max() <= 1
    assert np.abs(strip[:16, -16:] - block[:16, 28:44]).max() <= 1
    assert np.abs(strip[20:, -16:] - block[:16, 48:]).max() <= 1
    assert Image.open(tmp_path / "m.gif").n_frames == 4


@pytest.mark.parametrize("kind", ["principal", "modulation"])
def test_walks_along_directions(files, tmp_path, capsys, kind):
    flags = ["--mode", "directions", "--directions", kind, "--direction", "0,2", "--scale", 1]
    flags += ["--a", "1,3", "--steps", 3, "--strength", 1, "--frames", 4, "--json"]
    assert edit(files, *flags, "--out", tmp_path / "d") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"d.png", "d.gif"}
    for distances in last_json(capsys)["figures"]["models"].values():
        assert distances["to_ends"] > 0
        assert 0 < distances["step"] <= distances["largest_step"]
    # Of each model: a line of strengths, then for both directions a row for each face.
    picture = pixels(tmp_path / "d.png")
    block = 24 + 2 * (8 + 2 * 16 + 4)
    assert picture.shape[0] > 2 * block + 24  # a caption follows
    picture = picture[: 2 * block + 24]
    shown = picture[:, -(3 * 16 + 2 * 4) :]
    first = shown[32 : 32 + 36]
    second = shown[32 + 36 + 8 : 32 + 2 * 36 + 8]
    assert np.array_equal(first[:, 20:36], second[:, 20:36])  # in the middle nothing has moved
    assert np.abs(first[:, :16] - first[:, 40:]).max() > 1
    assert np.abs(first[:, :16] - second[:, :16]).max() > 1
    # The middle is what a mixture shows of these faces.
    assert edit(files, "--a", "1,3", "--b", "0", "--scale", 1, "--out", tmp_path / "mixed") == 0
    sources = pixels(tmp_path / "mixed.png")[28:64, -(16 + 12 + 16) :][:, :16]
    assert np.array_equal(first[:, 20:36], sources)


def test_projected_pictures_are_edited(files, tmp_path, capsys):
    projections = ["--projection_a", files / "full.npz", files / "small.npz"]
    assert edit(files, *projections, "--b", "0,1,2", "--scale", 1, "--out", tmp_path) == 0
    block = pixels(tmp_path / "style_mixing.png")[:64]
    generator = checkpoint.load_generator(files / "full.pt")
    stored = load_projection(files / "full.npz")
    with torch.no_grad():
        images = generator.synthesis(stored.w_plus, stored.noise).image
    expected = images[1].add(1).mul(127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    shown = block[48:, -(16 + 12 + 3 * 16 + 2 * 4) :][:, :16]
    assert np.abs(shown - expected).max() <= 1
    flags = ["--mode", "morphing", "--a", "1", "--b", "0"]
    assert edit(files, *projections, *flags, "--out", tmp_path) == 0

    def error(*more):
        return error_of(capsys, lambda: edit(files, *more, "--out", tmp_path / "no"))

    capsys.readouterr()
    assert "--a 2: the file has 0 to 1" in error(*projections, "--a", "2")
    assert "1 files for 2 checkpoints" in error("--projection_b", files / "full.npz")
    wrong = ["--projection_b", files / "full.npz", files / "other.npz"]
    assert "--projection_b" in (line := error(*wrong))
    assert "other.npz: made with other weights (those of other.pt)" in line
    flags = ["--mode", "morphing", "--space", "z"]
    assert "--space z: projected pictures have no z" in error(*projections, *flags)


def test_models_that_cannot_share_latents_and_bad_targets(files, tmp_path, capsys):
    line = error_of(capsys, lambda: generate(files, models=("full", "other")))
    assert "other.pt: 8 px and style_dim 6" in line
    assert "no such file" in error_of(capsys, lambda: generate(files, models=("nothing",)))
    line = error_of(capsys, lambda: generate(files, "--out", files / "full.pt" / "a"))
    assert "full.pt is no folder" in line


@pytest.mark.parametrize(
    ("script", "flags", "written"),
    [
        (get_generated_image, ["--frames", "2"], {"generated.png", "generated.gif"}),
        (get_edited_image, [], {"style_mixing.png"}),
    ],
)
def test_bundled_files_are_the_defaults(script, flags, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([*flags, "--info_print"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == written
    assert f"{bundled.MODEL.stem}: 64 px, 44,162,048 MACs" in capsys.readouterr().out


def test_half_precision_says_how_far_off_it_is(files, tmp_path, capsys):
    for precision in ("float32", "bf16"):
        out = tmp_path / precision
        assert generate(files, "--out", out, "--frames", 0, "--precision", precision, "--json") == 0
        printed, told = capsys.readouterr()
        figures = json.loads(printed)["figures"]
        assert ("grey_levels_off" in figures) == (precision == "bf16")
    mean, most = figures["grey_levels_off"]["small"]
    assert 0 < mean < most < 20
    assert f"small: bf16 is {mean:.2f} grey levels off float32 on average" in told
    assert np.abs(pixels(f"{tmp_path}/bf16.png") - pixels(f"{tmp_path}/float32.png")).max() < 20


@pytest.mark.parametrize("slow", [False, True])
def test_bf16_is_warned_of_once_where_the_processor_lacks_it(monkeypatch, slow):
    monkeypatch.setattr(evaluation_settings, "emulates_bfloat16", lambda: slow)
    evaluation_settings._warn_once.cache_clear()
    settings = PrecisionSettings(precision="bf16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            settings.load(bundled.COMPRESSED, torch.device("cpu"))
    told = [str(warning.message) for warning in caught]
    assert len(told) == slow
    assert all("has no bfloat16" in text for text in told)
