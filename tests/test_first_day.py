"""What a new user meets: progress, closed pipes, interruptions, messages about what was given."""

import json
import os
import sys

import pytest
import torch

import get_fid
import get_projected_image
import prune
import train
from Evaluation import projecting
from Model import checkpoint
from tests.hostile import make_files
from tests.test_bad_flags import SCRIPTS
from Util import plot_log, progress
from Util.cli import OneLineParser, if_interrupted, run_script
from Util.progress import Progress


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("day")
    make_files(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(files, monkeypatch):
    monkeypatch.chdir(files)


# --- Progress ---


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_where_nobody_watches_a_line_comes_every_half_minute(clock, capsys):
    with Progress(100, "scoring", "img") as bar:
        for _ in range(20):
            clock[0] += 4
            bar.figures("loss 0.5")
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "scoring: 16 of 100 img, 2.0 s/img, 3 min left, loss 0.5",
        "scoring: 32 of 100 img, 2.0 s/img, 2 min left, loss 0.5",
        "scoring: 40 of 100 img in 80 s",
    ]


def test_short_work_and_quiet_work_say_nothing(clock, capsys):
    for seconds, quiet in ((1, False), (100, True)):
        with progress.quietly(quiet), Progress(2, "scoring") as bar:
            clock[0] += seconds
            bar.update(2)
            progress.tell("building")
    assert capsys.readouterr().err == "building\n"


def test_a_terminal_gets_a_bar(terminal, capsys):
    with Progress(5, "scoring", "img") as bar:
        bar.update(5)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (300, "5 min"), (11_100, "3 h 05 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_can_be_quiet(name, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[name][0].main(["--help"])
    assert "--quiet" in capsys.readouterr().out


# --- Output that nobody reads, or Ctrl-C ---


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "demo"])  # takes long
def test_a_closed_pipe_costs_no_result(name, tmp_path, monkeypatch):
    script, flags = SCRIPTS[name]
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [flag.replace("new", str(tmp_path / "new")) for flag in flags.split()]
    more = {"Util.plot_log": "run", "prune": "--n_sample 2 --batch_size 2"}
    arguments = [*more.get(name, "").split(), *arguments]
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert script.main(arguments) == 0
    if any("new" in flag for flag in arguments):
        assert [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_the_shell_has_closed_costs_no_result(name, monkeypatch):
    def work(args):
        with Progress(2, "working", "it") as bar:
            bar.update(2)
        print("done")

    def fail(args):
        raise ValueError("--flag is wrong")

    monkeypatch.setattr(sys, name, None)
    assert run_script(OneLineParser(prog="x.py"), work, []) == 0
    assert run_script(OneLineParser(prog="x.py"), fail, []) == 2
    assert getattr(sys, name) is None


def interrupted(capsys, run):
    code = run_script(OneLineParser(prog="x.py"), run, [])
    return code, capsys.readouterr().err.strip()


def test_an_interruption_says_what_is_kept(capsys):
    def stop(args):
        raise KeyboardInterrupt

    def stop_later(args):
        with if_interrupted(lambda: "3 of 8 are kept"):
            raise KeyboardInterrupt

    assert interrupted(capsys, stop) == (130, "x.py: interrupted; no result has been written")
    assert interrupted(capsys, stop_later) == (130, "x.py: interrupted; 3 of 8 are kept")


def test_warnings_are_a_line_without_the_place_in_the_code(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")

    def warn(args):
        import warnings

        warnings.warn("no compiled operators\nfor CPU", RuntimeWarning, stacklevel=1)

    run_script(OneLineParser(prog="x.py"), warn, [])
    assert capsys.readouterr().err == "x.py: warning: no compiled operators for CPU\n"


PROJECT = (
    "--ckpt model.pt --parser_ckpt parser.pt --perceptual parser --device cpu --num_iters 2"
    " --image_file data --n_sample 5 --batch_size 2"
)


def test_a_projection_goes_on_after_the_finished_pictures(tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert get_projected_image.main([*PROJECT.split(), "--out", str(whole)]) == 0
    calls, project = [], projecting.project

    def interrupt(*args, **options):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return project(*args, **options)

    monkeypatch.setattr(projecting, "project", interrupt)
    flags = [*PROJECT.split(), "--out", str(parts)]
    assert get_projected_image.main(flags) == 130
    assert f"4 of 5 pictures are in {parts}; the same command with --resume" in (
        capsys.readouterr().err
    )
    assert get_projected_image.main([*flags, "--resume", "--num_iters", "3"]) == 2
    assert "made with num_iters 2, not 3" in capsys.readouterr().err
    assert get_projected_image.main([*flags, "--resume"]) == 0
    assert calls == [2, 2, 1, 1]
    for name in (projecting.TABLE, projecting.PICTURE):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_is_not_touched(files, capsys):
    before = {f: f.stat().st_mtime_ns for f in (files / "run").rglob("*")}
    assert train.main(["--resume", "run", "--iter", "1"]) == 0
    assert "run: already at iteration 1, and --iter is 1: nothing" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in (files / "run").rglob("*")} == before


# --- Messages ---


def error_of(capsys, script, flags):
    assert script.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


TRAIN = "--path data --device cpu --workers 0 --iter 2 --batch_size 2 --out new"


def test_another_size_is_blamed_on_what_was_given(capsys):
    line = error_of(capsys, train, "--resume run --iter 2 --size 128")
    assert line.endswith(
        "--size 128 contradicts run/checkpoints/000001.pt, whose images are 8 px; leave it out or"
        " give 8"
    )
    line = error_of(capsys, get_fid, "--ckpt model.pt --path data --features parser"
                    " --parser_ckpt parser.pt --generated_img_size 16")  # fmt: skip
    assert "--generated_img_size 16 contradicts model.pt" in line


def test_a_checkpoint_without_discriminator_shows_the_ways_out(files, tmp_path, capsys):
    bare, small = tmp_path / "bare.pt", tmp_path / "small.pt"
    checkpoint.save(bare, {"g_ema": checkpoint.load_generator("model.pt")})
    assert prune.main(f"--ckpt {bare} --metric random --out {small} --device cpu".split()) == 0
    warned = capsys.readouterr().err
    assert f"{bare} holds no discriminator (d)" in warned
    assert "--teacher_ckpt" in warned
    assert "--discriminator scratch" in warned
    line = error_of(capsys, train, f"{TRAIN} --ckpt {small} --teacher_ckpt none")
    assert f"{small} holds none (d); give a teacher_ckpt that has one, or train with" in line
    flags = f"--ckpt {small} --teacher_ckpt {bare} --content_aware_KD False --perceptual parser"
    line = error_of(capsys, train, f"{TRAIN} {flags} --parser_ckpt parser.pt")
    assert f"{small} holds none (d), nor does {bare}" in line


def test_an_environment_variable_is_blamed_itself(capsys, monkeypatch):
    from Model.ops import dispatch

    monkeypatch.setenv(dispatch.VARIABLE, "nativ")
    line = error_of(capsys, get_fid, "--ckpt model.pt --path data --features parser"
                    " --parser_ckpt parser.pt --device cpu --n_sample 4 --workers 0")  # fmt: skip
    assert line == (
        "get_fid.py: error: STYLEGAN_OPS must be auto, reference or native, not 'nativ'"
    )


def test_pipes_and_programs_are_called_by_their_names(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    named = "--parser_ckpt parser.pt"
    assert "is a pipe or a device" in error_of(capsys, prune, f"{named} --ckpt {tmp_path}/pipe")
    assert "is a folder without checkpoints" in error_of(
        capsys, prune, f"{named} --ckpt {tmp_path}"
    )
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "m.pt"))
    line = error_of(capsys, prune, f"--ckpt model.pt --parser_ckpt {tmp_path}/m.pt --out new")
    assert "m.pt: is a TorchScript module, not a checkpoint of state dicts" in line


def test_what_is_missing_is_noticed_before_anything_is_loaded(capsys, monkeypatch):
    def load(*args, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(checkpoint, "read", load)
    for script, flags, message in (
        (prune, "--ckpt none.pt", "--ckpt none.pt: no such file"),
        (prune, "--ckpt model.pt", "--parser_ckpt"),
        (train, f"{TRAIN} --ckpt none.pt", "--ckpt none.pt: no such file"),
        (train, f"{TRAIN} --ckpt model.pt --path none", "--path none: no such folder"),
        (train, f"{TRAIN} --teacher_ckpt none.pt", "--teacher_ckpt none.pt: no such file"),
        (train, f"{TRAIN} --teacher_ckpt model.pt", "--parser_ckpt"),
        (get_fid, "--ckpt model.pt", "--path is missing; name the real images"),
        (get_fid, "--ckpt model.pt --path none", "--path none: no such folder"),
        (get_fid, "--metrics kid", "--path is missing; kid needs the real images themselves"),
        (get_fid, "--n_sample 3 --metrics pr", "pr needs at least 4 images; take more, or metrics"),
        (get_projected_image, "--image_file none.png", "--image_file none.png: no such file"),
    ):
        assert message in error_of(capsys, script, flags)


def test_a_run_stands_for_its_newest_checkpoint():
    assert checkpoint.read("run").keys() == checkpoint.read("run/checkpoints/000001.pt").keys()


def test_json_is_alone_on_standard_output(capsys):
    flags = "--ckpt model.pt --images data --path data --features parser --parser_ckpt parser.pt"
    assert get_fid.main([*flags.split(), "--device", "cpu", "--workers", "0", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["figures"]["Frechet parser distance"] < 1e-3
    assert "8 px, not resized" in captured.err  # the side is that of the folder's pictures


def test_one_row_is_drawn_as_points(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    markers, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, **o: (markers.append(o["marker"]), plot(*a, **o))[1]
    )
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 5, "d_loss": 1.0, "g_loss": 2.0}\n')
    plot_log.plot([tmp_path], tmp_path / "curve.png")
    assert markers == ["o", "o"]


def test_names_of_runs_are_no_formulas(tmp_path):
    runs = [tmp_path / "costs $1", tmp_path / r"a$\frac$"]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"iteration": 5, "d_loss": 1.0}\n')
    plot_log.plot(runs, tmp_path / "curve.png")
