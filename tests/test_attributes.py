"""The judge of studies: what toon portraits show, and the classifier that says it."""

import numpy as np
import pytest
import torch

from Dataset.toon_attributes import ATTRIBUTES, colour_name, described_pictures, skin_tone
from Evaluation.attribute_training import AttributeSettings, chance, pictures, train
from Evaluation.attributes import agreement, floor, summary, values_of
from Evaluation.features import make_extractor
from Model import bundled
from Model.attribute_classifier import AttributeClassifier
from Model.checkpoint import CheckpointError, load_attribute_classifier, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge():
    return load_attribute_classifier(bundled.ATTRIBUTES)


@pytest.fixture(scope="module")
def held_out():
    images, labels = described_pictures(range(5_000_000, 5_000_200), workers=0)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return tensor, dict(zip(ATTRIBUTES, torch.from_numpy(labels).T, strict=True))


def test_bundled_classifier_knows_pictures_it_has_not_seen(judge, held_out):
    images, values = held_out
    accuracy = agreement(values_of(judge, images), values)
    guess = chance(values)
    assert np.mean(list(accuracy.values())) > 0.85
    assert all(accuracy[name] > guess[name] + 0.15 for name in ATTRIBUTES)


def test_pictures_agree_with_themselves_and_shuffled_ones_by_the_floor(judge, held_out):
    found = values_of(judge, held_out[0])
    assert set(agreement(found, found).values()) == {1.0}
    expected = floor(found)
    order = torch.Generator().manual_seed(0)
    shuffles = [torch.randperm(200, generator=order) for _ in range(200)]
    for name, column in found.items():
        # A shuffled picture is its own partner once in N; the floor leaves that out.
        mean = torch.stack([(column == column[s]).double().mean() for s in shuffles]).mean()
        assert expected[name] == pytest.approx((mean.item() - 1 / 200) / (1 - 1 / 200), abs=0.01)


def test_groups_are_averaged_apart(judge):
    shares = {name: float(name in judge.inside) for name in judge.attributes}
    found = summary(shares, judge)
    assert found["inside"] == 1
    assert found["outside"] == 0
    assert found["all"] == pytest.approx(len(judge.inside) / len(judge.attributes))


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0.1, 0.1, 0.2), "black"),
        ((0.5, 0.5, 0.5), "grey"),
        ((0.9, 0.9, 0.95), "white"),
        ((1, 0, 0), "orange"),
        ((0.4, 0.2, 0.1), "brown"),
        ((1, 1, 0), "yellow"),
        ((0, 1, 0), "green"),
        ((0, 1, 1), "cyan"),
        ((0, 0, 1), "blue"),
        ((1, 0, 0.9), "magenta"),
    ],
)
def test_colours_have_names(rgb, name):
    assert colour_name(rgb) == name


def test_every_hue_has_a_name_and_tones_rise_with_luminance():
    import colorsys

    names = {colour_name(colorsys.hsv_to_rgb(h / 360, 1, 1)) for h in range(360)}
    assert names == {"orange", "yellow", "green", "cyan", "blue", "magenta"}
    assert [skin_tone((v,) * 3) for v in (0.2, 0.5, 0.7, 0.9)] == ["dark", "brown", "tan", "light"]


def test_files_that_are_no_classifier_are_refused(judge, tmp_path):
    file, state = tmp_path / "x.pt", judge.state_dict()
    for config in ({}, {"attributes": {"hair": "ab"}, "inside": []}, judge.config | {"inside": 3}):
        save(file, {"classifier": state, "config": config})
        with pytest.raises(CheckpointError, match="config does not fit"):
            load_attribute_classifier(file)
    lacking = {k: v for k, v in state.items() if not k.startswith("heads.hair.")}
    save(file, {"classifier": lacking, "config": judge.config})
    with pytest.raises(CheckpointError, match=r"lacks tensor heads\.hair\.bias"):
        load_attribute_classifier(file)
    with pytest.raises(ValueError, match="no such attribute"):
        AttributeClassifier({"hair": ("a", "b")}, ["nose"])


def test_training_lowers_the_loss(tmp_path):
    settings = AttributeSettings(n=64, epochs=8, batch_size=16, workers=0, keep=tmp_path)
    images, values = pictures(settings, 6_000_000, 64)
    again, _ = pictures(settings, 6_000_000, 64)
    assert torch.equal(images, again)  # the second time from the file
    network = train(settings, images, values)
    seen = agreement(values_of(network, images), values)
    guess = chance(values)
    assert np.mean(list(seen.values())) > np.mean(list(guess.values()))


def test_features_are_an_extractors(judge, held_out):
    extractor = make_extractor("attributes", None, None, None, CPU)
    images = held_out[0][:4]
    torch.testing.assert_close(extractor(images), judge.features(images))
    assert extractor.distance_name("FID", "Frechet") == "Frechet attribute distance"


def test_larger_pictures_show_the_same(judge, held_out):
    images = held_out[0][:50]
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    same = agreement(values_of(judge, larger), values_of(judge, images))
    assert np.mean(list(same.values())) > 0.95
