import itertools

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from Dataset.images import DatasetError, EndlessBatches, Images, endless_loader


def write(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        write(tmp_path / "data" / f"part{i % 2}" / f"{i}.png", (i * 30, 0, 255))
    (tmp_path / "data" / "notes.txt").write_text("no image")
    return tmp_path / "data"


def test_a_folder_is_read_recursively_and_scaled(folder):
    images = Images(folder, 8)
    assert len(images) == 7
    assert images[0, False].shape == (3, 8, 8)
    reds = sorted(images[i, False][0, 0, 0].item() for i in range(7))
    np.testing.assert_allclose(reds, [i * 30 / 127.5 - 1 for i in range(7)], atol=1e-6)


def test_other_sizes_are_cropped_to_a_square_and_resampled(tmp_path):
    picture = np.zeros((16, 32, 3), dtype=np.uint8)
    picture[:, 8:24] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    torch.testing.assert_close(Images(tmp_path, 8)[0, False], torch.ones(3, 8, 8))


def test_mirroring_flips_left_and_right(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    images = Images(tmp_path, 8)
    torch.testing.assert_close(images[0, True], images[0, False].flip(2))


def test_an_lmdb_is_read(tmp_path, folder):
    files = sorted(folder.rglob("*.png"))
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as env, env.begin(write=True) as txn:
        for i, file in enumerate(files):
            txn.put(f"8-{i:05d}".encode(), file.read_bytes())
        txn.put(b"length", str(len(files)).encode())
    images, expected = Images(tmp_path / "lmdb", 8), Images(folder, 8)
    assert len(images) == 7
    for i in range(7):
        torch.testing.assert_close(images[i, False], expected[i, False])
    del images  # LMDB opens a file once per process
    with pytest.raises(DatasetError, match="no images of 16 px"):
        Images(tmp_path / "lmdb", 16)


def test_bad_data_is_named(tmp_path, folder):
    with pytest.raises(DatasetError, match="no such folder"):
        Images(tmp_path / "none", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no images"):
        Images(tmp_path / "empty", 8)
    (tmp_path / "empty" / "bad.png").write_bytes(b"no png")
    with pytest.raises(DatasetError, match=r"bad\.png: not a readable image"):
        Images(tmp_path / "empty", 8)[0, False]


def test_every_epoch_is_a_permutation_and_no_batch_is_partial():
    batches = list(itertools.islice(EndlessBatches(7, 3, seed=1), 14))
    assert all(len(batch) == 3 for batch in batches)
    order = [index for batch in batches for index, _ in batch]
    epochs = [order[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_stream_depends_on_seed_and_position_only():
    whole = list(itertools.islice(EndlessBatches(7, 3, seed=1), 10))
    rest = list(itertools.islice(EndlessBatches(7, 3, seed=1, start=12), 6))
    assert rest == whole[4:]
    assert list(itertools.islice(EndlessBatches(7, 3, seed=2), 10)) != whole


def test_processes_share_a_batch():
    whole = next(iter(EndlessBatches(9, 6, seed=1)))
    parts = [next(iter(EndlessBatches(9, 6, seed=1, rank=r, world=2))) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    with pytest.raises(ValueError, match="not divisible"):
        EndlessBatches(9, 5, world=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_the_stream_in_order(folder, workers):
    images = Images(folder, 8)
    stream = EndlessBatches(len(images), 4, seed=3)
    loaded = list(itertools.islice(endless_loader(images, stream, workers), 3))
    for batch, items in zip(loaded, stream, strict=False):
        torch.testing.assert_close(batch, torch.stack([images[item] for item in items]))
