import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import get_projected_image
from Evaluation import distances, projecting, sampling
from Evaluation.comparison import fidelity, halved, psnr, wrapped_psnr
from Evaluation.distances import ParserDistance
from Evaluation.lbfgs import minimise
from Evaluation.projecting import ProjectionSettings
from Evaluation.projection import load_projection, project, save_projection
from Model import bundled, checkpoint
from Model.face_parser import BiSeNet
from Model.generator import Generator


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rosenbrock(x, rows):
    return (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2


@pytest.mark.parametrize("step", [0.5, 1.0, 1e3])
def test_lbfgs_finds_minima_whatever_its_first_step(double, step):
    start = torch.tensor([[-1.2, 1.0], [2.0, 2.0], [0.0, -1.0], [1.0, 1.0]])
    x, value, evaluations = minimise(rosenbrock, start, 80, step)
    torch.testing.assert_close(x, torch.ones(4, 2))
    torch.testing.assert_close(value, torch.zeros(4))
    assert evaluations[3] == 1  # it started at its minimum


def test_lbfgs_takes_about_one_evaluation_an_iteration(double):
    matrix = torch.diag(torch.logspace(-1, 1, 20))
    start = torch.randn(3, 20)
    x, _, evaluations = minimise(lambda x, _: ((x @ matrix) * x).sum(dim=1), start, 60)
    assert x.abs().max() < 1e-3 * start.abs().max()
    assert evaluations.max() < 75


def test_lbfgs_turns_back_from_values_that_are_not_finite(double):
    start = torch.tensor([[0.01], [20.0]])
    x, _, _ = minimise(lambda x, _: (x - x.log()).sum(dim=1), start, 30, step=100.0)
    torch.testing.assert_close(x, torch.ones(2, 1))


def test_lbfgs_problems_do_not_touch_each_other(double):
    targets = torch.randn(4, 6)

    def objective(numbers):
        def value(x, rows):
            error = x - targets[numbers[rows]]
            return (error**4).sum(dim=1) + (error[:, :3] * error[:, 3:]).sum(dim=1).square()

        return value

    together = minimise(objective(torch.arange(4)), torch.zeros(4, 6), 15)
    for i in range(4):
        alone = minimise(objective(torch.tensor([i])), torch.zeros(1, 6), 15)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b)


def test_names_that_are_no_text_stay_bytes(tmp_path):
    projecting._save_csv(tmp_path / "a.csv", [{"image": "caf\udce9.png", "psnr": 1.0}])
    assert (tmp_path / "a.csv").read_bytes() == b"image,psnr\r\ncaf\xe9.png,1.0\r\n"


def test_psnr():
    a, b = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0]))  # 10 log10(2^2 / 0.2^2)
    assert psnr(a + 1, a + 7).item() == math.inf  # both are white
    b[..., :2] = 0.02
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1
    torch.testing.assert_close(psnr(a, b, left), torch.tensor([40.0]))
    assert psnr(a, b, 0 * left).isnan().all()


def test_the_wrapped_psnr_is_that_of_numpy_bytes():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    noise = np.stack([rng.normal(0, sigma, a.shape[1:]) for sigma in (2, 12.5, 60)])
    b = np.clip(a + noise, 0, 255).round().astype(np.uint8)
    real, made = (torch.from_numpy(x).float() / 127.5 - 1 for x in (a, b))
    found, true = wrapped_psnr(real, made), psnr(real, made)
    for i in range(3):
        error = np.mean((a[i] - b[i]) ** 2)  # of bytes, as they are
        assert found[i].item() == pytest.approx(20 * math.log10(255 / math.sqrt(error)))
    assert found[0].item() == pytest.approx(true[0].item(), abs=1e-3)
    assert true[1].item() == pytest.approx(26.1, abs=0.3)
    assert found[1].item() > true[1].item() + 2
    assert wrapped_psnr(real, real).tolist() == [100] * 3
    assert wrapped_psnr(made * 0 - 1, made * 0 - 1 + 32 / 255).tolist() == [100] * 3  # 16 squared


def test_halving_averages():
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(halved(images, 8), F.avg_pool2d(images, 4))
    assert halved(images, 64) is images


def mean_distance(a, b):
    return (a - b).abs().mean(dim=(1, 2, 3))


def test_content_aware_figures_see_the_content_only():
    real = torch.rand(2, 3, 8, 8) - 0.5
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4] = 1
    made = real.clone()
    made[:, :, 4:] += 0.2
    figures = fidelity(real, made, mask, mean_distance)
    torch.testing.assert_close(figures["perceptual"], torch.tensor([0.1, 0.1]))
    assert figures["psnr"].isfinite().all()
    assert figures["content_psnr"][0] == math.inf
    assert figures["content_perceptual"][0] == 0
    assert figures["content_psnr"][1].isnan()
    assert figures["content_perceptual"][1].isnan()


def tiny_generator(seed=0):
    torch.manual_seed(seed)
    generator = Generator(8, 6, 2, (8, 8, 6, 6))
    for layer in generator.styled_convs:
        layer.noise.weight.data.fill_(0.3)
    return generator.requires_grad_(False)


def coarse_distance(a, b):
    return (F.avg_pool2d(a, 2) - F.avg_pool2d(b, 2)).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_picture_does_not_depend_on_its_neighbours(double, optimizer):
    generator = tiny_generator()
    images = sampling.images(generator, range(3), seed=4)
    settings = {"optimizer": optimizer, "num_iters": 12, "seed": 1}
    together = project(generator, images, coarse_distance, **settings)
    for i in range(3):
        alone = project(generator, images[i : i + 1], coarse_distance, **settings)
        for name in ("w_plus", "noise", "loss", "evaluations"):
            torch.testing.assert_close(getattr(together.part(i), name), getattr(alone, name))


@pytest.mark.parametrize(("optimizer", "iterations"), [("lbfgs", 150), ("adam", 400)])
def test_projects_by_latent_and_noise(optimizer, iterations):
    generator = tiny_generator()
    images = sampling.images(generator, range(2), seed=4)
    losses = []
    found = project(
        generator,
        images,
        coarse_distance,
        optimizer=optimizer,
        num_iters=iterations,
        progress=lambda loss: losses.append(loss.mean().item()),
    )
    assert len(losses) == iterations
    assert losses[-1] < losses[0] / 50
    made = generator.synthesis(found.w_plus, found.noise).image
    assert psnr(images, made).min() > 25
    loss = (images - made).square().mean(dim=(1, 2, 3)) + coarse_distance(images, made)
    torch.testing.assert_close(found.loss, loss, rtol=1e-3, atol=1e-7)
    assert found.w_plus.shape == (2, 4, 6)
    assert all(map(torch.equal, generator.fixed_noise, tiny_generator().fixed_noise))
    for maps, stored in zip(found.noise, generator.fixed_noise, strict=True):
        assert maps.shape == (2, *stored.shape[1:])
        assert (maps - stored).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_a_picture_that_the_bundled_model_made_is_found_again():
    generator = checkpoint.load_generator(bundled.MODEL).eval().requires_grad_(False)
    distance = ParserDistance(checkpoint.load_face_parser(bundled.PARSER))
    images = sampling.images(generator, range(2), seed=0)
    found = project(generator, images, distance, num_iters=60, perceptual_weight=0.1)
    made = generator.synthesis(found.w_plus, found.noise).image
    assert psnr(images, made).mean() > 30


def test_the_papers_objective():
    generator, seen = tiny_generator(), []
    images = sampling.images(generator, range(2), seed=4)

    def distance(a, b):
        seen.append((a, b))
        return coarse_distance(a, b)

    found = project(generator, images, distance, num_iters=2, protocol="paper", seed=3)
    first, real = seen[0]
    noise = sampling.draw_noise(generator, [0], 3)
    start = sampling.synthesise(generator, sampling.mean_latent(generator, 3, 1000), noise)
    bilinear = {"size": (256, 256), "mode": "bilinear"}
    torch.testing.assert_close(first[:1], F.interpolate(start.clamp(-1, 1), **bilinear))
    torch.testing.assert_close(real, F.interpolate(images.clamp(-1, 1), **bilinear))
    made = sampling.synthesise(generator, found.w_plus, found.noise)
    expected = (made - images).square().mean(dim=(1, 2, 3)) + coarse_distance(
        *(F.interpolate(x.clamp(-1, 1), **bilinear) for x in (made, images))
    )
    torch.testing.assert_close(found.loss, expected)


def test_refuses_images_of_another_size():
    with pytest.raises(ValueError, match="expected"):
        project(tiny_generator(), torch.zeros(1, 3, 16, 16), coarse_distance)


def test_saved_projections(tmp_path):
    generator, file = tiny_generator(), tmp_path / "a.npz"
    images = sampling.images(generator, range(2), seed=4)
    found = project(generator, images, coarse_distance, num_iters=2)
    save_projection(file, found, generator, "model.pt", ["a.png", "b.png"])
    for loaded in (load_projection(file), load_projection(file, generator)):
        for name, value in vars(found).items():
            torch.testing.assert_close(getattr(loaded, name), value, rtol=0, atol=0)
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["sources"].tolist() == ["a.png", "b.png"]
    with pytest.raises(ValueError, match=r"a\.npz: made with other weights \(those of model\.pt\)"):
        load_projection(file, tiny_generator(1))

    (tmp_path / "b.npz").write_bytes(file.read_bytes()[:-30])
    np.savez(tmp_path / "c.npz", w_plus=np.zeros((1, 4, 6)))
    np.savez(tmp_path / "d.npz", w_plus=np.array([print]))  # a pickle
    np.save(tmp_path / "e.npy", np.zeros(3))
    for name in ("b.npz", "c.npz", "d.npz", "e.npy", "missing.npz"):
        with pytest.raises(ValueError, match=f"{name}: no projection of get_projected_image.py"):
            load_projection(tmp_path / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, a parser, one that finds only background, and pictures."""
    folder = tmp_path_factory.mktemp("projection")
    checkpoint.save(folder / "model.pt", {"g_ema": tiny_generator()})
    network = BiSeNet(19, width=4, stem_stride=1, input_size=32)
    network.conv_out.conv_out.weight.data.normal_(std=10)
    network.train()(torch.randn(4, 3, 32, 32))
    checkpoint.save(folder / "parser.pt", {"parser": network, "config": network.config})
    network = BiSeNet(2, width=4, stem_stride=1, input_size=32)
    network.conv_out.conv_out.weight.data.zero_()  # argmax of equal logits: class 0
    checkpoint.save(folder / "blind.pt", {"parser": network, "config": network.config})
    pictures = folder / "pictures"
    (pictures / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures / "wide.png")
    Image.fromarray(pixels[:12, :12]).save(pictures / "square.jpg")
    Image.fromarray(pixels[:8, :8]).save(pictures / "more" / "fits.png")
    return folder


def run(files, *flags, parser="parser.pt"):
    arguments = ["--ckpt", files / "model.pt", "--parser_ckpt", files / parser]
    arguments += ["--perceptual", "parser", "--device", "cpu", "--num_iters", 3]
    return get_projected_image.main([*map(str, arguments), *map(str, flags)])


def test_a_folder(files, tmp_path, capsys, terminal):
    out = tmp_path / "new"
    flags = ["--image_file", files / "pictures", "--batch_size", 2, "--out", out, "--json"]
    assert run(files, *flags, "--info_print") == 0
    captured = capsys.readouterr()
    assert "6/6" in captured.err  # two batches of three iterations
    text = captured.err
    assert "wide.png (20x12 px) cropped centrally to 12 px and resized to 8x8 px" in text
    assert "square.jpg (12x12 px) resized to 8x8 px" in text
    assert "fits.png (" not in text
    names = ["more/fits.png", "square.jpg", "wide.png"]
    expected = [str(out / name).rsplit(".", 1)[0] + ".npz" for name in names]
    expected += [str(out / "Image_Projection_Visualization.png")]
    expected += [str(out / f"projection.{kind}") for kind in ("csv", "json")]
    assert sorted(str(p) for p in out.rglob("*") if p.is_file()) == sorted(expected)

    with open(out / "projection.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == names
    line = json.loads(captured.out)
    assert line["settings"]["num_iters"] == 3
    for figures, row in zip(line["figures"]["pictures"], rows, strict=True):
        assert {k: str(v) for k, v in figures.items()} == row
        assert all(f"{figures[k]:.4g}" in text for k in ("psnr", "content_perceptual"))
    mean = np.mean([float(row["psnr"]) for row in rows])
    assert line["figures"]["mean"]["psnr"] == pytest.approx(mean)
    assert f"{mean:.4g}" in text

    # What is saved is what was measured.
    generator = checkpoint.load_generator(files / "model.pt")
    found = load_projection(out / "more" / "fits.npz", generator)
    made = generator.synthesis(found.w_plus, found.noise).image
    pixels = np.array(Image.open(files / "pictures/more/fits.png")).transpose(2, 0, 1)
    real = torch.from_numpy(pixels)[None].float() / 127.5 - 1
    assert psnr(real, made).item() == pytest.approx(float(rows[0]["psnr"]), rel=1e-5)


def test_one_picture_without_content(files, tmp_path, capsys):
    picture = files / "pictures" / "wide.png"
    flags = ["--image_file", picture, "--out", tmp_path, "--json"]
    assert run(files, *flags, parser="blind.pt") == 0
    captured = capsys.readouterr()
    text = captured.err
    assert "nan: 1 of 1 pictures have no content for the parser" in text
    (figures,) = json.loads(captured.out)["figures"]["pictures"]
    assert figures["content_psnr"] is None
    assert figures["psnr"] > 0
    assert (tmp_path / "wide.npz").is_file()


def test_a_missing_parser_stops_nothing_that_needs_none(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundled, "PUBLISHED_PARSER", tmp_path / "none.pth")
    monkeypatch.setattr(distances, "load_lpips", lambda *args: FourDimensions())
    picture = files / "pictures" / "wide.png"
    flags = ["--ckpt", files / "model.pt", "--image_file", picture, "--out", tmp_path, "--json"]
    flags += ["--num_iters", 2, "--protocol", "paper", "--resample", "lanczos"]
    assert get_projected_image.main(list(map(str, flags))) == 0
    captured = capsys.readouterr()
    text = captured.err
    assert "no figures inside the content, which needs a face parser" in text
    assert "resized to 8x8 px by lanczos" in text
    names = ["psnr", "perceptual", "paper_psnr", "paper_perceptual", "loss", "evaluations"]
    figures = json.loads(captured.out)["figures"]
    assert [*figures["pictures"][0]] == ["picture", *names]
    assert {*figures["mean"]} == {*names[:4]}
    assert "paper's PSNR (dB)" in text


class FourDimensions(torch.nn.Module):
    def forward(self, a, b):
        return mean_distance(a, b).view(-1, 1, 1, 1)


def test_bundled_model_without_a_file(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundled, "MODEL", files / "model.pt")
    monkeypatch.setattr(bundled, "PARSER", files / "parser.pt")
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(files / "model.pt"), "--num_iters", "2", "--seed", "3"]
    assert get_projected_image.main(flags) == 0
    text = capsys.readouterr().out
    assert "projecting 4 pictures that the model itself makes of seed 3" in text
    assert "parser distance" in text
    stems = [path.stem for path in (tmp_path / "projection").glob("*.npz")]
    assert sorted(stems) == [f"seed_3_image_{i}" for i in range(4)]


def test_the_picture_is_bounded(files, tmp_path):
    widths = []
    for shown in (1, 2):
        flags = ["--image_file", files / "pictures", "--shown", shown, "--batch_size", 1]
        assert run(files, *flags, "--out", tmp_path) == 0
        with Image.open(tmp_path / "Image_Projection_Visualization.png") as picture:
            widths.append(picture.width)
    assert 128 <= widths[1] - widths[0] <= 150  # one more column


def test_the_perceptual_distance_fits_the_model(files, monkeypatch):
    monkeypatch.setattr(distances, "load_lpips", lambda *args: torch.nn.Identity())

    def name(**chosen):
        settings = ProjectionSettings(**chosen)
        settings.load_distance(settings.ckpt, torch.device("cpu"))
        return settings.distance_name(settings.ckpt)

    assert name() == "parser distance"
    assert name(ckpt=files / "model.pt") == "LPIPS-VGG"
    assert name(perceptual="alex") == "LPIPS-ALEX"


def test_the_perceptual_distance_sees_256_px_at_most(monkeypatch):
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, a, b):
            seen.extend((a.shape, b.shape))
            return mean_distance(a, b).view(-1, 1, 1, 1)

    monkeypatch.setattr(distances, "load_lpips", lambda *args: Recorder())
    distance = distances.load_distance("vgg", None, lambda: "", torch.device("cpu"))
    images = torch.zeros(2, 3, 512, 512)
    assert distance(images, images).shape == (2,)
    assert seen == [(2, 3, 256, 256)] * 2


def test_bad_input(files, tmp_path, capsys):
    def error(*flags):
        try:
            code = run(files, *flags)
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        return captured.err

    bad, twins = tmp_path / "bad.png", tmp_path / "twins"
    bad.write_bytes(b"no picture")
    twins.mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(twins / name)
    assert "--image_file" in (line := error("--image_file", bad))
    assert "bad.png: not a readable image (unknown format or damaged)" in line
    assert "no such file or folder" in error("--image_file", tmp_path / "nothing.png")
    assert "differ in their ending only" in error("--image_file", twins)
    trunk = ["--perceptual", "squeeze", "--perceptual_ckpt", tmp_path / "nothing.pth"]
    assert "--perceptual_ckpt" in (line := error(*trunk))
    assert "nothing.pth: no such file" in line
    assert "--generated_img_size 16 contradicts" in error("--generated_img_size", 16)
    assert not (tmp_path / "projection").exists()
