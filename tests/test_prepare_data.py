import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from Dataset import DatasetError, prepare_data
from Dataset.images import Images
from Dataset.pictures import Resizing
from Dataset.prepare_data import PrepareSettings, main, prepare
from Dataset.sources.folder import image_files
from Util.settings import SettingError
from Util.workers import start_worker

ROOT = Path(__file__).parent.parent
ERROR = "python -m Dataset.prepare_data: error: "


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(7):
        file = tmp_path / "data" / f"part{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16 + 4 * (i % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return tmp_path / "data"


@pytest.fixture
def processes():
    """Requested by tests that want `_encoded` as it is."""


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch, request):
    """Encode here, two files at a time, where a test does not ask for real processes."""
    monkeypatch.setattr(prepare_data, "CHUNK_PIXELS", 2 * (8**2 + 16**2))
    if "processes" not in request.fixturenames:

        def encoded(settings, chunks, workers):
            yield from (prepare_data._encode_files(settings, chunk) for chunk in chunks)

        monkeypatch.setattr(prepare_data, "_encoded", encoded)


def content(path):
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def truncate(file):
    file.write_bytes(file.read_bytes()[:-200])


def make(folder, out, **more):
    settings = {"path": folder, "out": out, "size": (8, 16), "workers": 1} | more
    return prepare(PrepareSettings(**settings), progress=False)


@pytest.mark.usefixtures("processes")
def test_folder_and_lmdb_give_equal_tensors_at_several_sizes(folder, tmp_path, capsys):
    argv = f"--path {folder} --out {tmp_path}/lmdb --size 16,8 --workers 2".split()
    assert main(argv) == 0
    assert capsys.readouterr().out == f"7 images of 8, 16 px (png) in {tmp_path}/lmdb\n"
    keys = set(content(tmp_path / "lmdb")) - {b"prepare_data"}
    assert keys == {f"{s}-{i:05d}".encode() for s in (8, 16) for i in range(7)} | {b"length"}
    for size in (8, 16):
        stored, expected = Images(tmp_path / "lmdb", size), Images(folder, size)
        assert len(stored) == len(expected) == 7
        for i in range(7):
            torch.testing.assert_close(stored[i, False], expected[i, False], rtol=0, atol=0)
        del stored  # LMDB opens a file once per process
    with pytest.raises(DatasetError, match=r"no images of 32 px, but of \[8, 16\]"):
        Images(tmp_path / "lmdb", 32)


def test_an_lmdb_knows_how_its_pictures_were_resized(folder, tmp_path):
    make(folder, tmp_path / "lmdb", resample="box")
    expected = Images(folder, 8, resample="box")
    stored = Images(tmp_path / "lmdb", 8)
    torch.testing.assert_close(stored[0, False], expected[0, False], rtol=0, atol=0)
    assert stored.resizing == expected.resizing
    assert stored.resizing.filter == "box"
    del stored
    # As it was written before there was a choice.
    with lmdb.open(str(tmp_path / "lmdb")) as env, env.begin(write=True) as transaction:
        state = json.loads(transaction.get(b"prepare_data"))
        del state["settings"]["resample"], state["sides"]
        transaction.put(b"prepare_data", json.dumps(state).encode())
    assert Images(tmp_path / "lmdb", 8).resizing == Resizing(8, "lanczos", None)
    # As others write it.
    with lmdb.open(str(tmp_path / "lmdb")) as env, env.begin(write=True) as transaction:
        transaction.delete(b"prepare_data")
    assert Images(tmp_path / "lmdb", 8).resizing.filter == "unknown"


def test_jpeg_is_close_at_full_colour_resolution(tmp_path):
    (tmp_path / "data").mkdir()
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, ::2] = (255, 0, 0)  # stripes that halved colour would wash out
    Image.fromarray(picture).save(tmp_path / "data/a.png")
    argv = f"--path {tmp_path}/data --out {tmp_path}/lmdb --size 16 --format jpeg".split()
    assert main(argv) == 0
    assert content(tmp_path / "lmdb")[b"16-00000"].startswith(b"\xff\xd8")
    stored, expected = Images(tmp_path / "lmdb", 16), Images(tmp_path / "data", 16)
    torch.testing.assert_close(stored[0, False], expected[0, False], rtol=0, atol=0.05)


@pytest.mark.parametrize("commits", [0, 1, 3])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, tmp_path, monkeypatch, commits):
    truncate(folder / "part0/2.png")
    make(folder, tmp_path / "whole")
    store, left = prepare_data._store, [None] * commits

    def stop_after_some(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        store(*args)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "_store", stop_after_some)
        argv = f"--path {folder} --out {tmp_path}/part --size 8,16".split()
        assert main(argv) == 130
    with pytest.raises(DatasetError, match=r"only \d of 7 files; complete it|make one with"):
        Images(tmp_path / "part", 8)
    make(folder, tmp_path / "part")
    assert content(tmp_path / "part") == content(tmp_path / "whole")


@pytest.mark.usefixtures("processes")
def test_a_killed_run_can_be_completed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK_PIXELS", 2**22)
    for i in range(600):
        (folder / f"copy{i}.png").hardlink_to(folder / "part0/0.png")
    command = f"-m Dataset.prepare_data --path {folder} --out {tmp_path}/part --size 8,16"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--workers", "1"],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and prepare_data.STATE_KEY not in _peek(tmp_path / "part"):
        time.sleep(0.01)
    workers = _children(process.pid)
    process.kill()
    process.wait()
    assert workers or sys.platform != "linux"
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the process that it works for"
        time.sleep(0.05)
    make(folder, tmp_path / "part")
    make(folder, tmp_path / "whole")
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def _children(process):
    """Linux only; none elsewhere."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return file.read_text().split() if file.is_file() else []


def _peek(path):
    return content(path) if (path / "data.mdb").is_file() and _size(path) else {}


def _size(path):
    return (path / "data.mdb").stat().st_size >= 2 * 4096


def test_a_finished_lmdb_is_left_as_it_is(folder, tmp_path, monkeypatch):
    first = make(folder, tmp_path / "lmdb")
    monkeypatch.setattr(prepare_data, "_store", None)
    assert make(folder, tmp_path / "lmdb") == first


def test_other_settings_or_files_are_refused(folder, tmp_path, capsys):
    make(folder, tmp_path / "lmdb")
    with pytest.raises(SettingError, match=r"sizes \[8, 16\], not \[8\]; name a new folder"):
        make(folder, tmp_path / "lmdb", size=(8,))
    with pytest.raises(SettingError, match="format png, not jpeg"):
        make(folder, tmp_path / "lmdb", format="jpeg")
    with pytest.raises(SettingError, match="resample bilinear, not lanczos"):
        make(folder, tmp_path / "lmdb", resample="lanczos")
    (folder / "part0/0.png").rename(folder / "part0/9.png")
    with pytest.raises(SettingError, match="LMDB of other files"):
        make(folder, tmp_path / "lmdb")
    (folder / "part0/9.png").unlink()
    assert main(f"--path {folder} --out {tmp_path}/lmdb --size 8,16".split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{ERROR}--out {tmp_path}/lmdb holds an LMDB with files 7, not 6; name")


def test_bad_files_are_named_and_get_no_index(folder, tmp_path, capsys):
    truncate(folder / "part0/0.png")
    (folder / "part1/3.png").write_text("no image")
    (folder / "part1/gone.png").symlink_to("nowhere")
    argv = f"--path {folder} --out {tmp_path}/lmdb --size 8,16".split()
    assert main(argv) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split(": ")[2] for line in warnings] == [
        "part0/0.png", "part1/3.png", "part1/gone.png",
    ]  # fmt: skip
    assert "truncated" in warnings[0]
    images = Images(tmp_path / "lmdb", 8)
    good = [folder / name for name in ("part0/2.png", "part0/4.png", "part0/6.png")]
    assert len(images) == 5
    assert [bool(images[i, False].numel()) for i in range(5)] == [True] * 5
    whole = Images(folder, 8)
    for i, file in enumerate(good):
        index = whole.source.files.index(file.relative_to(folder).as_posix())
        torch.testing.assert_close(images[i, False], whole[index, False])


def test_more_bad_files_than_allowed_are_an_error_until_allowed(folder, tmp_path, capsys):
    for name in ("part0/0.png", "part1/1.png"):
        truncate(folder / name)
    argv = f"--path {folder} --out {tmp_path}/lmdb --size 8,16".split()
    assert main([*argv, "--max_bad", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    start = f"{ERROR}--path {folder}: more than 1 unreadable images: part0/0.png: not a readable "
    assert error.startswith(start)
    assert "part1/1.png" in error
    assert main([*argv, "--max_bad", "2"]) == 0
    assert content(tmp_path / "lmdb")[b"length"] == b"5"


def test_a_folder_of_bad_files_only_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_text("no image")
    with pytest.raises(SettingError, match=r"none of its images can be read: a\.png"):
        make(tmp_path / "data", tmp_path / "lmdb")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "data/a.png")
    make(tmp_path / "data", tmp_path / "lmdb")  # mended, and nothing is in the way
    assert content(tmp_path / "lmdb")[b"length"] == b"1"


def test_a_full_map_grows(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAP_SIZE", 2**14)
    make(folder, tmp_path / "lmdb")
    assert content(tmp_path / "lmdb")[b"length"] == b"7"


def test_a_full_disk_is_one_line_and_leaves_a_run_to_complete(folder, tmp_path, monkeypatch):
    commit = prepare_data._commit

    def full(env, items):
        if any(key == b"8-00004" for key, _ in items):
            raise lmdb.DiskError("No space left on device")
        commit(env, items)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "_commit", full)
        with pytest.raises(SettingError, match=r"No space left .* MB free .* goes on from there"):
            make(folder, tmp_path / "lmdb")
    with pytest.raises(DatasetError, match="only 4 of 7 files; complete it with: python -m"):
        Images(tmp_path / "lmdb", 8)
    make(folder, tmp_path / "lmdb")
    make(folder, tmp_path / "whole")
    assert content(tmp_path / "lmdb") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--path none --out x --size 8", "--path none: no such folder"),
        ("--path {0} --out {0}/data --size 8", "--out {0}/data holds other files; name a new"),
        ("--path {0} --out {0}/foreign --size 8", "--out {0}/foreign holds an LMDB that was not"),
        ("--path {0}/empty --out x --size 8", "--path {0}/empty: holds no images (.png, .jpg"),
        ("--path {0} --out x --size 8,0", "--size must be"),
        ("--path {0} --out x --size 8 --quality 90", "--quality 90: goes with"),
        ("--path {0} --out x --size 8 --format jpeg --quality 101", "--quality must be at most"),
        ("--path {0} --out x --size 8 --format gif", "--format gif: unknown; take png, jpeg"),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    with lmdb.open(str(tmp_path / "foreign")) as env, env.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    try:
        code = main(flags.format(tmp_path).split())
    except SystemExit as error:
        code = error.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert line.startswith(ERROR + message.format(tmp_path))
    assert not Path("x").exists()


@pytest.mark.usefixtures("processes")
def test_workers_are_gone_after_an_interruption(folder, tmp_path):
    before = set(multiprocessing.active_children())
    chunks = [[name] for name in image_files(folder)]
    settings = PrepareSettings(path=folder, out=tmp_path, size=(8, 16))
    encoded = prepare_data._encoded(settings, chunks, 2)
    assert len(next(encoded)) == 1
    encoded.close()
    assert set(multiprocessing.active_children()) <= before


def test_encoding_processes_do_not_load_pytorch():
    code = "import sys, Dataset.prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_interrupt_is_left_to_the_parent():
    handler = signal.getsignal(signal.SIGINT)
    try:
        start_worker()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_hidden_files_are_no_images(folder):
    (folder / ".0.png").write_text("left over")
    (folder / ".cache").mkdir()
    (folder / ".cache/0.png").write_text("left over")
    names = image_files(folder)
    assert names == sorted(names)
    assert len(names) == 7
