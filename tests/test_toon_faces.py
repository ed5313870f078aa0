import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from Dataset.toon_faces import ToonFacesSettings, main, render, render_dataset, scene

CLASSES = {0, 1, 2, 3, 4, 5, 11, 14, 16, 17}


def test_a_picture_depends_on_seed_and_index_only():
    a, labels = render(3, 32, seed=1)
    b, none = render(3, 32, seed=1, labels=False)
    np.testing.assert_array_equal(a, b)
    assert labels is not None
    assert none is None
    assert not np.array_equal(a, render(4, 32, seed=1)[0])
    assert not np.array_equal(a, render(3, 32, seed=2)[0])


@pytest.mark.parametrize(
    ("index", "seed", "expected"),
    [(0, 0, "4eb7303c44d3964e"), (7, 0, "9aaf1716592003d9"), (4_000_000, 1, "04286ebe474cf001")],
)
def test_the_bundled_pictures_are_what_they_were(index, seed, expected):
    """Models, statistics and figures are of these; whatever changes them takes another VERSION."""
    made = scene(index, seed)
    drawn = [made.definitions, made.uses, made.transform, *made.background]
    assert hashlib.sha256("".join(drawn).encode()).hexdigest()[:16] == expected


@pytest.fixture(scope="module")
def pairs():
    return [render(i, 64) for i in range(20)]


def test_labels_are_classes_and_every_face_has_its_parts(pairs):
    seen = [set(np.unique(labels).tolist()) for _, labels in pairs]
    assert set.union(*seen) == CLASSES
    for classes in seen:
        assert {0, 1, 2, 3, 4, 5, 11, 17} <= classes
    content = np.mean([np.isin(labels, (0, 16), invert=True).mean() for _, labels in pairs])
    assert 0.3 < content < 0.7  # the background is there, and the face fills the picture


def test_left_is_on_the_left_of_the_picture(pairs):
    def column(labels, wanted):
        return np.nonzero(labels == wanted)[1].mean()

    for _, labels in pairs:
        assert column(labels, 4) < column(labels, 5)
        assert column(labels, 2) < column(labels, 3)


def test_labels_agree_with_the_picture(pairs):
    # The head is one flat colour, but for its shading and outline.
    for picture, labels in pairs:
        skin = picture[labels == 1].astype(int)
        near = np.abs(skin - np.median(skin, axis=0)).max(axis=1) < 24
        assert near.mean() > 0.6


def rendered(out, n, workers=1, **more):
    settings = ToonFacesSettings(out=out, n=n, size=16, workers=workers, **more)
    render_dataset(settings, progress=False)


def test_a_set_is_cached_extended_and_completed(tmp_path):
    rendered(tmp_path, 3)
    first = {f: f.read_bytes() for f in tmp_path.rglob("*.png")}
    assert len(first) == 6
    kept = tmp_path / "images" / "00000001.png"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "images" / "00000002.png").unlink()
    rendered(tmp_path, 4, workers=2)
    assert kept.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.rglob("*.png"))) == 8
    assert all(f.read_bytes() == data for f, data in first.items())
    assert "Johan Melin" in json.loads((tmp_path / "dataset.json").read_text())["attribution"]


def test_ranges_of_one_seed_are_disjoint(tmp_path):
    rendered(tmp_path, 2, no_labels=True, start=1_000_000)
    assert [f.name for f in sorted(tmp_path.rglob("*.png"))] == ["01000000.png", "01000001.png"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "images" / "01000001.png")),
        render(1_000_001, 16, labels=False)[0],
    )


def test_another_set_in_the_same_folder_is_refused(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--n", "1", "--size", "16", "--workers", "1"]
    assert main(flags) == 0
    capsys.readouterr()
    assert main([*flags, "--seed", "5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = f"python -m Dataset.toon_faces: error: --out {tmp_path} holds a set with seed 0, not 5;"
    assert line.startswith(start)
