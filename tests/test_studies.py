"""Studies: plans, jobs that go on after a stop, pairing and intervals, the page."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from Evaluation import sampling
from Model import checkpoint
from Model.generator import Generator
from studies import __main__ as command
from studies import jobs, plots, report, runner
from studies.jobs import Places, run_job
from studies.measuring import HIGHER_IS_BETTER, SEED_OFFSET
from studies.plan import FOLDER, PlanError, iterations, parse_plan, read_plan, train_config
from studies.results import append_result, read_results
from studies.statistics import (
    half_width,
    interval,
    mean_and_deviation,
    paired_difference,
    pooled_difference,
    seeds_share,
    verdict,
)
from studies.tables import (
    Table,
    decided,
    decided_again,
    decided_pooled,
    differences,
    families,
    glance,
    read_table,
    signed,
    spread,
)
from Util.pictures import to_uint8
from Util.stopping import StoppedError

PLAN = {
    "about": "two arms",
    "seeds": [0, 1],
    "control": "a",
    "budget": {"images": 64, "measure_at": [0, 0.25, 1]},
    "measure": {"figures": ["l1"], "n_sample": 10},
    "train": {"batch_size": 8},
    "arms": [{"name": "a", "group": "g"}, {"name": "b", "group": "g", "ratios": [0.5, 0.8]}],
}


CLAIM = {"text": "t", "source": "s", "arm": "b", "than": "a", "figure": "l1_inside"}


def changed(**parts):
    return PLAN | parts


def arm(**parts):
    return changed(arms=[{"name": "a", "group": "g", **parts}])


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda f: f.stem)
def test_bundled_plans_are_read(file):
    plan = read_plan(file.stem)
    assert len({job.name for job in plan.jobs}) == len(plan.jobs) > 1


def test_an_arm_has_the_settings_of_the_one_that_it_is_like_but_for_its_own():
    a = {"name": "a", "group": "g", "prune": {"metric": "asv", "n_sample": 4}}
    b = {"name": "b", "group": "h", "like": "a", "prune": {"n_sample": 6}, "train": {"r1": 0.5}}
    c = {"name": "c", "group": "h", "like": "b", "train": {"batch_size": 4}}
    _, second, third = parse_plan(changed(arms=[a, b, c]), "p", "p.toml").arms
    assert (second.prune, second.train) == (
        {"metric": "asv", "n_sample": 6},
        {"batch_size": 8, "r1": 0.5},
    )
    assert (third.prune, third.train) == (second.prune, {"batch_size": 4, "r1": 0.5})
    assert second.control == third.control == "a"


def test_jobs_come_arm_by_arm_with_all_seeds():
    names = [job.name for job in parse_plan(PLAN, "p", "p.toml").jobs]
    assert names == ["a-0.7-s0", "a-0.7-s1", "b-0.5-s0", "b-0.5-s1", "b-0.8-s0", "b-0.8-s1"]


def test_arms_of_a_seed_differ_in_their_own_settings_alone(tmp_path):
    plan = parse_plan(
        changed(arms=[*PLAN["arms"][:1], {"name": "c", "group": "g", "train": {"r1": 0.5}}]),
        "p",
        "p.toml",
    )
    first, second = (
        train_config(plan, job, tmp_path, Path("x.pt"), tmp_path / "run")
        for job in plan.jobs
        if job.seed == 1
    )
    assert (first.seed, first.iter, first.model_save_freq) == (1, 8, 2)
    assert first == replace(second, r1=first.r1) != second
    assert iterations(plan, 8) == [0, 2, 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({k: v for k, v in PLAN.items() if k != "seeds"}, "seeds is missing"),
        (changed(seeds=[]), "seeds is []"),
        (changed(seeds=[0, 0]), "names something twice"),
        (changed(seeds=["x"]), "a list of values"),
        (changed(typo=1), "typo is unknown"),
        (changed(budget={"images": 64, "measure_at": [2]}), "measure_at"),
        (changed(budget={"images": 60}), "no whole number of batches of 8"),
        (changed(measure={"figures": ["fid"], "n_sample": 10}), "fid: unknown"),
        (changed(control="z"), "z: no such arm"),
        (arm(prune={"metrc": "asv"}), "arm a: metrc is no setting"),
        (arm(prune={"metric": "asvv"}), "asvv: unknown"),
        (arm(train={"lr": "fast"}), "lr is 'fast', not float"),
        (arm(train={"seed": 3}), "seed is the runner's"),
        (arm(train={"kd": ["relatoin=3"]}), "relatoin"),
        (arm(name="a/b"), "take letters"),
        (arm(ratios=[1.5]), "remove_ratio must be below 1"),
        (changed(arms=[*PLAN["arms"], PLAN["arms"][0]]), "two have the same name"),
        (changed(claims=[{"text": "t"}]), "source is missing"),
        (arm(control="z"), "z: no such arm"),
        (changed(repeats=["z"]), "z: no such arm"),
        (changed(budget={"images": 64, "measure_at": [0, 0.5]}), "measure_at lacks 1"),
        (changed(claims=[CLAIM | {"figure": "ppl"}]), "ppl is not measured"),
        (arm(like="a"), "arm a: like a: no arm before it has that name"),
        (changed(claims=[CLAIM | {"ratio": 0.6}]), "b is not run at ratio 0.6"),
    ],
)
def test_bad_plans_are_refused_in_one_line(content, message):
    with pytest.raises(PlanError) as caught:
        parse_plan(content, "p", "p.toml")
    text = str(caught.value)
    assert message in text
    assert text.startswith("p.toml")
    assert "\n" not in text


def test_command_line(tmp_path, capsys):
    places = ["--work", str(tmp_path), "--results", str(tmp_path)]
    assert command.main(["smoke", "--dry_run", *places]) == 0
    assert "4 jobs left; no job is done yet" in capsys.readouterr().out
    append_result(
        tmp_path / "smoke.jsonl", {"job": "cagc-0.7-s0", "points": [1], "seconds": {"train": 36.0}}
    )
    assert command.main(["smoke", "--dry_run", "--jobs", "2", *places]) == 0
    found = capsys.readouterr().out
    assert "done   cagc-0.7-s0" in found
    assert "3 jobs left, about 36 s" in found
    assert command.main(["smoke", "--list"]) == 0
    assert "content/everywhere" in capsys.readouterr().out
    assert command.main(["--list"]) == 0
    assert "compression: " in capsys.readouterr().out
    for arguments, message in (
        ([], "PLAN is missing"),
        (["nothing"], "no such plan"),
        (["smoke", "--only", "x*"], "fits no job"),
    ):
        assert command.main([*arguments, *places]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pictures of the smoke plan."""
    folder = tmp_path_factory.mktemp("study")
    found = Places(folder / "work", folder / "results")
    jobs.prepare(read_plan("smoke"), found, workers=1)
    return found


def test_a_stopped_study_goes_on_to_the_same_result(places, tmp_path, monkeypatch):
    plan = read_plan("smoke")
    job = plan.jobs[0]
    whole = run_job(plan, job, places)

    again = replace(places, results=tmp_path)
    other = replace(plan, name="again")

    def stopped(config):
        """End after the first checkpoint, as a signal would."""
        return replace(real(replace(config, iter=2)), signal=15)

    real = jobs.train
    monkeypatch.setattr(jobs, "train", stopped)
    with pytest.raises(StoppedError):
        run_job(other, job, again)
    assert not (again.job(other, job) / "figures_000004.json").is_file()
    monkeypatch.setattr(jobs, "train", real)
    resumed = run_job(other, job, again)
    assert resumed["points"] == whole["points"]
    assert [p["images"] for p in whole["points"]] == [0, 8, 16]
    with pytest.raises(ValueError, match="begun with images 16, and the plan now says 32"):
        run_job(replace(other, images=32), job, again)
    monkeypatch.setattr(jobs, "train", None)  # what is there is not made again
    assert run_job(other, job, again)["points"] == whole["points"]


@pytest.mark.slow
def test_a_killed_study_of_two_processes_ends_as_one_that_was_not(tmp_path):
    def run(results, *flags):
        flags = (*flags, "--work", str(results), "--results", str(results))
        arguments = [sys.executable, "-m", "studies", "smoke", *flags]
        return subprocess.Popen(arguments, cwd=FOLDER.parents[1], start_new_session=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole).wait() == 0
    killed.mkdir()
    for folder in whole.glob("toon_faces_*"):
        shutil.copytree(folder, killed / folder.name)
    process = run(killed, "--jobs", "2")
    while process.poll() is None and not list(killed.glob("smoke/*/run/checkpoints/*.pt")):
        time.sleep(0.05)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run(killed, "--jobs", "2").wait() == 0
    expected, found = (
        {row["job"]: row["points"] for row in read_results(f / "smoke.jsonl")}
        for f in (whole, killed)
    )
    assert len(expected) == 4
    assert found == expected


def test_results_are_written_once_and_students_stay(places, monkeypatch, capsys):
    plan = read_plan("smoke")
    assert runner.run_jobs(plan, plan.jobs[:1], places) == 0
    assert "cagc-0.7-s0: l1_inside" in capsys.readouterr().out
    folder = places.job(plan, plan.jobs[0])
    assert (folder / "student.pt").is_file()
    assert not (folder / "run").exists()
    kept = (folder / "student.pt").read_bytes()
    checkpoint.save(folder / "pruned.pt", {"g_ema": Generator(8, 8, 2, channels=(6, 5, 4, 4))})
    jobs.clean(plan, plan.jobs[0], places)  # killed before it had removed that
    assert (folder / "student.pt").read_bytes() == kept
    assert not (folder / "pruned.pt").exists()
    monkeypatch.setattr(runner, "run_job", None)
    assert runner.run_jobs(plan, plan.jobs[:1], places) == 0
    longer = replace(plan, n_sample=30)
    assert runner.run_jobs(longer, plan.jobs[:1], places) == 1
    assert "was begun with n_sample 20, and the plan now says 30" in capsys.readouterr().err
    (row,) = read_results(places.results / "smoke.jsonl")
    assert row["settings"]["train"]["seed"] == 0
    assert row["versions"]
    assert row["seconds"]["train"] > 0
    assert row["points"][-1]["figures"].keys() >= {"agreement_inside", "frechet", "recall"}
    assert 0 < row["floor"]["inside"] < 1
    assert 0 <= row["points"][-1]["figures"]["variety"] < 1


def test_a_job_that_fails_does_not_end_the_study(places, monkeypatch, capsys):
    plan = read_plan("smoke")

    def fail(plan, job, places):
        raise ValueError("no luck")

    monkeypatch.setattr(runner, "run_job", fail)
    assert runner.run_jobs(plan, plan.jobs[2:], places) == 2
    assert "everywhere-0.7-s1: failed: no luck" in capsys.readouterr().err


def test_damaged_results_are_refused(tmp_path):
    file = tmp_path / "p.jsonl"
    append_result(file, {"job": "a", "points": [1]})
    file.write_text(file.read_text() + '{"job": "b"')
    with pytest.raises(ValueError, match="line 2 is no result"):
        read_results(file)


def test_intervals_are_scipys():
    values = np.random.default_rng(0).normal(3, 2, 7).tolist()
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = interval(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert mean_and_deviation([1, 2, 3]) == (2, 1)
    # t of two degrees of freedom in closed form: (2p - 1) sqrt(2 / (4 p (1 - p))) at p = 0.975.
    assert half_width(3) == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) / math.sqrt(3))
    assert interval([5.0]).low == -math.inf
    assert half_width(1) == math.inf


def test_differences_are_paired_by_seed():
    a, b = {0: 1.0, 1: 5.0, 2: 3.5, 7: 9.0}, {2: 3.0, 1: 4.0, 0: 0.5}
    found = paired_difference(a, b)
    theirs = stats.ttest_rel([1.0, 5.0, 3.5], [0.5, 4.0, 3.0]).confidence_interval(0.95)
    assert (found.low, found.high, found.n) == pytest.approx((theirs.low, theirs.high, 3))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_a_pooled_deviation_is_that_of_an_analysis_of_variance():
    rng = np.random.default_rng(1)
    groups = [rng.normal(mean, 2, 3).tolist() for mean in range(8)]
    a, b = groups[1], groups[5]
    theirs = stats.ttest_ind(a, b).confidence_interval(0.95)  # Student's, of two groups
    found = pooled_difference(a, b, [a, b])
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    # Tukey's of two of k groups has the same error, and the range of two is sqrt 2 |t|.
    f = stats.f_oneway(*groups)
    between = 3 * np.var([np.mean(g) for g in groups], ddof=1)
    half = stats.t.ppf(0.975, 16) * math.sqrt(between / f.statistic * 2 / 3)
    assert pooled_difference(a, b, groups).half == pytest.approx(half)
    assert pooled_difference(a, b, [*groups, [0.0, 900.0, -900.0]]) is None  # another deviation
    assert pooled_difference(a, b, [*groups, [1.0, 1.0, 1.0]]) is None


@pytest.mark.parametrize(
    ("values", "higher", "expected"),
    [
        ([1.0, 1.1, 0.9], True, "confirmed"),
        ([1.0, 1.1, 0.9], False, "refuted"),
        ([-1.0, -1.1, -0.9], False, "confirmed"),
        ([1.0, -1.0, 0.5], True, "undecided"),
        ([1.0], True, "undecided"),
        ([0.0005, 0.0005, 0.0005], True, "undecided"),  # steps of one picture in 2,000
    ],
)
def test_verdicts_follow_the_interval(values, higher, expected):
    assert verdict(interval(values), higher) == expected


def fake_results(folder, name, jobs_done, value):
    plan = read_plan(name)
    for job in plan.jobs[:jobs_done]:
        figures = {f: value(job, f) for f in HIGHER_IS_BETTER}
        points = [{"images": int(s * plan.images), "figures": figures} for s in plan.measure_at]
        append_result(
            folder / f"{name}.jsonl",
            {
                **{"job": job.name, "arm": job.arm.name, "ratio": job.ratio, "seed": job.seed},
                **{"points": points, "macs": 4_468_416, "parameters": 116_502},
                **{"channels": [20, 5], "seconds": {"t": 9}},
                "floor": {"all": 0.3, "inside": 0.35, "outside": 0.2},
            },
        )
    return plan


def test_rows_of_differences_name_their_controls_where_there_are_several():
    arms = [{"name": n, "group": "g"} for n in "ab"] + [{"name": "c", "group": "g", "control": "b"}]
    plan = parse_plan(changed(arms=arms), "p", "p.toml")
    done = [
        {"job": j.name, "arm": j.arm.name, "ratio": 0.7, "seed": j.seed}
        | {"points": [{"images": 64, "figures": {"l1_inside": i + j.seed**2}}]}
        for i, j in enumerate(plan.jobs)
    ]
    table = Table(plan, done)

    def names(*arms):
        rows = differences(table, [(arm, 0.7) for arm in arms]).splitlines()[2:]
        return [row.split("|")[1].strip() for row in rows]

    assert names("b") == ["b"]
    assert names("b", "c") == ["b - a", "c - b"]


def test_the_share_of_seeds_is_that_of_their_variance():
    rng = np.random.default_rng(0)
    arms, seeds = rng.normal(0, 5, (60, 1)), rng.normal(0, 1, (1, 400))
    noise = rng.normal(0, 2, (60, 400))
    assert seeds_share(arms + seeds + noise) == pytest.approx(1 / 5, abs=0.02)
    assert seeds_share(arms + noise) < 0.01
    assert seeds_share(arms + seeds) == pytest.approx(1)
    # By hand: mean squares of seeds 2 * 3^2 / 2 = 9 (A = 2) and of the rest 1.
    assert seeds_share([[0, 4], [1, 3]]) == pytest.approx(4 / 5)
    assert seeds_share([[1, 1], [2, 2]]) == 0


def test_a_claim_about_the_control_is_decided_by_its_other_runs_too():
    arms = [{"name": n, "group": "g"} for n in "abcd"]
    claims = [CLAIM | {"arm": "b", "than": than} for than in "ac"]
    plan = parse_plan(changed(arms=arms, claims=claims, repeats=["c", "d"]), "p", "p.toml")
    values = {"a": (5.0, 6.0), "b": (3.0, 4.01), "c": (4.0, 9.0), "d": (3.5,)}
    done = [
        {"job": f"{n}-0.7-s{seed}", "arm": n, "ratio": 0.7, "seed": seed}
        | {"points": [{"images": 64, "figures": {"l1_inside": value}}]}
        for n, found in values.items()
        for seed, value in enumerate(found)
    ]
    table = Table(plan, done)
    assert [decided(table, claim)[0] for claim in plan.claims] == ["confirmed", "undecided"]
    assert [decided_again(table, claim) for claim in plan.claims] == [["undecided"], []]
    assert [decided_pooled(table, claim) for claim in plan.claims] == ["undecided", "undecided"]
    assert "of 1 claims about the control, 1 come out" in report.judged([table])
    alone = replace(table, plan=replace(plan, repeats=()))
    assert decided_again(alone, plan.claims[0]) == []
    assert "other runs" not in report.judged([alone])


def test_all_values_of_a_figure_have_the_same_decimals():
    assert spread([52.0, 55.0, 49.0], "frechet") == "52.0 ± 3.0"
    assert spread([0.5, 0.52], "l1_inside") == "0.510 ± 0.014"
    assert spread([0.5], "l1_inside") == "0.500"
    assert spread([], "l1_inside") == "-"
    apart = interval([4.0, 4.2, 3.8])
    assert signed(apart, 3, "frechet") == "**+4.0 [+3.5, +4.5]**"
    assert signed(apart, 5, "agreement:eyes") == "+4.000 [+3.503, +4.497]"
    assert signed(interval([-12.0]), 3, "ppl") == "-12.0 (one seed)"


def test_the_glance_has_the_complete_arms_with_the_best_first_and_marks_what_is_apart():
    arms = [{"name": n, "group": "g", "about": f"arm {n}"} for n in "abcd"]
    plan = parse_plan(changed(arms=arms), "p", "p.toml")
    values = {"a": (5.0, 6.0), "b": (3.0, 4.01), "c": (4.0, 7.0), "d": (1.0,)}
    done = [
        {"job": f"{n}-0.7-s{seed}", "arm": n, "ratio": 0.7, "seed": seed, "parameters": 9}
        | {"points": [{"images": 64, "figures": {"l1_inside": value}}]}
        for n, found in values.items()
        for seed, value in enumerate(found)
    ]
    rows = glance(Table(plan, done), ["l1_inside"]).splitlines()[2:]
    assert rows == [
        "| `b` | arm b | 9 | **3.505 ± 0.714** |",
        "| `a` | arm a | 9 | 5.500 ± 0.707 |",
        "| `c` | arm c | 9 | 5.500 ± 2.121 |",
    ]


def test_arms_of_equal_settings_are_a_family_over_the_ratios():
    arms = [
        {"name": "a", "group": "g"},
        {"name": "b", "group": "g", "train": {"r1": 0.5}},
        {"name": "b_ratios", "group": "h", "like": "b", "ratios": [0.8, 0.5]},
        {"name": "c", "group": "h", "like": "b", "train": {"r1": 1.0}, "ratios": [0.5]},
        {"name": "a_again", "group": "g", "like": "a"},
    ]
    plan = parse_plan(changed(arms=arms, repeats=["a_again"]), "p", "p.toml")
    done = [{"arm": j.arm.name, "ratio": j.ratio, "seed": j.seed} for j in plan.jobs]
    assert families(Table(plan, done)) == {
        "a": [("a", 0.7)],
        "b": [("b_ratios", 0.5), ("b", 0.7), ("b_ratios", 0.8)],
        "c": [("c", 0.5)],
    }


def test_the_page_says_what_the_results_say(tmp_path, capsys, monkeypatch):
    better = {"cagc": 0.9, "everywhere": 0.8}
    value = lambda job, f: better[job.arm.name] * (1 + 0.001 * job.seed**2)  # noqa: E731
    fake_results(tmp_path, "compression", 5, value)
    fake_results(tmp_path, "contents", 2, lambda job, f: 0.5)
    own = {"0": {"teacher": {"agreement_inside": 1.0, "frechet": 17.0}}}
    monkeypatch.setattr(report, "prepare", lambda *_: None)
    monkeypatch.setattr(report, "reference_figures", lambda plan, seed, places: own["0"])
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "doc/Study.md")]
    assert report.main([*arguments, "--work", str(tmp_path)]) == 0
    page = (tmp_path / "doc/Study.md").read_text()
    assert "5 of " in page
    assert "2 of 9 jobs of the plan `contents`" in page
    assert "| cagc 0.7 | 3 | 4,468,416 | 116,502 |" in page
    assert "At a glance" not in page  # there is none beside the control
    assert "| *teacher* | 3 |  |  | - | 1.000 ± 0.000 | - |" in page
    assert "| hair | inside | 0.901 | 0.800 |" in page
    assert "leaves 5 to\n  20 channels a layer" in page
    (line,) = (x for x in page.splitlines() if "inside the content keeps" in x)
    assert line.endswith("| *not run* |  |  |")  # the third seed of everywhere is missing
    assert "everywhere, 1 of 3 jobs (everywhere-0.7-s2)" in page
    assert (tmp_path / "doc/study/content.png").is_file()
    monkeypatch.setattr(report, "reference_figures", None)  # they are kept
    fake_results(tmp_path, "compression", 6, value)
    (tmp_path / "compression.jsonl").write_text(
        "".join(dict.fromkeys((tmp_path / "compression.jsonl").read_text().splitlines(True)))
    )
    assert report.main([*arguments, "--work", str(tmp_path)]) == 0
    page = (tmp_path / "doc/Study.md").read_text()
    (line,) = (x for x in page.splitlines() if "inside the content keeps" in x)
    assert "**+0.100 [+0.100, +0.101]**" in line
    assert "| `cagc` | pruned and distilled inside the content | 116,502 | 0.901 ± 0.002 |" in page
    assert (tmp_path / "doc/study/glance.png").is_file()
    assert line.endswith("| *confirmed* |  | *confirmed* |")
    assert json.loads((tmp_path / "compression.jsonl").read_text().splitlines()[0])
    assert "- before_retraining: content_aware, 15 of 15 jobs" in page
    alone = tmp_path / "alone"
    alone.mkdir()
    rows = (tmp_path / "compression.jsonl").read_text().splitlines(True)
    (alone / "compression.jsonl").write_text("".join(row for row in rows if "everywhere" in row))
    (alone / "compression_references.json").write_bytes(
        (tmp_path / "compression_references.json").read_bytes()
    )
    assert report.main(["--results", str(alone), *arguments[2:], "--work", str(tmp_path)]) == 0
    assert report.main(["--results", str(tmp_path / "none"), *arguments[2:]]) == 2
    assert "no result of compression yet" in capsys.readouterr().err


def test_the_page_says_how_to_go_on_where_jobs_are_left(tmp_path, monkeypatch):
    fake_results(tmp_path, "compression", 5, lambda job, f: 0.5)
    table = read_table("compression", tmp_path)
    assert "Go on by `python -m studies compression" in report.limits([table])
    monkeypatch.setattr(report, "not_run", lambda table: [])
    finished = report.limits([table])
    assert finished.endswith("All jobs of the plans are done.")
    assert "Go on by" not in finished


def test_results_of_other_settings_are_not_reported(tmp_path):
    fake_results(tmp_path, "compression", 1, lambda job, f: 0.5)
    row = json.loads((tmp_path / "compression.jsonl").read_text())
    row["settings"] = {"train": {"kd_l1_lambda": 15.0, "no_longer_there": 1}}
    (tmp_path / "compression.jsonl").write_text(json.dumps(row) + "\n")
    assert len(read_table("compression", tmp_path).rows) == 1
    row["settings"]["train"]["kd_l1_lambda"] = 3.0
    (tmp_path / "compression.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"was begun with kd_l1_lambda 3\.0, and the plan now"):
        read_table("compression", tmp_path)


def test_a_kept_row_of_the_picture_is_what_was_drawn(tmp_path):
    generator, file = Generator(8, 8, 2, channels=(6, 5, 4, 4)), tmp_path / "student.pt"
    checkpoint.save(file, {"g_ema": generator})
    plots.row_picture(file, 0, tmp_path / "row.png", shown=3)
    made = sampling.images(generator, range(3), SEED_OFFSET, fixed_noise=True)
    assert (to_uint8(plots._read_row(tmp_path / "row.png")) == to_uint8(made)).all()
    plots.students_picture({"one": tmp_path / "row.png"}, tmp_path / "all.png")
    assert (tmp_path / "all.png").is_file()
