import hashlib
import itertools
import pickle
import re
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import train
from Dataset import DatasetError, loading, sources
from Dataset.batches import EndlessBatches
from Dataset.images import Images, to_float
from Dataset.loading import EpochBatches, load_batches, main
from Dataset.pictures import FILTERS, Resizing, UnreadableImageError, fit_square
from train_hyperparams import TrainConfig

ROOT = Path(__file__).parent.parent


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
    picture[:, 6:26] = 255  # the filter of the outermost pixels reaches beyond the square
    Image.fromarray(picture).save(tmp_path / "wide.png")
    torch.testing.assert_close(Images(tmp_path, 8)[0, False], torch.ones(3, 8, 8))


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("sides", [(40, 40), (41, 60), (75, 16), (16, 31), (9, 13)])
def test_pictures_are_resized_as_by_torchvision_with_pillow(sides, filter_):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8))
    found = np.asarray(fit_square(image, 16, filter_)).astype(int)
    resize = transforms.Resize(16, transforms.InterpolationMode(filter_))
    expected = np.asarray(transforms.CenterCrop(16)(resize(image))).astype(int)
    assert found.shape == expected.shape == (16, 16, 3)
    assert np.abs(found - expected).max() <= 1  # Pillow rounds between its two passes
    assert (found != expected).mean() < 0.01


def test_the_filter_is_chosen_and_none_is_named_where_nothing_is_resized(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    write_pixels(tmp_path / "data/a.png", pixels)
    by_filter = {name: Images(tmp_path / "data", 8, resample=name) for name in FILTERS}
    assert torch.equal(Images(tmp_path / "data", 8)[0, False], by_filter["bilinear"][0, False])
    pairs = itertools.combinations([images[0, False] for images in by_filter.values()], 2)
    assert all((a - b).abs().max() > 0.01 for a, b in pairs)
    assert by_filter["box"].resizing == Resizing(8, "box", (16, 16))
    same = Images(tmp_path / "data", 16, resample="box")
    assert (by_filter["box"].resizing.filter, same.resizing.filter) == ("box", "none")
    np.testing.assert_allclose(
        same[0, False], pixels[:, 2:18].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6
    )
    write_pixels(tmp_path / "data/b.png", pixels[:12])
    (tmp_path / "data/c.png").write_bytes(b"damaged")
    mixed = Images(tmp_path / "data", 16, resample="box").resizing
    assert (mixed.filter, mixed.source) == ("box", "12 to 16 px")
    assert set(TrainConfig.__dataclass_fields__["resample"].metadata["choices"]) == set(FILTERS)


def write_pixels(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


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
    with pytest.raises(DatasetError, match=f"^{tmp_path}/none: no such folder"):
        Images(tmp_path / "none", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=f"^{tmp_path}/empty: holds no images"):
        Images(tmp_path / "empty", 8)
    (tmp_path / "empty" / "bad.png").write_bytes(b"no png")
    with pytest.raises(DatasetError, match=r"^/.*/empty: none of 1 images .*bad\.png: not a read"):
        Images(tmp_path / "empty", 8)[0, False]


def test_a_fingerprint_is_that_of_names_and_sizes(tmp_path):
    """Kept statistics are found again by it."""
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/x.png").write_bytes(b"abc")
    (tmp_path / "data/sub/y.jpg").write_bytes(b"de")
    assert Images(tmp_path / "data", 8).fingerprint() == "457c188b"
    with lmdb.open(str(tmp_path / "lmdb")) as env, env.begin(write=True) as txn:
        txn.put(b"8-00000", b"x")
        txn.put(b"length", b"1")
    size = (tmp_path / "lmdb/data.mdb").stat().st_size
    expected = hashlib.sha256(f"[('data.mdb', {size})]".encode()).hexdigest()[:8]
    assert Images(tmp_path / "lmdb", 8).fingerprint() == expected


class Greys:
    """Pictures of one grey each."""

    files = ()

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 3

    def name(self, index):
        return f"{self.path} grey {index}"

    def read(self, index):
        if index == 1:
            raise UnreadableImageError("not grey")
        return Image.new("RGB", (12, 8), (index,) * 3)

    def resizing(self, size, resample):
        return Resizing(size, resample, (8, 8))


def test_a_source_is_one_class_and_one_entry_of_the_table(folder, monkeypatch, capsys):
    def open_greys(path, size):
        return Greys(path) if path.suffix == ".greys" else None

    monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, open_greys))
    images = Images("some.greys", 8)
    assert len(images) == 3
    torch.testing.assert_close(images[1, False], torch.full((3, 8, 8), 2 / 127.5 - 1))
    assert capsys.readouterr().err.startswith("warning: some.greys grey 1: not grey; the next")
    assert len(Images(folder, 8)) == 7


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
    loaded = list(itertools.islice(load_batches(images, stream, workers), 3))
    for batch, items in zip(loaded, stream, strict=False):
        torch.testing.assert_close(batch, torch.stack([images[item] for item in items]))


def test_a_forgotten_loader_does_not_hold_up_the_exit(folder):
    code = (
        "import sys; from Dataset.loading import *;"
        f"images = Images({str(folder)!r}, 8);"
        "stream = load_batches(images, EndlessBatches(7, 4), 1); next(stream);"
        "fetched = stream.gi_frame.f_locals['fetched'];"
        "sys.kept = stream.gi_frame, fetched.gi_frame.f_locals['messages']"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=120)
    assert run.returncode == 0


def test_pictures_travel_as_bytes(folder):
    images = Images(folder, 8)
    batch, _ = loading._Batches(images, loading._pixels).__getitems__([(0, False), (3, True)])
    assert (batch.dtype, batch.shape) == (torch.uint8, (2, 3, 8, 8))
    expected = torch.stack([images[0, False], images[3, True]])
    torch.testing.assert_close(to_float(batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("cores", "processes", "workers"), [(64, 8, 4), (8, 4, 2), (2, 8, 1)])
def test_loading_processes_are_a_share_of_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(loading, "cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loading.default_workers() == workers


def test_a_task_of_srun_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(loading, "cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert loading.default_workers() == 4
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun in a job: its processes share them
    assert loading.default_workers() == 1


def break_files(folder, *names):
    for name in names:
        file = next(folder.rglob(name))
        file.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named_once_and_replaced_the_same_way_in_every_run(folder, capfd, workers):
    break_files(folder, "6.png", "1.png")  # indices 3 (part0's last) and 4 (part1's first)
    images = Images(folder, 8)
    assert [file[-5:] for file in images.source.files[3:5]] == ["6.png", "1.png"]
    batches = load_batches(images, EndlessBatches(7, 7, seed=3), workers)
    for batch, items in zip(range(3), EndlessBatches(7, 7, seed=3), strict=False):
        shown = [(5, flip) if index in (3, 4) else (index, flip) for index, flip in items]
        expected = torch.stack([images[item] for item in shown])
        torch.testing.assert_close(next(batches), expected, msg=f"batch {batch}")
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning: /" in line]
    assert sorted(line.split(": ")[1][-5:] for line in lines) == ["1.png", "6.png"]
    assert "truncated" in lines[0]
    assert len(images.bad) == 2


def test_loading_processes_end_with_too_many_bad_files(folder):
    images, others = Images(folder, 8, max_bad=1), set(active_children())
    break_files(folder, "6.png", "5.png")
    # Each process knows of one bad file only, so that the main process finds them too many.
    batches = load_batches(images, [[(3, False)], [(6, False)]], 2)
    started = set(active_children()) - others
    assert len(started) == 2
    with pytest.raises(DatasetError, match="more than 1 unreadable") as held:
        list(batches)
    assert held.traceback
    for process in started:
        process.join(timeout=20)
        assert not process.is_alive()


def test_after_the_last_image_comes_the_first(folder):
    break_files(folder, "5.png")
    images = Images(folder, 8)
    torch.testing.assert_close(images[6, True], images[0, True])


def test_more_bad_files_than_allowed_are_an_error_that_names_them(folder):
    break_files(folder, "0.png", "2.png", "4.png")
    images = Images(folder, 8, max_bad=2)
    with pytest.raises(DatasetError, match=r"more than 2 unreadable .*0\.png.*2\.png.*4\.png"):
        images[0, False]
    assert Images(folder, 8, max_bad=3)[0, False].shape == (3, 8, 8)


def test_a_decompression_bomb_is_bad(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write(folder / "part0" / "bomb.png", "red", (16, 16))
    images = Images(folder, 8)
    assert images[4, False].shape == (3, 8, 8)
    (reason,) = images.bad.values()
    assert "decompression bomb" in reason


def test_a_bad_image_in_an_lmdb_is_named(tmp_path, folder, capfd):
    with lmdb.open(str(tmp_path / "lmdb")) as env, env.begin(write=True) as txn:
        txn.put(b"8-00000", b"no image")
        txn.put(b"8-00001", (folder / "part0/2.png").read_bytes())
        txn.put(b"length", b"2")
    images = pickle.loads(pickle.dumps(Images(tmp_path / "lmdb", 8)))
    torch.testing.assert_close(images[0, False], images[1, False])
    assert f"{tmp_path}/lmdb image 0: not a readable image (unknown" in capfd.readouterr().err
    pickle.dumps(images)  # also with the LMDB open


def test_unusable_lmdbs_are_named(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "data.mdb").write_bytes(b"no LMDB" * 2000)
    with pytest.raises(DatasetError, match="none: cannot be opened as an LMDB"):
        Images(tmp_path / "none", 8)
    with lmdb.open(str(tmp_path / "half")) as env, env.begin(write=True) as txn:
        txn.put(b"8-00000", b"")
        txn.put(b"length", b"2")
    with pytest.raises(DatasetError, match="2 images by its key 'length', but image 1 missing"):
        Images(tmp_path / "half", 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_train_reports_bad_data_in_one_line(folder, tmp_path, capfd, workers):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    flags = "--size 8 --style_dim 8 --n_mlp 2 --channels 6,5,4,4 --batch_size 4 --device cpu"
    out = f"--path {folder} --out {tmp_path}/run --iter 2 --workers {workers}"
    assert train.main([*flags.split(), *out.split()]) == 2
    error = capfd.readouterr().err.splitlines()
    assert not [line for line in error if "Traceback" in line or "File" in line]
    assert re.match(
        rf"train\.py: error: (--path )?{folder}: none of 7 images can be read: /", error[-1]
    )
    assert "part0/0.png: not a readable image (unknown format or damaged)" in error[-1]


def test_the_loader_is_measured(folder, tmp_path, capsys):
    flags = "--size 8 --batch_size 4 --workers 0 --n_batches 2 --runs 3 --path"
    assert main([*flags.split(), str(folder), str(folder / "part0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(folder), str(folder / "part0")]
    assert main([*flags.split(), str(tmp_path / "none")]) == 2
    start = f"python -m Dataset.images: error: --path {tmp_path}/none: no such folder"
    assert capsys.readouterr().err.startswith(start)


def test_the_order_of_each_pass_is_the_seeds_alone():
    data, orders = TensorDataset(torch.arange(9)), []
    for workers in (0, 1):
        torch.manual_seed(workers)
        batches = EpochBatches(data, "here", 4, workers, seed=5)
        orders.append([torch.cat([b[0] for b in batches]).tolist() for _ in range(3)])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[0]}) == 3
    (first, _, last) = EpochBatches(data, "here", 4)
    assert (first[0].tolist(), last[0].tolist()) == ([0, 1, 2, 3], [8])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server")
def test_signals_are_heard_while_processes_start(folder, monkeypatch):
    start, handlers = DataLoader.__iter__, []

    def started(loader):
        handlers.append(signal.getsignal(signal.SIGTERM))
        return start(loader)

    monkeypatch.setattr(DataLoader, "__iter__", started)
    batches = load_batches(Images(folder, 8), EndlessBatches(7, 4), 1)
    batches.close()
    assert handlers == [signal.getsignal(signal.SIGTERM)] != [signal.SIG_IGN]
