"""The metrics and the Inception network against torch-fidelity and closed forms."""

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from Evaluation import inception
from Evaluation.feature_statistics import StatisticsError, mean_and_covariance, statistics_of
from Evaluation.features import Extractor
from Evaluation.fid import frechet_distance
from Evaluation.inception import FIDInception, load_inception
from Evaluation.kid import kernel_distance, squared_mmd
from Evaluation.metrics import METRICS, distance_key, evaluate, need_features
from Evaluation.precision_recall import precision_recall
from Model.checkpoint import CheckpointError


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((16, 16)) / 4
    a, b = rng.standard_normal((2, 300, 16)) @ mix
    return a.astype(np.float32), (b * 1.1 + 0.2).astype(np.float32)


def test_frechet_distance_agrees(features):
    theirs = [fid_features_to_statistics(torch.from_numpy(x)) for x in features]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*mean_and_covariance(features[0]), *mean_and_covariance(features[1]))
    assert ours == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_agrees(features):
    tensors = [torch.from_numpy(x) for x in features]
    expected = kid_features_to_metric(*tensors, kid_subsets=1, kid_subset_size=300, verbose=False)
    ours = squared_mmd(*(x.astype(np.float64) for x in features))
    assert ours == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize(("n", "size"), [(200, 50), (2000, 10)])
def test_the_standard_error_of_the_kernel_distance_is_that_of_repeated_sets(n, size):
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((n, 4)), rng.standard_normal((n, 4)) + 0.5) for _ in range(60)]
    estimates = np.array(
        [kernel_distance(*pair, subset_size=size, seed=i) for i, pair in enumerate(pairs)]
    )
    assert estimates[:, 1].mean() == pytest.approx(estimates[:, 0].std(), rel=0.3)


def test_precision_and_recall_agree(features):
    a, b = (torch.from_numpy(x) for x in features)
    expected = prc_features_to_metric(a, b, verbose=False)
    ours = precision_recall(a, b, chunk=77)
    assert ours == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0 < ours[0] < 1


def test_precision_and_recall_of_a_missed_mode():
    real = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 100])
    generated = torch.randn(100, 2) * 0.1
    assert precision_recall(generated, real) == (1.0, pytest.approx(0.1, abs=0.1))


@pytest.mark.parametrize(
    ("name", "mask", "names"),
    [
        ("", None, ("FID", "KID")),
        ("parser", None, ("Frechet parser distance", "kernel parser distance")),
        ("", torch.ones_like, ("content-aware FID", "content-aware KID")),
    ],
)
def test_distances_are_named_after_their_features(features, name, mask, names):
    extractor = Extractor(lambda x: x, name, "", mask)
    found = tuple(METRICS[metric].name(extractor) for metric in ("fid", "kid"))
    assert found == names


def test_metrics_come_in_their_order(features):
    extractor, (a, b) = Extractor(lambda x: x, "", ""), features
    figures = evaluate(["pr", "kid", "fid"], extractor, a, statistics_of(b, {}, True), seed=3)
    assert list(figures) == ["precision", "recall", "KID", "KID, standard error", "FID"]
    assert (figures["KID"], figures["KID, standard error"]) == kernel_distance(a, b, seed=3)
    assert distance_key(["pr", "kid", "fid"], extractor) == "KID"
    assert distance_key(["pr"], extractor) is None
    assert need_features(["fid", "pr"])
    assert evaluate(["fid"], extractor, a, statistics_of(b, {}), seed=0) == {"FID": figures["FID"]}


@pytest.mark.parametrize("metric", METRICS)
def test_features_that_cannot_be_measured_are_refused(features, metric):
    extractor, (a, b) = Extractor(lambda x: x, "", ""), features
    real = statistics_of(b, {}, True)
    with pytest.raises(StatisticsError, match="statistics of 15 and of 16 features"):
        evaluate([metric], extractor, a[:, :15], real, seed=0)
    with pytest.raises(StatisticsError, match="features of 1 of 300 images are NaN"):
        evaluate([metric], extractor, np.where(a == a.max(), np.nan, a), real, seed=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the layout of the published file."""
    torch.manual_seed(0)
    network = FIDInception()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    head = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.net.state_dict() | head, file)
    return file


def test_the_inception_network_agrees(weights):
    theirs = FeatureExtractorInceptionV3("x", ["2048"], str(weights))
    pixels = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    ours = load_inception(weights, torch.device("cpu"))((pixels.float() - 128) / 128)
    torch.testing.assert_close(ours, theirs(pixels)[0], rtol=1e-4, atol=1e-4)


def test_images_of_another_size_are_resized_as_in_the_original(weights):
    network = load_inception(weights, torch.device("cpu"))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    resized = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear")
    torch.testing.assert_close(network(images), network(resized))


def test_unusable_weights_are_named(tmp_path, weights, monkeypatch):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: not the FID Inception network"):
        load_inception(tmp_path / "x.pth", torch.device("cpu"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL", f"file://{tmp_path}/none/pt_inception-6726825d.pth")
    with pytest.raises(CheckpointError, match=r"could not be downloaded .* put .*file:///"):
        load_inception(None, torch.device("cpu"))


def test_a_download_with_another_hash_is_not_kept(tmp_path, weights, monkeypatch):
    url = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    url.write_bytes(weights.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL", f"file://{url}")
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        load_inception(None, torch.device("cpu"))
    assert not list((tmp_path / "hub/checkpoints").iterdir())
