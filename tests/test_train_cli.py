import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

import prune
import train
from Compression import losses
from Compression.run import evaluation, option_kinds
from Compression.training import Trainer
from Dataset.images import Images
from Evaluation.feature_sets import sampled_features
from Evaluation.feature_statistics import statistics_of
from Evaluation.features import Extractor
from Evaluation.fid import distance
from Model import checkpoint
from Model.bundled import PARSER
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator
from tests.test_optimisation import NanGradient
from train_hyperparams import TrainConfig
from Util.plot_log import main as plot_main
from Util.run_log import BEST, TIMING, checkpoints, newest_checkpoint, read_config, read_metrics

FACES = os.path.relpath(PARSER)  # the repository's path may have spaces

DISTANCE = "frechet_parser_distance"
SMALL = (
    "--size 8 --style_dim 8 --n_mlp 2 --channels 6,5,4,4 --batch_size 4 --workers 0 --device cpu"
)


def run(folder, flags, out="run"):
    return train.main([*f"--path {folder}/data --out {folder}/{out} {flags}".split()])


def test_training_from_scratch_writes_a_run(folder):
    assert (
        run(folder, f"{SMALL} --iter 4 --log_freq 2 --val_sample_freq 2 --model_save_freq 2") == 0
    )
    assert [row["iteration"] for row in read_metrics(folder / "run")] == [2, 4]
    written = {str(f.relative_to(folder / "run")) for f in (folder / "run").rglob("*.*")}
    assert written == {
        ".lock", "config.json", "metrics.jsonl", "samples/000002.png", "samples/000004.png",
        "checkpoints/000002.pt", "checkpoints/000004.pt",
    }  # fmt: skip
    config = json.loads((folder / "run" / "config.json").read_text())["config"]
    assert config["channels"] == [6, 5, 4, 4]
    assert checkpoint.load_generator(folder / "run/checkpoints/000004.pt").channels == (6, 5, 4, 4)
    assert plot_main([str(folder / "run"), "--out", str(folder / "curve.png")]) == 0
    assert Image.open(folder / "curve.png").width > 400


@pytest.fixture
def measured(monkeypatch):
    """Flags for a Frechet distance of three features, one for each colour."""

    def colours(*args):
        return Extractor(lambda x: x.mean(dim=(2, 3)), "parser", "colours")

    monkeypatch.setattr(evaluation, "make_extractor", colours)
    return f"--fid_n_sample 20 --fid_features parser --parser_ckpt {FACES} --model_save_freq 2"


def interrupted(calls, at):
    """Make the features of `measured`, which note their batches; a signal comes in one of them."""

    def colours(x):
        calls.append(len(x))
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return x.mean(dim=(2, 3))

    return lambda *args: Extractor(colours, "parser", "colours")


def distances(folder):
    return {r["iteration"]: r[DISTANCE] for r in read_metrics(folder) if DISTANCE in r}


def test_the_best_checkpoint_is_kept(folder, measured):
    flags = f"{SMALL} {measured} --keep_checkpoints 1 --lr 0.05"
    assert run(folder, f"{flags} --iter 8") == 0
    values = distances(folder / "run")
    assert list(values) == [2, 4, 6, 8]
    best = min(values, key=values.get)
    content = checkpoint.read(folder / "run" / BEST)
    assert content["train_state"]["iteration"] == best
    features = sampled_features(
        checkpoint.load_generator(content), evaluation.make_extractor(), 20, batch_size=7, seed=0
    )
    images = Images(folder / "data", 8)
    real = torch.stack([images[i, False] for i in range(5)]).mean(dim=(2, 3)).numpy()
    expected = distance(statistics_of(features, {}), statistics_of(real, {}))
    assert values[best] == pytest.approx(expected, rel=1e-3)


def test_measuring_leaves_the_training_as_it_was(folder, measured):
    assert run(folder, f"{SMALL} {measured} --iter 4", "measured") == 0
    assert run(folder, f"{SMALL} --iter 4", "bare") == 0
    ours, bare = (checkpoint.read(newest_checkpoint(folder / x)) for x in ("measured", "bare"))
    torch.testing.assert_close(ours["g"], bare["g"], rtol=0, atol=0)


def test_a_resumed_run_measures_the_same(folder, measured):
    assert run(folder, f"{SMALL} {measured} --iter 6", "whole") == 0
    assert run(folder, f"{SMALL} {measured} --iter 3", "parts") == 0
    assert train.main(f"--resume {folder}/parts --iter 6".split()) == 0
    assert distances(folder / "whole").items() <= distances(folder / "parts").items()


def assert_same_run(a, b, iteration):
    """Weights and log of two runs are equal to the bit, but for the speed."""
    first, second = (checkpoint.read(run / f"checkpoints/{iteration:06d}.pt") for run in (a, b))
    for network in ("g", "g_ema", "d"):
        for key, value in first[network].items():
            torch.testing.assert_close(second[network][key], value, rtol=0, atol=0)
    logs = [
        [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(r)]
        for r in (a, b)
    ]
    assert logs[0] == logs[1]


def test_a_resumed_run_ends_like_an_uninterrupted_one(folder):
    flags = f"{SMALL} --iter 7 --log_freq 2 --model_save_freq 3"
    assert run(folder, flags) == 0
    shutil.copytree(folder / "run", folder / "part")
    for lost in ("000006.pt", "000007.pt"):
        (folder / "part" / "checkpoints" / lost).unlink()
    with open(folder / "part" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 8, "d_lo')  # cut off by a crash
    assert train.main(["--resume", str(folder / "part")]) == 0
    assert_same_run(folder / "run", folder / "part", 7)


def test_resuming_by_the_original_flags_or_from_one_checkpoint(folder):
    flags = f"{SMALL} --iter 6 --log_freq 2 --model_save_freq 2"
    assert run(folder, flags) == 0
    start = folder / "run/checkpoints/000002.pt"
    original = f"--ckpt {start} --load_train_state --batch_size 4 --workers 0 --device cpu --iter 6"
    assert run(folder, original, "other") == 0
    first, second = (
        checkpoint.read(folder / r / "checkpoints/000006.pt") for r in ("run", "other")
    )
    for key, value in first["g"].items():
        torch.testing.assert_close(second["g"][key], value, rtol=0, atol=0)
    shutil.copytree(folder / "run", folder / "again")
    assert train.main(["--resume", str(folder / "again/checkpoints/000004.pt")]) == 0
    assert_same_run(folder / "run", folder / "again", 6)


def test_a_run_without_a_checkpoint_resumes_from_its_start(folder):
    assert run(folder, f"{SMALL} --iter 2") == 0
    shutil.copytree(folder / "run", folder / "young")
    shutil.rmtree(folder / "young" / "checkpoints")
    assert train.main(["--resume", str(folder / "young")]) == 0
    assert_same_run(folder / "run", folder / "young", 2)


def test_a_longer_run_is_a_resumed_one_with_another_iter(folder):
    assert run(folder, f"{SMALL} --iter 2") == 0
    assert train.main(["--resume", str(folder / "run"), "--iter", "3"]) == 0
    assert (folder / "run/checkpoints/000003.pt").is_file()


def test_a_dry_run_keeps_nothing(folder, capsys):
    before = set(folder.rglob("*"))
    assert run(folder, f"{SMALL} --dry_run") == 0
    assert set(folder.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "dry run: all is well" in printed
    assert "GiB" in printed


def test_old_checkpoints_go(folder):
    assert run(folder, f"{SMALL} --iter 5 --model_save_freq 1 --keep_checkpoints 2") == 0
    assert [p.name for p in checkpoints(folder / "run")] == ["000004.pt", "000005.pt"]


def test_a_full_disk_leaves_the_last_good_checkpoint(folder, monkeypatch, capsys):
    real_save = torch.save

    def full(content, file):
        if content["train_state"]["iteration"] == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        real_save(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert run(folder, f"{SMALL} --iter 3 --model_save_freq 1") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in message
    assert "the last good checkpoint is" in message
    assert [p.name for p in checkpoints(folder / "run")] == ["000001.pt"]


@pytest.mark.parametrize(
    ("number", "log_freq"),
    [(signal.SIGINT, 2), (signal.SIGTERM, 4), (signal.SIGHUP, 2), (signal.SIGUSR1, 2)],
)
def test_a_signal_ends_the_run_with_a_checkpoint(folder, monkeypatch, number, log_freq):
    iterate = Trainer.iterate

    def interrupted(trainer, real):
        if trainer.iteration == 2:
            signal.raise_signal(number)
        return iterate(trainer, real)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    assert run(folder, f"{SMALL} --iter 5 --log_freq {log_freq}") == 128 + number
    assert [p.name for p in checkpoints(folder / "run")] == ["000003.pt"]
    monkeypatch.undo()
    assert train.main(["--resume", str(folder / "run")]) == 0
    assert run(folder, f"{SMALL} --iter 5 --log_freq {log_freq}", "whole") == 0
    assert_same_run(folder / "whole", folder / "run", 5)


def test_sigusr2_writes_a_checkpoint_and_the_run_goes_on(folder, monkeypatch):
    iterate = Trainer.iterate

    def asked(trainer, real):
        if trainer.iteration == 2:
            signal.raise_signal(signal.SIGUSR2)
        return iterate(trainer, real)

    monkeypatch.setattr(Trainer, "iterate", asked)
    assert run(folder, f"{SMALL} --iter 5 --log_freq 2") == 0
    assert [p.name for p in checkpoints(folder / "run")] == ["000003.pt", "000005.pt"]
    monkeypatch.undo()
    assert run(folder, f"{SMALL} --iter 5 --log_freq 2", "whole") == 0
    assert_same_run(folder / "whole", folder / "run", 5)


def test_a_signal_ends_a_measurement_which_the_resumed_run_makes_up_for(
    folder, measured, monkeypatch
):
    flags = f"{SMALL} {measured} --iter 6 --fid_batch 4"
    assert run(folder, flags, "whole") == 0
    make, calls = evaluation.make_extractor, []

    # After 5 real images, 5 times 4 generated ones each time.
    monkeypatch.setattr(evaluation, "make_extractor", interrupted(calls, 7))
    assert run(folder, flags) == 143
    assert sum(calls) < 20 + 20
    assert not distances(folder / "run").keys() & {4, 6}
    kept = [p.name for p in checkpoints(folder / "run")]
    monkeypatch.setattr(evaluation, "make_extractor", make)
    assert train.main(f"--resume auto {flags} --path {folder}/data --out {folder}/run".split()) == 0
    assert [p.name for p in checkpoints(folder / "run")] == ["000002.pt", "000004.pt", "000006.pt"]
    assert kept == [p for p in ("000002.pt", "000004.pt") if p in kept] != []
    assert distances(folder / "run") == distances(folder / "whole")
    best = [checkpoint.read(folder / name / BEST)["train_state"] for name in ("run", "whole")]
    assert best[0]["iteration"] == best[1]["iteration"]


def test_a_signal_in_the_last_measurement_is_no_success(folder, measured, monkeypatch, capsys):
    flags = f"{SMALL} {measured} --iter 3 --fid_batch 4"
    assert run(folder, flags, "whole") == 0
    make, calls = evaluation.make_extractor, []

    # After 5 real images and the 5 batches of iteration 2.
    monkeypatch.setattr(evaluation, "make_extractor", interrupted(calls, 9))
    assert run(folder, flags) == 143
    assert [p.name for p in checkpoints(folder / "run")] == ["000002.pt", "000003.pt"]
    assert list(distances(folder / "run")) == [2]
    monkeypatch.setattr(evaluation, "make_extractor", make)
    again = f"--resume auto {flags} --path {folder}/data --out {folder}/run".split()
    assert train.main(again) == 0
    assert distances(folder / "run") == distances(folder / "whole")
    capsys.readouterr()
    assert train.main(again) == 0
    assert "already at iteration 3" in capsys.readouterr().out


def test_resume_auto_starts_goes_on_and_has_nothing_left_to_do(folder, capsys):
    again = f"{SMALL} --resume auto --log_freq 2"
    assert run(folder, f"{again} --iter 2") == 0
    for _ in range(2):
        assert run(folder, f"{again} --iter 5") == 0
    assert run(folder, f"{SMALL} --log_freq 2 --iter 5", "whole") == 0
    assert_same_run(folder / "whole", folder / "run", 5)
    assert train.main(f"--path {folder}/data {again}".split()) == 2
    assert "--resume auto looks into the run's folder; name it with out" in capsys.readouterr().err
    config = train.parse_config(f"--resume auto --recipe none --out {folder}/run".split())
    assert config.resume == str(folder / "run")


def test_the_state_before_a_loss_that_is_not_finite_is_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "Compression.losses.g_nonsaturating_loss", lambda logits: logits.mean() * torch.inf
    )
    assert run(folder, f"{SMALL} --iter 5") == 2
    kept = folder / "run/before_non_finite_000000.pt"
    assert str(kept) in capsys.readouterr().err
    assert checkpoint.load_generator(kept).channels == (6, 5, 4, 4)


def test_the_state_before_a_gradient_that_is_not_finite_goes_on(folder, monkeypatch, capsys):
    calls = itertools.count()
    loss = losses.g_nonsaturating_loss

    def poisoned(logits):
        return NanGradient.apply(loss(logits)) if next(calls) >= 2 else loss(logits)

    monkeypatch.setattr(losses, "g_nonsaturating_loss", poisoned)
    assert run(folder, f"{SMALL} --iter 5") == 2
    kept = folder / "run/before_non_finite_000002.pt"
    error = capsys.readouterr().err
    assert str(kept) in error
    assert "the gradient of the generator loss (" in error
    monkeypatch.undo()
    assert train.run_folder(str(kept)) == folder / "run"
    assert run(folder, f"{SMALL} --iter 5 --ckpt {kept} --load_train_state", "next") == 0
    assert [p.name for p in checkpoints(folder / "next")] == ["000005.pt"]
    rows = read_metrics(folder / "next")
    assert run(folder, f"{SMALL} --iter 6 --ckpt {kept} --load_train_state", "next") == 2
    assert "next holds a run already; name another folder" in capsys.readouterr().err
    assert read_metrics(folder / "next") == rows


def test_a_resumed_run_keeps_its_number_of_threads(folder):
    before = torch.get_num_threads()
    try:
        assert run(folder, f"{SMALL} --iter 1 --n_sample 1 --threads 2") == 0
        torch.set_num_threads(1)
        assert train.main(f"--resume {folder}/run --iter 2".split()) == 0
        assert torch.get_num_threads() == read_config(folder / "run")["threads"] == 2
        assert train.main(f"--resume {folder}/run --iter 3 --threads 1".split()) == 0
        assert torch.get_num_threads() == read_config(folder / "run")["threads"] == 1
        made = checkpoint.read(newest_checkpoint(folder / "run"))["config"]["training"]
        assert "threads" not in made
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_an_uninterrupted_one(folder):
    flags = f"{SMALL} --iter 4000 --log_freq 7 --model_save_freq 25 --keep_checkpoints 2".split()
    script = [sys.executable, train.__file__]
    where = ["--path", f"{folder}/data", "--out"]
    whole, killed = folder / "whole", folder / "killed"
    started = time.perf_counter()
    subprocess.run([*script, *where, str(whole), *flags], check=True)
    length = time.perf_counter() - started
    command, rng = [*script, *where, str(killed), *flags], random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(command)
        while process.poll() is None and not (killed / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.4, 0.3 * length))
        process.kill()
        process.wait()
        command = [*script, "--resume", str(killed)]
    subprocess.run(command, check=True)
    assert_same_run(whole, killed, 4000)


@pytest.mark.parametrize(("mode", "n_classes"), [("Output_Only", 19), ("Intermediate", 5)])
def test_distillation_with_mask_and_parser_features(folder, mode, n_classes):
    teacher = Generator(8, 8, 2, channels=(6, 5, 4, 4))
    student = Generator(8, 8, 2, channels=(3, 3, 2, 2))
    parser = BiSeNet(n_classes, width=4, stem_stride=2, input_size=32)
    d = Discriminator(8, channels=(5, 4))
    checkpoint.save(folder / "teacher.pt", {"g_ema": teacher, "d": d})
    checkpoint.save(folder / "student.pt", {"g": student, "g_ema": student})
    checkpoint.save(folder / "parser.pt", {"parser": parser, "config": parser.config})
    flags = (
        f"--ckpt {folder}/student.pt --teacher_ckpt {folder}/teacher.pt --perceptual parser"
        f" --parser_ckpt {folder}/parser.pt --iter 2 --batch_size 2 --log_freq 1 --kd_mode {mode}"
    )
    assert run(folder, f"{flags} --workers 0 --device cpu") == 0
    last = read_metrics(folder / "run")[-1]
    assert last["kd_l1"] >= 0
    assert last["kd_parser"] >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size 48", "power of two"),
        ("--batch_size 0", "--batch_size must be at least 1, not 0"),
        ("--mixing 2", "--mixing"),
        ("--content_aware_KD maybe", "'maybe' is neither True nor False"),
        ("--kd_mode both", "--kd_mode"),
        ("--channels 4,x", "integers separated by commas"),
        ("--size 16 --channels 4,4", "6 positive channel counts"),
        ("--ckpt nowhere.pt", "--ckpt nowhere.pt: no such file"),
        ("--size 8 --teacher_ckpt nowhere.pt", "--teacher_ckpt nowhere.pt: no such file"),
        ("--load_train_state", "--load_train_state goes with ckpt"),
        ("--fid_n_sample 9 --inception_ckpt none.pth", "none.pth: no such file"),
        (
            "--fid_n_sample 9 --fid_features parser",
            "79999_iter.pth is missing; put the face parser",
        ),
        ("--fid_n_sample 1", "--fid_n_sample 1: one image has no covariance"),
        ("--device tpu", "--device tpu"),
        ("--cuda_graphs", "--cuda_graphs replays what --compile compiles; give that too"),
        ("--cuda_graphs --compile --device cpu", "this run is on cpu; leave it out"),
        ("--path none", "--path none: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, flags, message):
    try:
        code = run(folder, f"--size 8 --iter 1 --workers 0 {flags}")
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (folder / "run").exists()


def test_a_finished_run_is_not_overwritten(folder, capsys):
    assert run(folder, f"{SMALL} --iter 1") == 0
    assert run(folder, f"{SMALL} --iter 1") == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("", True), ("False", False), ("true", True)])
def test_flags_of_type_bool_are_what_they_say(text, value):
    argv = f"--path . --content_aware_KD {text}".split()
    assert train.parse_config(argv).content_aware_KD is value


def test_every_setting_has_a_flag_and_the_papers_defaults_hold():
    config = train.parse_config(["--path", "."])
    assert replace(config, options=()) == TrainConfig(path=".")
    assert config.options == tuple(kind() for kind in option_kinds())
    assert (config.lr, config.r1, config.path_regularize, config.mixing) == (0.002, 10, 2, 0.9)
    assert (config.kd_l1_lambda, config.kd_lpips_lambda, config.batch_size) == (3, 3, 16)


@pytest.mark.slow
def test_several_processes_stop_together_on_a_signal_and_resume(folder):
    run_folder = folder / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = f"--path {folder}/data --out {run_folder} {SMALL} --workers 1 --iter 100000"
    process = subprocess.Popen([*launcher, train.__file__, *flags.split(), "--log_freq", "10"])
    while process.poll() is None and not (run_folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.terminate()
    process.wait()
    (stopped,) = checkpoints(run_folder)
    iteration = int(stopped.stem)
    assert 10 <= iteration < 100_000
    assert len(checkpoint.read(stopped)["train_state"]["rng"]) == 2
    again = ["--resume", str(run_folder), "--iter", str(iteration + 3)]
    subprocess.run([*launcher, train.__file__, *again], check=True)
    assert [int(p.stem) for p in checkpoints(run_folder)] == [iteration, iteration + 3]


def without_train_state(path, name):
    """A checkpoint as the original code writes it."""
    content = checkpoint.read(path)
    del content["train_state"]
    checkpoint.save(path.with_name(name), content)
    return path.with_name(name)


def test_a_run_of_the_original_code_goes_on(folder, capsys):
    assert run(folder, f"{SMALL} --iter 3") == 0
    old = without_train_state(folder / "run/checkpoints/000003.pt", "000120.pt")
    flags = "--load_train_state --batch_size 4 --workers 0 --device cpu --log_freq 1 --iter 122"
    assert run(folder, f"--ckpt {old} {flags}", "more") == 0
    assert "going on at iteration 120, as its name says" in capsys.readouterr().out
    assert [row["iteration"] for row in read_metrics(folder / "more")] == [121, 122]
    steps = checkpoint.read(folder / "more/checkpoints/000122.pt")["d_optim"]["state"][0]["step"]
    assert steps == 3 + 1 + 2  # the first iteration had R1 too
    assert (
        checkpoint.read(folder / "more/checkpoints/000122.pt")["train_state"]["images_seen"] == 488
    )
    nameless = without_train_state(folder / "run/checkpoints/000003.pt", "best.pt")
    assert run(folder, f"--ckpt {nameless} {flags}", "none") == 2
    assert "no 'train_state' in the checkpoint" in capsys.readouterr().err


def test_a_pruned_checkpoint_asks_for_its_teacher(folder, capsys):
    assert run(folder, f"{SMALL} --iter 1") == 0
    full = folder / "run/checkpoints/000001.pt"
    small = folder / "small.pt"
    assert prune.main(f"--ckpt {full} --metric random --device cpu --out {small}".split()) == 0
    flags = f"--ckpt {small} --batch_size 4 --workers 0 --device cpu --iter 1"
    assert run(folder, flags, "asked") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"train.py: error: --teacher_ckpt is missing; {small} was pruned")
    assert not (folder / "asked").exists()
    assert run(folder, f"{flags} --teacher_ckpt none", "alone") == 0
    assert "kd_l1" not in read_metrics(folder / "alone")[-1]


def test_flags_of_the_original_code_are_known():
    config = train.parse_config(["--path", ".", "--latent", "64", "--channel_multiplier", "1"])
    assert (config.style_dim, config.channel_multiplier) == (64, 1)
    assert train.parse_config(["--batch", "7"]).batch_size == 7


def test_a_run_from_before_the_filter_was_chosen_keeps_its_own(folder):
    (folder / "old").mkdir()
    (folder / "old/config.json").write_text(json.dumps({"config": {"path": "x", "seed": 5}}))
    config = train.parse_config(["--resume", str(folder / "old")])
    assert (config.seed, config.resample) == (5, "lanczos")
    assert train.parse_config([]).resample == "bilinear"
