"""Two gloo processes under a launcher: whatever happens to one, the job ends or goes on as one."""

import os
import re
import signal
import time

import pytest

import train
from Compression.optimisation import NonFiniteError
from Compression.run import evaluation, loop, networks
from Compression.training import Trainer
from Dataset import DatasetError
from Dataset.images import Images
from Evaluation.features import Extractor
from Model import checkpoint
from Model.bundled import PARSER
from tests.processes import attempt, start, wait_for
from tests.test_training import make_trainer
from train_hyperparams import TrainConfig
from Util import distributed
from Util.run_log import checkpoints, read_metrics

FACES = os.path.relpath(PARSER)  # the repository's path may have spaces

SMALL = (
    "--size 8 --style_dim 8 --n_mlp 1 --channels 4,4,4,4 --batch_size 4 --workers 0 --device cpu"
)


def flags(folder, more):
    return f"--path {folder}/data --out {folder}/run {SMALL} --log_freq 1 {more}"


def before_iteration(number, action, clock=None):
    """A sabotage: process 1 does something before an iteration; the file gets the time."""

    def sabotage(rank):
        iterate = Trainer.iterate

        def sabotaged(trainer, real):
            if rank == 1 and trainer.iteration == number:
                if clock:
                    clock.write_text(str(time.monotonic()))
                action(trainer)
            return iterate(trainer, real)

        Trainer.iterate = sabotaged

    return sabotage


def fail(folder, action, more="", **options):
    """A job of which one process meets its fault; it must have ended a minute later."""
    clock = folder / "clock"
    sabotage = before_iteration(3, action, clock)
    job = start(folder / "job", flags(folder, f"--iter 6 {more}"), sabotage=sabotage, **options)
    code = job.end()
    assert time.monotonic() - float(clock.read_text()) < 60
    return code, job.output


def test_a_killed_process_ends_the_job(folder):
    code, output = fail(folder, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert code == 1
    assert "process 0 of 2: RuntimeError" in output
    assert "process 1 was killed or does not answer" in output
    assert "Signal 9 (SIGKILL)" in output


def sleep(_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher need not wait before it kills
    time.sleep(1000)


def stop(_):
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("how", [sleep, pytest.param(stop, marks=pytest.mark.slow)])
def test_a_stuck_process_ends_the_job(folder, how):
    code, output = fail(folder, how, "--dist_timeout 3")
    assert code == 1
    assert "Timed out" in output
    assert "process 1 was killed or does not answer" in output


def fail_at_first(trainer):
    if attempt() == 0:
        raise KeyError("lost")


def test_a_raising_process_ends_the_attempt_and_the_same_command_goes_on(folder):
    code, output = fail(folder, fail_at_first, "--model_save_freq 2 --resume auto", restarts=1)
    assert code == 0
    first = output.split("done: ")[0]
    assert "process 1 of 2: KeyError: 'lost'" in first
    assert "process 0 of 2: RuntimeError" in first
    assert "process 1 failed: KeyError: 'lost'" in first
    assert [int(file.stem) for file in checkpoints(folder / "run")] == [2, 4, 6]
    assert [row["iteration"] for row in read_metrics(folder / "run")] == [1, 2, 3, 4, 5, 6]


def test_signals_and_another_number_of_processes(folder):
    """SIGUSR2 to one process, then SIGTERM to all, twice; then one process; then two again."""
    run, same = folder / "run", flags(folder, "--resume auto")
    job = start(folder / "job", f"{same} --iter 99999")
    wait_for((run / "metrics.jsonl").exists)
    os.kill(job.process(1), signal.SIGUSR2)
    wait_for(lambda: checkpoints(run))
    for _ in range(2):
        for number in (job.launcher, job.process(0), job.process(1)):
            os.kill(number, signal.SIGTERM)
    assert job.end() != 0
    kept, last = (int(file.stem) for file in checkpoints(run))
    assert 1 <= kept < last < 99999
    # The launcher may show how a second signal interrupted its own code; a process of ours may not.
    assert 'train.py", line' not in job.output
    assert train.main(f"{same} --iter {last + 2}".split()) == 0
    job = start(folder / "job", f"{same} --iter {last + 4}")
    assert job.end() == 0, job.output
    assert "processes: 1 until now, 2 from here on" in job.output
    saved = checkpoint.read(checkpoints(run)[-1])["train_state"]
    assert (saved["iteration"], saved["images_seen"]) == (last + 4, 4 * (last + 4))
    assert len(saved["rng"]) == 2
    rows = [row["iteration"] for row in read_metrics(run)]
    assert rows == list(range(1, last + 5))


def test_images_that_give_out_in_one_process_leave_a_checkpoint(folder):
    """And processes that start from other weights go on with those of the first."""

    def sabotage(rank):
        if rank == 0:
            return
        pixels, make = Images.pixels, networks._make_networks

        shown = []

        def few(images, item):
            shown.append(item)
            if len(shown) > 3 * 2:
                raise DatasetError("the disk has gone")
            return pixels(images, item)

        def other(*args):
            made = make(*args)
            made[0].style[1].weight.data += 1
            return made

        Images.pixels, networks._make_networks = few, other

    job = start(folder / "job", flags(folder, "--iter 99999"), sabotage=sabotage)
    assert job.end() == 1
    assert "process 1 of 2: --path the disk has gone" in job.output
    assert [int(file.stem) for file in checkpoints(folder / "run")] == [3]


def test_a_signal_to_one_process_ends_the_measurement_of_all(folder):
    def sabotage(rank):
        calls = folder / f"calls_{rank}"

        def colours(x):
            with open(calls, "a") as file:
                file.write(".")
            if rank == 1 and calls.stat().st_size == 8:
                os.kill(os.getpid(), signal.SIGUSR1)
            return x.mean(dim=(2, 3))

        evaluation.make_extractor = lambda *_: Extractor(colours, "parser", "colours")

    more = f"--fid_n_sample 400 --fid_features parser --parser_ckpt {FACES} --fid_batch 4"
    job = start(folder / "job", flags(folder, f"--iter 2 {more}"), sabotage=sabotage)
    assert job.end() != 0
    assert "stopped at iteration 2" in job.output
    shares = [(folder / f"calls_{rank}").stat().st_size for rank in range(2)]
    assert abs(shares[0] - shares[1]) <= 2, shares  # of 50 batches each
    assert [int(file.stem) for file in checkpoints(folder / "run")] == [2]


@pytest.mark.parametrize(("rank", "written"), [(0, 1), (1, 0)])
def test_one_process_alone_keeps_the_state_before_a_failure(tmp_path, monkeypatch, rank, written):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    trainer = make_trainer()
    with (
        pytest.raises(NonFiniteError, match=r"lost \(the state before it: "),
        loop._state_before_failure(TrainConfig(out=str(tmp_path)), trainer),
    ):
        raise NonFiniteError("lost")
    assert len(list(tmp_path.glob("before_non_finite_*.pt"))) == written


def test_processes_whose_weights_differ_write_no_checkpoint(folder):
    def change(trainer):
        trainer.g_ema.style[1].weight.data[0, 0] *= 1.001

    code, output = fail(folder, change, "--model_save_freq 2")
    assert code == 1
    words = r"process 1 differs from process 0 in 1 of \d+ tensors, g_ema\.style\.1\.weight the"
    assert re.search(words, output)
    assert [int(file.stem) for file in checkpoints(folder / "run")] == [2]
