import json
import pickle
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import get_fid
from Dataset.pictures import Resizing
from Evaluation import feature_sets, feature_statistics, sampling
from Evaluation.feature_statistics import (
    Statistics,
    StatisticsError,
    expected_bias,
    mean_and_covariance,
    statistics_of,
)
from Evaluation.features import Extractor
from Evaluation.fid import frechet_distance
from Model import bundled, checkpoint
from Model.generator import Generator


@pytest.fixture
def generator():
    return Generator(8, 8, 2, (6, 5, 4, 4)).requires_grad_(False)


@pytest.fixture
def files(tmp_path, generator):
    """A generator's checkpoint and a folder of 140 real images."""
    checkpoint.save(tmp_path / "g.pt", {"g_ema": generator})
    (tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(140):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"real/{i:03d}.png")
    return tmp_path


def run(files, flags, capsys):
    argv = f"--ckpt {files}/g.pt --features parser --device cpu --workers 0"
    argv = [*argv.split(), "--parser_ckpt", str(bundled.PARSER), *flags.split()]
    assert get_fid.main(argv) == 0
    captured = capsys.readouterr()
    return captured.err + captured.out


def figures(out):
    return json.loads(out.splitlines()[-1])["figures"]


def test_an_image_depends_on_seed_and_number_alone(generator):
    whole = sampling.images(generator, range(5), seed=3)
    parts = [sampling.images(generator, part, seed=3) for part in ([4], [0, 1], [2, 3])]
    torch.testing.assert_close(whole, torch.cat([*parts[1:], parts[0]]))
    assert (sampling.images(generator, range(5), seed=4) - whole).abs().amax(
        dim=(1, 2, 3)
    ).min() > 0


def test_truncation_moves_to_the_centre(generator):
    centre = sampling.mean_latent(generator, seed=0)
    near = sampling.images(generator, range(2), 0, truncation=1e-6, centre=centre, fixed_noise=True)
    expected = generator([centre], input_is_latent=True, randomize_noise=False)
    torch.testing.assert_close(near, expected.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n", "size", "world"), [(10, 3, 1), (10, 3, 2), (2, 4, 3)])
def test_processes_share_all_images(n, size, world):
    shares = [list(sampling.shares(n, size, rank, world)) for rank in range(world)]
    assert sorted(i for own in shares for batch in own for i in batch) == list(range(n))
    merged = [b for turn in range(4) for own in shares for b in own[turn : turn + 1]]
    assert [i for batch in merged for i in batch] == list(range(n))  # gather_in_turn's order


def test_the_figure_does_not_depend_on_the_batch_size(files, capsys):
    flags = f"--path {files}/real --n_sample 120 --json --metrics fid,kid,pr --batch_size"
    one, other = (figures(run(files, f"{flags} {size}", capsys)) for size in (7, 50))
    assert set(one) == {
        "Frechet parser distance",
        "kernel parser distance",
        "kernel parser distance, standard error",
        "precision",
        "recall",
    }
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=1e-3), name


def test_real_statistics_are_made_once_and_noticed_when_stale(files, capsys, monkeypatch):
    flags = f"--path {files}/real --n_sample 120 --json"
    first = figures(run(files, flags, capsys))
    (cache,) = files.glob("real_8px_statistics_*.npz")
    monkeypatch.setattr(feature_sets, "image_features", None)  # would fail if called
    assert figures(run(files, flags, capsys)) == first
    monkeypatch.undo()
    (files / "real/000.png").unlink()
    assert figures(run(files, flags, capsys)) != first
    assert len(list(files.glob("real_8px_statistics_*.npz"))) == 2
    assert feature_statistics.load(cache).record["count"] == 140


def test_statistics_that_are_named_are_taken_and_never_overwritten(files, capsys, monkeypatch):
    flags = f"--path {files}/real --stats {files}/kept.npz --n_sample 120 --json"
    first = figures(run(files, flags, capsys))
    (files / "real/000.png").unlink()
    assert figures(run(files, flags, capsys)) == first
    foreign = {"mean": np.zeros(112), "cov": np.eye(112)}
    (files / "kept.npz").write_bytes(pickle.dumps(foreign))
    assert figures(run(files, flags, capsys)) != first
    assert pickle.loads((files / "kept.npz").read_bytes())["cov"].shape == (112, 112)


def test_statistics_of_other_images_than_those_named_are_told(files, capsys):
    flags = f"--path {files}/real --stats {files}/kept.npz --n_sample 120"
    assert "kept.npz was made of" not in run(files, flags, capsys)
    assert "kept.npz was made of" not in run(files, flags, capsys)
    (files / "real/000.png").unlink()
    told = f"kept.npz was made of 140 images of {files}/real, and {files}/real holds others"
    assert told in run(files, flags, capsys)


def test_the_folder_that_is_worked_in_has_statistics_beside_it(files, capsys, monkeypatch):
    monkeypatch.chdir(files / "real")
    run(files, "--path . --n_sample 120", capsys)
    assert len(list(files.glob("real_8px_statistics_*.npz"))) == 1


def test_a_folder_can_be_scored_in_place_of_a_model(files, capsys):
    flags = (
        f"--path {files}/real --images {files}/real --generated_img_size 8 --json --metrics fid,pr"
    )
    same = figures(run(files, flags, capsys))
    assert same["Frechet parser distance"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1, 1)


def test_few_images_are_measured_with_a_warning(files, capsys):
    out = run(files, f"--path {files}/real --n_sample 50 --json", capsys)
    assert figures(out)["Frechet parser distance"] > 0
    (warning,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: only 50 generated images for 112 features raise")
    assert "warning" not in run(files, f"--path {files}/real --n_sample 113", capsys)
    for file in list((files / "real").iterdir())[:40]:
        file.unlink()
    out = run(files, f"--path {files}/real --n_sample 113", capsys)
    assert "only 100 real images for 112 features" in out


@pytest.mark.parametrize("n", [12, 30, 60, 400])
def test_the_bias_of_few_images_is_that_of_gaussian_features(n):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    spread = np.logspace(1, -2, 60)
    cov = (basis * spread) @ basis.T
    features = rng.standard_normal((20, n, 60)) * np.sqrt(spread) @ basis.T
    found = [frechet_distance(*mean_and_covariance(x), np.zeros(60), cov) for x in features]
    estimates = [expected_bias(cov, n, seed) for seed in range(20)]
    assert np.mean(estimates) == pytest.approx(np.mean(found), rel=0.1)
    assert np.std(estimates) < 0.25 * np.mean(found)  # one draw does for a rough figure


def test_every_figure_names_the_filter(files, capsys):
    out = run(files, f"--path {files}/real --n_sample 120", capsys)
    assert "real images: 8 bits, 8 px, not resized, no flips)" in out
    flags = f"--path {files}/large --n_sample 30"
    (files / "large").mkdir()
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files / f"large/{i}.png")
    out = run(files, f"{flags} --images {files}/large --generated_img_size 8", capsys)
    assert "generated images: 8 bits, resized from 20 px to 8 px, filter bilinear; real" in out
    found = {}
    for name in ("bilinear", "lanczos"):
        out = run(files, f"{flags} --resample {name} --json", capsys)
        assert f"resized from 20 px to 8 px, filter {name}, no flips" in out
        found[name] = figures(out)["Frechet parser distance"]
    assert found["bilinear"] != pytest.approx(found["lanczos"], rel=1e-3)
    assert len(list(files.glob("large_8px_statistics_*.npz"))) == 2


def test_statistics_from_before_the_filter_was_recorded(files, capsys, monkeypatch):
    flags = f"--path {files}/real --n_sample 120"
    run(files, flags, capsys)
    (cache,) = files.glob("real_8px_statistics_*.npz")
    found = feature_statistics.load(cache)
    old = {k: v for k, v in found.record.items() if k not in ("resample", "source")}
    feature_statistics.save(cache, replace(found, record=old))
    monkeypatch.setattr(feature_sets, "image_features", None)  # would fail if called
    assert "filter not recorded: lanczos where they were resized" in run(files, flags, capsys)
    assert "filter not recorded" in run(files, f"--stats {cache} --n_sample 120", capsys)
    with pytest.raises(ValueError, match="resized by filter lanczos; these settings mean bilinear"):
        feature_sets._check_filter(cache, None, Resizing(8, "bilinear", (20, 20)))
    feature_sets._check_filter(cache, None, Resizing(8, "lanczos", (20, 20)))


def test_content_aware_features_do_not_see_the_outside():
    inside = torch.zeros(1, 1, 8, 8)
    inside[..., :4] = 1
    extractor = Extractor(
        lambda x: x.flatten(1), "", "", lambda x: inside.expand(len(x), -1, -1, -1)
    )
    image = torch.randn(2, 3, 8, 8)
    changed = image + (1 - inside) * 5
    torch.testing.assert_close(extractor(image), extractor(changed))
    assert extractor(image).abs().sum() > 0


def test_bundled_statistics_fit_the_bundled_parser(capsys):
    assert get_fid.main(["--n_sample", "120", "--device", "cpu", "--json"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < line["figures"]["Frechet parser distance"] < 100
    chosen = {"features": "parser", "parser_ckpt": str(bundled.PARSER), "metrics": ["fid"]}
    assert line["settings"].items() >= chosen.items()
    content = feature_statistics.load(bundled.CONTENT_STATISTICS)
    assert (
        content.record["count"]
        == feature_statistics.load(bundled.STATISTICS).record["count"]
        == 24_000
    )
    assert "content mask" in content.record["protocol"]


def test_bundled_statistics_fit_the_bundled_classifier_of_attributes(capsys):
    flags = ["--features", "attributes", "--n_sample", "120", "--device", "cpu"]
    assert get_fid.main(flags) == 0
    assert "Frechet attribute distance: " in capsys.readouterr().out
    assert get_fid.main([*flags, "--content_aware"]) == 2
    assert "--path is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n_sample 120", "--path is missing"),
        ("--n_sample 120 --stats none.npz", "--stats none.npz: no such file"),
        ("--n_sample 120 --stats evil.pkl", "evil.pkl: refused, it would run"),
        ("--n_sample 120 --stats g.pt", "g.pt: no statistics"),
        ("--n_sample 120 --stats other.npz", "--stats other.npz was made by: another network"),
        ("--n_sample 120 --path real --stats lanczos.npz", "resized by filter lanczos; these set"),
        ("--n_sample 120 --stats lanczos.npz", "--stats lanczos.npz was made of images resized by"),
        (
            "--n_sample 120 --stats small.npz",
            "small.npz is of 3 features, and these settings make 112",
        ),
        ("--n_sample 120 --stats small.npz --metrics kid", "need the real images"),
        ("--n_sample 120 --stats side.npz", "side.npz was made of images of 1024 px; these set"),
        (f"--ckpt {shlex.quote(str(bundled.MODEL))} --features inception", "--path is missing"),
    ],
)
def test_bad_input_is_one_line(files, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(files)
    write_bad_statistics(files)
    Image.new("RGB", (16, 16)).save(files / "real/large.png")
    argv = ["--ckpt", "g.pt", "--parser_ckpt", str(bundled.PARSER), "--features", "parser"]
    try:
        code = get_fid.main([*argv, "--workers", "0", *shlex.split(flags)])
    except SystemExit as error:
        code = error.code
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert code == 2
    assert message in line


def write_bad_statistics(folder):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(folder / 'ran')!r}, 'w')",)

    (folder / "evil.pkl").write_bytes(pickle.dumps({"mean": Evil()}))
    small = Statistics(np.zeros(3), np.eye(3))
    feature_statistics.save(folder / "small.npz", small)
    other = Statistics(np.zeros(3), np.eye(3), None, {"protocol": "another network"})
    feature_statistics.save(folder / "other.npz", other)
    lanczos = Statistics(np.zeros(112), np.eye(112), None, {"resample": "lanczos"})
    feature_statistics.save(folder / "lanczos.npz", lanczos)
    side = Statistics(np.zeros(112), np.eye(112), None, {"size": 1024})
    feature_statistics.save(folder / "side.npz", side)


def test_pickled_statistics_are_read_without_running_anything(tmp_path):
    rng = np.random.default_rng(0)
    mean, cov = rng.standard_normal(3), np.eye(3)
    for protocol in (2, 4, 5):
        content = {"mean": mean, "cov": cov, "size": 256, "path": "ffhq.lmdb"}
        (tmp_path / "s.pkl").write_bytes(pickle.dumps(content, protocol))
        np.testing.assert_array_equal(feature_statistics.load(tmp_path / "s.pkl").mean, mean)
    write_bad_statistics(tmp_path)
    with pytest.raises(StatisticsError, match=r"would run builtins\.exec"):
        feature_statistics.load(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def test_non_finite_features_are_counted():
    features = np.zeros((5, 2), dtype=np.float32)
    features[1:3, 0] = np.nan
    with pytest.raises(StatisticsError, match="features of 2 of 5 images are NaN"):
        statistics_of(features, {})
