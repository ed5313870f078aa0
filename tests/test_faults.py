"""What was there stays valid: writers killed at any byte, full disks, dead workers, two at once.

A child process is forked for every fault, with a limit on the size of files: the kernel ends it, or
fails its writing, at exactly that byte, whoever writes.
"""

import fcntl
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

import prune
import train
from Compression import pruning
from Compression import run as run_module
from Dataset import DatasetError, loading, prepare_data, toon_faces
from Dataset.batches import EndlessBatches
from Dataset.images import Images
from Dataset.prepare_data import PrepareSettings, prepare
from Evaluation import feature_statistics
from Evaluation.distances import load_lpips
from Evaluation.feature_statistics import Statistics
from Model import bundled, checkpoint, downloads
from Model.checkpoint import CheckpointError
from tests.hostile import make_files
from Util import files
from Util.animation import save_gif
from Util.files import PREFIX, atomic_path, lock_folder
from Util.pictures import save_png
from Util.plot_log import plot
from Util.run_log import RunLog, checkpoints, newest_checkpoint, read_config, read_metrics
from Util.settings import SettingError

ROOT = Path(__file__).parent.parent


def in_child(action, *before):
    """Run an action in a forked process; returns its wait status, 0 if it ended well."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for step in before:
                step()
            action()
            status = 0
        except OSError:
            status = 2
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def limit(size, killed):
    """No file of this process may grow beyond ``size`` bytes."""

    def step():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return step


def killed_before(module, name):
    """The process is killed when it calls this function."""

    def step():
        setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

    return step


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def of_checkpoint(path, version):
    checkpoint.save(path, {"x": torch.full((5000,), float(version)), "version": version})


def of_statistics(path, version):
    rng = np.random.default_rng(version)
    features = rng.standard_normal((80, 40)).astype(np.float32)
    feature_statistics.save(path, Statistics(np.full(40, float(version)), np.eye(40), features))


def of_png(path, version):
    save_png(path, NOISE if version == 1 else 255 - NOISE)


def of_gif(path, version):
    save_gif(path, [NOISE if version == 1 else 255 - NOISE] * 2)


def of_plot(path, version):
    run = path.with_name("plotted")
    run.mkdir(exist_ok=True)
    rows = [{"iteration": i, "d_loss": i * version} for i in range(3)]
    if not (run / "metrics.jsonl").exists():
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot([run], path)


def version_of_checkpoint(path):
    content = checkpoint.read(path)
    assert (content["x"] == content["version"]).all()
    return content["version"]


def version_of_picture(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return 1 if np.abs(pixels - NOISE).mean() < 20 else 2


WRITERS = {
    "checkpoint.pt": (of_checkpoint, version_of_checkpoint),
    "statistics.npz": (of_statistics, lambda path: int(feature_statistics.load(path).mean[0])),
    "picture.png": (of_png, version_of_picture),
    "animation.gif": (of_gif, version_of_picture),
}


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "disk full"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_fails_at_any_byte_leaves_the_old_file(tmp_path, name, killed):
    write, version = WRITERS[name]
    path = tmp_path / name
    write(path, 2)
    size = path.stat().st_size
    write(path, 1)
    for at in (0, 1, size // 3, size // 2, size - 1):
        status = in_child(lambda: write(path, 2), limit(at, killed))
        assert os.WIFSIGNALED(status) if killed else os.WEXITSTATUS(status) == 2, (at, status)
        assert version(path) == 1
        left = [f.name for f in tmp_path.iterdir() if f.name.startswith(PREFIX)]
        assert len(left) == int(killed)  # the next start removes what a killed one could not
    write(path, 2)
    assert version(path) == 2
    assert [f.name for f in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_that_is_killed_at_the_end_leaves_the_old_file(tmp_path, name, call):
    write, version = WRITERS[name]
    write(tmp_path / name, 1)
    status = in_child(lambda: write(tmp_path / name, 2), killed_before(files.os, call))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert version(tmp_path / name) == 1


def test_a_plot_on_a_full_disk_leaves_none(tmp_path):
    status = in_child(lambda: of_plot(tmp_path / "curve.png", 1), limit(5000, killed=False))
    assert os.WEXITSTATUS(status) == 2
    assert not (tmp_path / "curve.png").exists()


def test_what_is_being_written_is_no_left_over(tmp_path):
    """Two processes write into one folder; one does not remove the other's unfinished file."""
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("mine")
        assert in_child(lambda: of_checkpoint(tmp_path / "b.pt", 1)) == 0
        assert temporary.exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "b.pt"]


def test_left_overs_that_are_no_files_are_left(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    (tmp_path / f"{PREFIX}link").symlink_to("precious.txt")
    (tmp_path / f"{PREFIX}folder").mkdir()
    of_checkpoint(tmp_path / "b.pt", 1)
    assert (tmp_path / "precious.txt").read_text() == "x"
    assert (tmp_path / f"{PREFIX}folder").is_dir()


@pytest.mark.parametrize("kind", ["local", "nfs", "none"])
def test_a_file_that_is_being_written_stays_whatever_the_locks(tmp_path, monkeypatch, kind):
    real = files.fcntl.flock

    def flock(handle, how):
        if kind == "none":
            raise OSError(38, "Function not implemented")
        if kind == "nfs" and files.fcntl.fcntl(handle, files.fcntl.F_GETFL) & 3 == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")  # flock(2): it must be open for writing
        real(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with atomic_path(tmp_path / "a.txt") as one:
        one.write_text("a")
        with atomic_path(tmp_path / "b.txt") as other:
            other.write_text("b")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"a.txt": "a", "b.txt": "b"}


# The log of a run


def log_of(folder):
    return RunLog(
        folder,
        {"seed": 1},
        checkpoint.save,
        resume_at=2 if (folder / "metrics.jsonl").exists() else None,
    )


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "disk full"])
def test_a_log_line_cut_off_at_any_byte_is_dropped(tmp_path, killed):
    log = log_of(tmp_path)
    for i in (1, 2):
        log.metrics(i, {"d_loss": 0.5})
    log.close()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    for more in (1, 15, 30):
        whole = (tmp_path / "metrics.jsonl").read_bytes()
        config = (tmp_path / "config.json").stat().st_size
        assert config > size  # or the limit would strike elsewhere

        def write(log=None):
            log = log or RunLog.__new__(RunLog)
            log.folder, log.events = tmp_path, None
            log.metrics(3, {"d_loss": 0.25})

        status = in_child(write, limit(size + more, killed))
        assert os.WIFSIGNALED(status) if killed else os.WEXITSTATUS(status) == 2
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + more
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2]
        log_of(tmp_path).close()  # a resumed run
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        assert read_config(tmp_path) == {"seed": 1}


def test_a_run_taken_up_from_an_earlier_checkpoint_leaves_the_later_ones_aside(tmp_path):
    first = RunLog(tmp_path, {}, checkpoint.save, best_by="fid")
    for iteration, fid in ((100, 3.0), (200, 4.0), (300, 2.0)):
        first.metrics(iteration, {"fid": fid})
        first.checkpoint(iteration, {"config": {"iteration": iteration}})
    first.close()
    again = RunLog(tmp_path, {}, checkpoint.save, resume_at=200, keep=2, best_by="fid")
    best = lambda: checkpoint.read(tmp_path / "best.pt")["config"]["iteration"]  # noqa: E731
    assert best() == 100
    again.metrics(220, {"fid": 3.5})
    again.checkpoint(220, {"config": {"iteration": 220}})
    again.close()
    assert [p.name for p in checkpoints(tmp_path)] == ["000200.pt", "000220.pt"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/000220.pt"
    assert best() == 100
    assert (tmp_path / "checkpoints/000300.pt.aside").is_file()


# LMDB


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "disk full"])
def test_an_lmdb_is_completed_after_a_fault_at_any_byte(pictures, tmp_path, monkeypatch, killed):
    monkeypatch.setattr(prepare_data, "CHUNK_PIXELS", 16**2)

    def encoded(settings, chunks, workers):
        yield from (prepare_data._encode_files(settings, chunk) for chunk in chunks)

    monkeypatch.setattr(prepare_data, "_encoded", encoded)

    def make(out):
        return prepare(PrepareSettings(path=pictures, out=out, size=(16,)), progress=False)

    make(tmp_path / "whole")
    expected = [Images(tmp_path / "whole", 16)[i, False] for i in range(1)]
    size = (tmp_path / "whole/data.mdb").stat().st_size
    for at in (4096, size // 4, size // 2, size - 4096):
        out = tmp_path / f"lmdb{at}"

        def attempt(out=out):
            try:
                make(out)
            except SettingError:
                raise OSError from None

        # A write that reaches the limit in its middle is cut short without a signal.
        assert in_child(attempt, limit(at, killed)) != 0
        with pytest.raises(
            DatasetError, match=r"only \d of 8|make it again|make one with|holds no images"
        ):
            Images(out, 16)
        assert make(out).length == 8
        torch.testing.assert_close(Images(out, 16)[0, False], expected[0], rtol=0, atol=0)


# Workers


class Deadly(Images):
    """Kills the process that loads image 3, unless that is the main one."""

    def pixels(self, item):
        if get_worker_info() and item[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pixels(item)


def test_a_killed_loader_leaves_a_checkpoint(pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_module, "Images", Deadly)
    small = "--size 16 --style_dim 8 --n_mlp 1 --channels 4,4,4,4,4,4 --batch_size 1"
    where = f"--path {pictures} --out {tmp_path}/run --device cpu --workers 1 --iter 99"
    assert train.main(f"{small} {where}".split()) == 2
    lines = [x for x in capfd.readouterr().err.replace("\r", "\n").splitlines() if "error" in x]
    assert len(lines) == 1
    assert f"{pictures}: a loading process was killed" in lines[0]
    order = [batch[0][0] for batch, _ in zip(EndlessBatches(8, 1), range(8), strict=False)]
    (kept,) = checkpoints(tmp_path / "run")
    assert 0 <= int(kept.stem) <= order.index(3)
    train_again = f"--resume {tmp_path}/run --workers 0 --iter {order.index(3) + 2}"
    assert train.main(train_again.split()) == 0


def batches_until(error, pictures):
    def fetch():
        yield torch.zeros(1)
        raise error

    batches = loading._fetched(fetch(), pictures)
    next(batches)
    return batches


@pytest.mark.parametrize(
    "error", [EOFError, ConnectionResetError, ConnectionRefusedError, FileNotFoundError]
)
def test_a_loader_killed_while_its_batch_is_fetched(pictures, error):
    batches = batches_until(error, pictures)
    with pytest.raises(DatasetError, match=f"^{pictures}: a loading process was killed"):
        next(batches)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of memory"), OSError("Caught OSError in DataLoader worker process 0.")],
)
def test_errors_of_a_living_loader_are_not_taken_for_its_death(pictures, error):
    batches = batches_until(error, pictures)
    with pytest.raises(type(error), match=str(error)):
        next(batches)


def test_a_failed_run_with_loading_processes_ends(tmp_path):
    """Python waits for its children at the exit; they must not wait for it."""
    (tmp_path / "data").mkdir()
    for i in range(12):
        (tmp_path / f"data/{i}.png").write_text("no image")
    small = "--size 8 --style_dim 8 --n_mlp 1 --channels 4,4,4,4 --batch_size 2 --device cpu"
    where = f"--path {tmp_path}/data --out {tmp_path}/run --iter 2 --workers 2"
    command = [sys.executable, str(ROOT / "train.py"), *small.split(), *where.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "more than 10 unreadable images" in result.stderr


def test_a_killed_renderer_is_one_line(tmp_path, monkeypatch, capfd):
    class Broken:
        def __init__(self, *_):
            self.pool = toon_faces.BrokenProcessPool

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, *_):
            raise self.pool("died")

    monkeypatch.setattr(toon_faces, "worker_pool", Broken)
    with pytest.raises(toon_faces.ToonFacesError, match="a worker was killed"):
        toon_faces.render_dataset(toon_faces.ToonFacesSettings(out=tmp_path, n=1), progress=False)


# Two at once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_files(folder)
    return folder


def short(folder, more):
    flags = f"--path {folder}/data --ckpt {folder}/model.pt --iter 1 --batch_size 2 --workers 0"
    return [*flags.split(), "--device", "cpu", *more.split()]


def test_two_runs_of_one_second_get_two_folders(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        run_module.time, "strftime", lambda text: text.replace("%Y%m%d-%H%M%S", "now")
    )
    assert [train.main(short(run, "")) for _ in range(3)] == [0, 0, 0]
    assert sorted(f.name for f in (tmp_path / "runs").iterdir()) == ["now", "now-2", "now-3"]
    assert all(len(checkpoints(f)) == 1 for f in (tmp_path / "runs").iterdir())


def test_two_prunings_of_one_second_get_two_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "PRUNED_FOLDER", tmp_path)
    monkeypatch.setattr(pruning.time, "strftime", lambda _: "now")
    flags = f"--ckpt {run}/model.pt --metric random --device cpu --seed".split()
    assert [prune.main([*flags, str(seed)]) for seed in (0, 1, 2)] == [0, 0, 0]
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {f"random_0.7_8px_now{i}.pt" for i in ("", "-2", "-3")}
    seeds = {checkpoint.read(f)["config"]["seed"] for f in tmp_path.iterdir()}
    assert seeds == {0, 1, 2}


@pytest.mark.parametrize("more", ["--out {0}", "--resume {0} --iter 3"])
def test_a_folder_that_is_being_trained_in_is_refused(run, tmp_path, capsys, more):
    folder = tmp_path / "run"
    assert train.main(short(run, f"--out {folder}")) == 0
    if "resume" not in more:
        (folder / "metrics.jsonl").unlink()  # before its first line, a run is seen by its lock
    handle = lock_folder(folder)
    before = {f: f.read_bytes() for f in folder.rglob("*.*")}
    argv = more.format(folder).split() if "resume" in more else short(run, more.format(folder))
    assert train.main(argv) == 2
    assert "another process is training there" in capsys.readouterr().err
    assert {f: f.read_bytes() for f in folder.rglob("*.*")} == before
    os.close(handle)
    assert train.main(argv) == 0


def test_what_is_locked_can_be_locked_over_nfs(tmp_path):
    # Over NFS, only files that are open for writing can be locked.
    handle = lock_folder(tmp_path)
    assert stat.S_ISREG(os.fstat(handle).st_mode)
    assert fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    assert lock_folder(tmp_path) is None
    os.close(handle)


def test_the_lock_ends_with_a_killed_process(tmp_path):
    def die():
        lock_folder(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(die)) == signal.SIGKILL
    handle = lock_folder(tmp_path)
    assert handle is not None
    os.close(handle)


# No home, no network


def test_without_a_home_everything_but_downloads_works(run, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH_HOME", "XDG_CACHE_HOME")}
    environment |= {"HOME": "/proc/none", "OMP_NUM_THREADS": "1"}
    flags = f"--ckpt {run}/model.pt --parser_ckpt {run}/parser.pt --n_sample 2 --noise_prob 1"
    command = [sys.executable, str(ROOT / "prune.py"), *flags.split(), "--out", f"{tmp_path}/p.pt"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["p.pt"]


def offline(*_, **__):
    raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")


@pytest.mark.parametrize("name", ["vgg", "alex", "squeeze"])
def test_without_a_network_the_error_says_what_to_put_where(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CheckpointError) as error:
        load_lpips(name)
    text = str(error.value)
    assert f"{tmp_path}/hub/checkpoints/" in text
    assert "put https://download.pytorch.org/models/" in text
    assert "perceptual_ckpt" in text
    assert not list(tmp_path.rglob("*.pth*"))


def test_a_download_is_verified_and_appears_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    content = os.urandom(9999)
    good = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    good.write_bytes(content)
    file = downloads.downloaded(f"file://{good}", "or else")
    assert file.read_bytes() == content
    assert [f.name for f in file.parent.iterdir()] == [good.name]
    bad = tmp_path / "net-00000000.pth"
    bad.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net-00000000\.pth is missing .* or or else"):
        downloads.downloaded(f"file://{bad}", "or else")
    assert [f.name for f in file.parent.iterdir()] == [good.name]


def test_of_several_processes_one_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    log = tmp_path / "log"

    def slow(url, to, **_):
        with open(log, "a") as stream:
            stream.write("x")
        time.sleep(0.3)
        Path(to).write_text("weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)

    def download():
        file = downloads.downloaded("https://somewhere/net.pth", "or else")
        assert file.read_text() == "weights"

    child = os.fork()
    if child == 0:
        os._exit(in_child(download))
    download()
    assert os.waitpid(child, 0)[1] == 0
    assert log.read_text() == "x"


def test_a_home_that_cannot_be_written_is_one_line(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/proc/none")
    with pytest.raises(CheckpointError, match=r"could not be downloaded .*put https"):
        load_lpips("squeeze")
