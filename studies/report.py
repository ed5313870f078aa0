"""Writes doc/Study.md and its plots from the results that are there.

``python -m studies.report``. Every number, verdict and list of missing runs is computed; nothing in
the page is written by hand.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from Evaluation.features import fingerprint
from Model import bundled
from Model.checkpoint import load_attribute_classifier
from studies import plots
from studies.jobs import Places, add_places, judged_by, prepare, reference_figures, write_json
from studies.plan import FOLDER, Claim, read_plan
from studies.results import references_file
from studies.statistics import half_width, mean_and_deviation, seeds_share
from studies.tables import (
    TITLES,
    Table,
    by_attribute,
    compared,
    complete,
    controls,
    decided,
    decided_again,
    differences,
    glance,
    label,
    markdown,
    means,
    overview,
    read_table,
    spread,
    verdicts,
)
from Util.cli import OneLineParser, check_writable, run_script
from Util.files import atomic_path
from Util.settings import file_path

ROOT = Path(__file__).resolve().parent.parent
MAIN, BEFORE = "compression", "before_retraining"
GLANCE_FIGURES = ("agreement_inside", "agreement_outside", "l1_inside", "frechet")
SHOWN_FIGURES = ("agreement_inside", "agreement_outside", "frechet")
COURSE_FIGURES = ("agreement_inside", "agreement_outside", "l1_inside", "l1_outside", "frechet")
GROUPS = {
    "content": "Is it the content?",
    "initialisation": "What the pruned network starts as",
    "widths": "Widths under equal multiply-accumulates",
    "schedule": "The schedule",
    "recipe": "Papers' recipes",
    "score": "How channels are scored",
    "ratio": "Other ratios",
}


def measure_references(name: str, places: Places) -> None:
    """Measure teacher and compressed model on each seed's latents, where that is not done."""
    plan, file = read_plan(name), references_file(places.results, name)
    models = {"teacher": fingerprint(bundled.MODEL), "compressed": fingerprint(bundled.COMPRESSED)}
    settings = judged_by() | models | {"figures": list(plan.figures), "n_sample": plan.n_sample}
    if file.is_file() and json.loads(file.read_text())["settings"] == settings:
        return
    prepare(plan, places)
    seeds = {str(seed): reference_figures(plan, seed, places) for seed in plan.seeds}
    write_json(file, {"settings": settings, "seeds": seeds})


def pairing(table: Table) -> str:
    """Say how much of the figures' variance the seeds explain."""
    plan = table.plan
    arms = complete(table, GLANCE_FIGURES[0])
    if len(arms) < 2:
        return ""
    parts = []
    for figure in GLANCE_FIGURES:
        found = [table.values(arm, plan.main_ratio, figure) for arm in arms]
        share = seeds_share([[by_seed[seed] for seed in plan.seeds] for by_seed in found])
        parts.append(f"{TITLES[figure]} {100 * share:.0f} %")
    listed = ", ".join(parts)
    return f"""
The seeds' share of the variance within an arm, by a two-way analysis of the {len(arms)} complete
arms: {listed}. Pairing removes no
more than that; the rest is the course of a GAN loss."""


def introduction(table: Table) -> str:
    """Say what was done, and how it was measured."""
    plan, done = table.plan, len(table.rows)
    n = len(plan.seeds)
    agreement = ", ".join(
        f"{table.floor(group):.3f} {words}"
        for group, words in (("all", "over all"), ("inside", "inside"), ("outside", "outside"))
    )
    seconds = [sum(row["seconds"].values()) for row in table.rows]
    commits = len({row.get("commit") for row in table.rows})
    lacking = sum("variety" not in row["points"][-1]["figures"] for row in table.rows)
    without = f" ({lacking} jobs were run without it)" if lacking else ""
    classifier = load_attribute_classifier(bundled.ATTRIBUTES)
    outside = [name for name in classifier.attributes if name not in classifier.inside]
    return f"""# Study: what content-aware compression does

Written by `python -m studies.report` from [studies/results](../studies/results); do not edit.
Plans: [studies/plans](../studies/plans). {done} of {len(plan.jobs)} jobs of the main plan are done,
{mean_and_deviation(seconds)[0]:,.0f} s of one core each on average, by {commits} versions of the
code, which their lines name.

**How.** The bundled 64 px teacher is pruned, retrained on {plan.images:,} shown images by the
plan's settings, and measured on {plan.n_sample:,} latents. An arm differs from
`{plan.control}` in the settings that `python -m studies {plan.name} --list` prints for it. Seed s
of every arm scores by the same latents, as many as it scores by, sees the same pictures in the same
order and is measured on the same latents; differences are paired by seed. The latents of training
are the same, too, but in arms with a new discriminator or a relation loss, which draw numbers of
their own: their differences to the others vary more.

**The judge** is a classifier of what the pictures show
([Model/attribute_model](../Model/attribute_model/README.md)) that no training sees. *Agreement* is
the share of attributes that the student's picture has in common with the teacher's of the same
latent, inside the content ({", ".join(classifier.inside)}) and outside ({", ".join(outside)}).
The teacher agrees with itself by 1; two of its pictures of different latents, the floor, by
{agreement}. *Variety* is the share of attributes in which two of a student's own pictures differ,
{1 - table.floor("all"):.3f} for the teacher{without}. *Frechet* is the
distance of the judge's penultimate features to those of real pictures that no training saw;
*inside* multiplies pictures by a mask, generated ones by that of the teacher's picture of the same
latent. L1 is per value, inside and outside that mask. PPL is the standard protocol with the
parser's distance, over few pairs.

**Intervals** are 95 % t intervals of paired differences. With {n} seeds one reaches
{half_width(n):.2f} standard deviations of the difference to either side (ten seeds:
{half_width(10):.2f}), so only large effects can be told apart; *undecided* does not mean equal.
Bold differences leave out 0.{pairing(table)}

The *bundled compressed model* stands in the tables to show what a longer training brings: it is no
arm ([Model/pruned_model](../Model/pruned_model/README.md))."""


def glance_section(table: Table, doc: Path) -> str:
    """Write the one table and draw the one plot."""
    plan = table.plan
    arms = complete(table, GLANCE_FIGURES[0])
    others = [arm for arm in arms if arm != plan.control]
    if not others or others == arms:
        return ""
    plots.differences_to_control(table, others, SHOWN_FIGURES, doc / "study/glance.png")
    return f"""## At a glance

Arms with all {len(plan.seeds)} seeds at ratio {plan.main_ratio:g}, the best agreement inside first;
mean ± standard deviation. Bold: the paired difference to `{plan.control}` leaves out 0. Agreement:
higher is better; L1 and Frechet: lower.

{glance(table, GLANCE_FIGURES)}

![Differences to {plan.control}, with 95 % intervals](study/glance.png)

(Differences to `{plan.control}`, paired by seed, with 95 % intervals. Blue: better, orange: worse,
grey: undecided.)"""


def judged(tables: Sequence[Table]) -> str:
    """Tabulate all claims."""
    parts = [verdicts(table) for table in tables if table.plan.claims]
    merged = parts[0] + "".join("\n" + "\n".join(p.splitlines()[2:]) for p in parts[1:])
    pairs = [(table, claim) for table in tables for claim in table.plan.claims]
    count = sum(decided(*pair)[0] != "not run" for pair in pairs)
    return f"""## Verdicts

*Confirmed* and *refuted*: the interval lies on one side of 0, at this scale. *Undecided*: it holds
0. *Not run*: not all seeds are there. The figure that decides stands in the plan, written before
the runs; a question that came up later says so. Of {count} such intervals, and of the many more in
the tables below, one in twenty would leave out 0 by chance alone; most share the control's runs.
{repeated(pairs)}
*Pooled*, added after the results, is the verdict with the standard deviation of all arms together
in place of that of the pair's three differences; it is left out where Bartlett's test tells the
arms' deviations apart.

{merged}"""


def repeated(pairs: Sequence[tuple[Table, Claim]]) -> str:
    """Say how many verdicts hang on which of the control's runs is taken."""
    both = [(decided(*pair)[0], decided_again(*pair)) for pair in pairs]
    both = [(first, others) for first, others in both if others and first != "not run"]
    if not both:
        return ""
    repeats = pairs[0][0].plan.repeats
    changed = sum(any(first != other for other in others) for first, others in both)
    named = " and ".join(f"`{name}`" for name in repeats)
    return f"""
The control was run {len(repeats) + 1} times with the same seeds, on courses that differ by
rounding alone. *Again* is the verdict by the other runs, {named}:
of {len(both)} claims about the control, {changed} come out otherwise by one of them at least.
Three seeds place a mean well and its spread badly; what holds in all columns can be trusted more.
"""


def group_section(table: Table, group: str, doc: Path) -> str:
    """Write a group's tables and plots."""
    control = (table.plan.control, table.plan.main_ratio)
    arms = [(a, r) for a, r in table.measured if table.plan.arm(a).group == group]
    if not arms:
        return ""
    pairs = arms if control in arms or not table.of(*control) else [control, *arms]
    lines = [f"## {GROUPS.get(group, group)}", ""]
    lines += [
        f"- `{arm.name}`: {arm.about}"
        for arm in table.plan.arms
        if arm.about and any(arm.name == a for a, _ in pairs)
    ]
    ratios = sorted({r for _, r in arms})
    at = f"ratio {ratios[0]:g}" if len(ratios) == 1 else "several ratios"
    lines += ["", f"At the end of the budget, mean ± standard deviation over the seeds, {at}:", ""]
    lines += [means(table, pairs), ""]
    if with_control := compared(table, arms):
        lines += [f"Differences to {controls(table, with_control)}, paired by seed:", ""]
        lines += [differences(table, with_control), ""]
    if any(":" in figure for figure in table.of(*pairs[0])[0]["points"][-1]["figures"]):
        inside = load_attribute_classifier(bundled.ATTRIBUTES).inside
        lines += ["Agreement by attribute:", "", by_attribute(table, pairs, inside), ""]
    picture = doc / "study" / f"{group}.png"
    plots.intervals(table, pairs, SHOWN_FIGURES, picture)
    lines += [
        f"![Agreement inside and outside and Frechet distance](study/{group}.png)",
        "",
        "(Circles: means; whiskers: 95 % intervals of each mean; dots: seeds; dashed: the floor.)",
    ]
    if len(ratios) == 1:
        plots.curves(table, pairs, SHOWN_FIGURES, doc / "study" / f"{group}_curves.png")
        lines += ["", f"![Figures against images shown](study/{group}_curves.png)", ""]
        lines += ["(Lines: means; bands: range of the seeds.)"]
    return "\n".join(lines)


def course_section(table: Table, doc: Path) -> str:
    """Write how the figures went on during training, and what they cost."""
    pairs = [p for p in table.measured if p[1] == table.plan.main_ratio]
    rows = []
    for pair in pairs:
        for i, point in enumerate(table.of(*pair)[0]["points"]):
            found = [spread(table.values(*pair, f, i).values(), f) for f in COURSE_FIGURES]
            rows.append([label(table, *pair), f"{point['images']:,}", *found])
    head = ["arm", "images shown", *(TITLES[f] for f in COURSE_FIGURES)]
    parts = [f"## While training\n\n{markdown(head, rows)}"]
    # At one ratio, all arms cost the same but for what a budget leaves over.
    if len({ratio for _, ratio in table.measured}) > 1:
        plots.against_macs(table, SHOWN_FIGURES[:2], doc / "study/macs.png")
        parts.append("![Agreement against multiply-accumulates](study/macs.png)")
        parts.append(
            "(Lines: the same settings at several ratios; whiskers: 95 % intervals of the means,"
            " moved apart; grey: the other arms.)"
        )
    return "\n\n".join(parts)


def before_section(table: Table, doc: Path) -> str:
    """Write about the scores before retraining."""
    if not table.rows:
        return ""
    plots.scores_before(
        table, ("l1_inside", "l1_outside", "agreement_inside"), doc / "study/before.png"
    )
    parts = []
    for ratio in sorted({r for _, r in table.measured}):
        pairs = [p for p in table.measured if p[1] == ratio]
        parts.append(f"Ratio {ratio:g}:\n\n{means(table, pairs)}")
        if with_control := compared(table, pairs):
            control = f"{controls(table, with_control)} at {ratio:g}"
            parts.append(f"Differences to {control}:\n\n{differences(table, with_control)}")
    joined = "\n\n".join(parts)
    return f"""## Scores before retraining

{len(table.rows)} of {len(table.plan.jobs)} jobs, {table.plan.n_sample} latents.

![L1 and agreement against the ratio](study/before.png)

(Whiskers: 95 % intervals of the means; points are moved apart.)

{joined}"""


def other_section(table: Table) -> str:
    """Write the tables of a plan that has no questions of its own here."""
    if not table.rows:
        return ""
    arms = "\n".join(f"- `{arm.name}`: {arm.about}" for arm in table.plan.arms if arm.about)
    return f"""## {table.plan.about}

{len(table.rows)} of {len(table.plan.jobs)} jobs of the plan `{table.plan.name}`.

{arms}

{overview(table)}"""


def picture_section(table: Table, places: Places, doc: Path) -> str:
    """Show the same latents through every arm.

    The students' own files are too many to be kept with the results, their rows are not.
    """
    seed, ratio = table.plan.seeds[0], table.plan.main_ratio
    files = {
        job.arm.name: places.job(table.plan, job) / "student.pt"
        for job in table.plan.jobs
        if job.seed == seed and job.ratio == ratio and table.of(job.arm.name, ratio)
    }
    rows = {name: doc / f"study/students/{name}.png" for name in ("teacher", *files)}
    for name, file in {"teacher": bundled.MODEL, **files}.items():
        if file.is_file():
            plots.row_picture(file, seed, rows[name])
    there = {name: row for name, row in rows.items() if row.is_file()}
    if len(there) == 1:
        return ""
    plots.students_picture(there, doc / "study/students.png")
    lacking = ", ".join(f"`{name}`" for name in rows if name not in there)
    without = f" No student was kept of {lacking}." if lacking else ""
    return f"""## The same latents through every arm

Seed {seed}, ratio {ratio:g}, at the end of the budget.{without}

![Teacher and students](study/students.png)"""


def not_run(table: Table) -> list[str]:
    """List the arms that lack results, and the jobs where they are few."""
    done, lines = {row["job"] for row in table.rows}, []
    for arm in table.plan.arms:
        jobs = [job.name for job in table.plan.jobs if job.arm == arm]
        left = [name for name in jobs if name not in done]
        if left:
            what = f" ({', '.join(left)})" if len(left) < len(jobs) else ""
            lines.append(f"- {table.plan.name}: {arm.name}, {len(left)} of {len(jobs)} jobs{what}")
    return lines


def limits(tables: Sequence[Table]) -> str:
    """Say what such a study cannot tell, and what has not been run."""
    main = tables[0]
    ratio = main.plan.main_ratio
    kept = [channels for row in main.rows if row["ratio"] == ratio for channels in row["channels"]]
    control = [c for row in main.of(main.plan.control, ratio) for c in row["channels"]] or kept
    pairs = [pair for pair in main.measured if pair[1] == ratio]
    recall = max((r for p in pairs for r in main.values(*p, "recall").values()), default=0.0)
    missing = [line for table in tables for line in not_run(table)]
    listed = "\n".join(missing)
    go_on = f"`python -m studies {main.plan.name} --jobs 2`, then `python -m studies.report`"
    left = f"Not run, or not finished:\n\n{listed}\n\nGo on by {go_on}."
    return f"""## What this cannot tell

- One teacher, 64 px and 64 channels at most: ratio {ratio:g} leaves {min(control)} to
  {max(control)} channels a layer, {min(kept)} to {max(kept)} where widths are chosen. Networks of
  512 have more to spare; no verdict carries over by itself.
- A drawn world: flat colours, a handful of parts, next to no layer noise. Photographs have texture.
- {main.plan.images:,} images shown; the papers show 7 to 40 million. What is faster here may not be
  better in the end.
- The losses average over all pixels, as published, whatever the mask leaves out: a pixel of the
  face weighs the same in `cagc` and `everywhere`, which adds the others.
- Widths that are chosen have the multiply-accumulates of one ratio for all layers, not its
  parameters: the tables tell both.
- Recall is at its floor at {ratio:g}, {recall:.4f} at most: so short a retraining leaves few
  kinds of pictures.
- The judge is itself a network of limited accuracy, the more so for clothes, of which little is
  seen. An agreement of 1 is the teacher's; a student may disagree and still be a good face.
- The masks are made by the parser whose features are in the loss.
- Recipes are stripped to their scores, initialisations, terms and discriminators, under one
  schedule, which is not the one that their authors tuned. The relation loss relates all 16 pictures
  of a batch, the published one four.

{left if missing else "All jobs of the plans are done."}"""


def page(tables: Sequence[Table], places: Places, doc: Path) -> Iterator[str]:
    """Write the page's sections."""
    main, before, *others = tables
    yield introduction(main)
    yield glance_section(main, doc)
    yield judged([t for t in tables if t.rows])
    groups = dict.fromkeys(arm.group for arm in main.plan.arms)
    yield from (group_section(main, group, doc) for group in groups)
    yield course_section(main, doc)
    yield picture_section(main, places, doc)
    yield before_section(before, doc)
    yield from map(other_section, others)
    yield limits(tables)


def run(args: argparse.Namespace) -> None:
    """Write the page and its pictures."""
    doc: Path = args.out.resolve().parent
    check_writable("out", doc / "study" / "x")
    places = Places(args.work, args.results)
    if not read_table(MAIN, args.results).rows:
        raise ValueError(f"{args.results}: no result of {MAIN} yet; run python -m studies {MAIN}")
    measure_references(MAIN, places)
    names = sorted({file.stem for file in FOLDER.glob("*.toml")} - {MAIN, BEFORE, "smoke"})
    tables = [read_table(name, args.results) for name in (MAIN, BEFORE, *names)]
    sections = filter(None, page(tables, places, doc))
    text = "\n\n".join(sections) + "\n"
    with atomic_path(args.out) as temporary:
        temporary.write_text(text, "utf-8")
    print(f"saved {args.out} and {doc / 'study'}")


def build_parser() -> OneLineParser:
    """All flags."""
    parser = OneLineParser(prog="python -m studies.report", description=__doc__)
    parser.add_argument("--out", type=file_path, default=ROOT / "doc/Study.md", metavar="FILE",
        help="page to write; plots go to study/ beside it (default: doc/Study.md)")  # fmt: skip
    add_places(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
