"""The same seed gives the same bytes: twice in a row, and with another number of loading processes.

Each run starts with another global random state and at another time of day, since neither may show.
"""

import time

import pytest
import torch

import get_fid
import get_projected_image
import prune
import train
from tests.hostile import make_files
from Util.files import LOCK
from Util.run_log import TIMING, read_metrics


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    make_files(folder)
    return folder


@pytest.fixture
def elsewhere(monkeypatch):
    """Call before each run: another random state, another time, another line of the log."""
    plain, runs = time.localtime, []

    def change():
        runs.append(0)
        torch.manual_seed(100 + len(runs))
        monkeypatch.setattr(time, "localtime", lambda *_: plain(len(runs) * 86_400.0))

    return change


def contents(folder):
    """Bytes of every result below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (LOCK, "config.json", "metrics.jsonl")
    }


def same(results):
    first, *others = results
    assert first
    for other in others:
        assert other.keys() == first.keys()
        for name, data in first.items():
            assert other[name] == data, name


@pytest.mark.parametrize("metric", ["content_aware", "random", "l1_map"])
def test_prune(files, tmp_path, elsewhere, metric):
    results = []
    for i in range(2):
        elsewhere()
        out = tmp_path / f"{i}/p.pt"
        flags = f"--ckpt {files}/model.pt --metric {metric} --n_sample 5 --batch_size 2 --seed 3"
        more = f"--noise_prob 0.5 --parser_ckpt {files}/parser.pt --device cpu --out {out}"
        assert prune.main([*flags.split(), *more.split()]) == 0
        results.append(contents(out.parent))
    same(results)


def test_train_with_any_number_of_loading_processes(files, tmp_path, elsewhere):
    results, logs = [], []
    for i, workers in enumerate((0, 0, 1, 2)):
        elsewhere()
        out = tmp_path / str(i)
        flags = (
            f"--path {files}/data --ckpt {files}/model.pt --teacher_ckpt {files}/model.pt"
            f" --perceptual parser --parser_ckpt {files}/parser.pt --iter 5 --batch_size 3"
            f" --log_freq 2 --model_save_freq 2 --val_sample_freq 2 --n_sample 4 --device cpu"
            f" --workers {workers} --out {out} --seed 7"
        )
        assert train.main(flags.split()) == 0
        results.append(contents(out))
        rows = read_metrics(out)
        logs.append([{k: v for k, v in row.items() if k not in TIMING} for row in rows])
    same(results)
    assert len(results[0]) == 6  # checkpoints and samples at 2, 4 and 5
    assert all(log == logs[0] for log in logs)


def test_get_fid_with_any_number_of_loading_processes(files, tmp_path, elsewhere, capsys):
    printed, results = [], []
    for i, workers in enumerate((0, 0, 2)):
        elsewhere()
        stats = tmp_path / f"{i}/s.npz"
        flags = (
            f"--ckpt {files}/model.pt --parser_ckpt {files}/parser.pt --features parser"
            f" --path {files}/data --n_sample 60 --batch_size 16 --metrics fid,kid,pr"
            f" --workers {workers} --stats {stats} --device cpu"
        )
        assert get_fid.main(flags.split()) == 0
        printed.append(capsys.readouterr().out)
        results.append(contents(stats.parent))
    same(results)
    assert "Frechet parser distance: " in printed[0]
    assert len(set(printed)) == 1


def test_get_projected_image(files, tmp_path, elsewhere):
    results = []
    for i in range(2):
        elsewhere()
        out = tmp_path / str(i)
        flags = (
            f"--ckpt {files}/model.pt --parser_ckpt {files}/parser.pt --perceptual parser"
            f" --n_sample 2 --num_iters 3 --device cpu --out {out}"
        )
        assert get_projected_image.main(flags.split()) == 0
        results.append(contents(out))
    same(results)
