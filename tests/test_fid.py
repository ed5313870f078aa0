import numpy as np
import pytest

from Evaluation.feature_statistics import mean_and_covariance
from Evaluation.fid import frechet_distance
from tests.golden_fill import load_golden


def test_equals_the_original():
    arrays, _ = load_golden("frechet")
    a, b = (mean_and_covariance(arrays[f"features_{x}"]) for x in "ab")
    assert frechet_distance(*a, *b) == pytest.approx(float(arrays["fid"]), rel=1e-6)


def test_closed_form_for_diagonal_covariances():
    a, b = np.array([1.0, 4.0]), np.array([9.0, 1.0])
    mean = np.array([3.0, -4.0])
    expected = 25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    actual = frechet_distance(np.zeros(2), np.diag(a), mean, np.diag(b))
    assert actual == pytest.approx(expected)


def test_singular_covariances_need_no_offset():
    features = np.random.default_rng(0).standard_normal((5, 32))
    mean, cov = mean_and_covariance(features)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(mean, cov, mean + 1, cov) == pytest.approx(32, abs=1e-4)
