"""Results as tables in Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from studies.jobs import check_unchanged, settings_of
from studies.measuring import HIGHER_IS_BETTER
from studies.plan import Claim, Plan, read_plan
from studies.results import Result, read_results, references_file, results_file
from studies.statistics import (
    Interval,
    mean_and_deviation,
    paired_difference,
    pooled_difference,
    verdict,
)

TITLES = {
    "agreement": "agreement",
    "agreement_inside": "agreement inside",
    "agreement_outside": "agreement outside",
    "variety": "variety",
    "l1_inside": "L1 inside",
    "l1_outside": "L1 outside",
    "frechet": "Frechet",
    "frechet_inside": "Frechet inside",
    "precision": "precision",
    "recall": "recall",
    "ppl": "PPL",
}
COSTS = {"macs": "MACs", "parameters": "parameters"}
ONE_DECIMAL = ("frechet", "frechet_inside", "ppl")
"""Figures in the tens; all others are shares or distances below 1, in three decimals."""


@dataclass(frozen=True)
class Table:
    """A plan with its results.

    Attributes:
        plan: that was run.
        rows: one for each finished job that is still in the plan.
        references: what students are seen beside: figures by name, one mapping for each seed.
    """

    plan: Plan
    rows: Sequence[Result]
    references: Sequence[Mapping[str, Mapping[str, float]]] = ()

    def of(self, arm: str, ratio: float) -> list[Result]:
        """Give an arm's results at a ratio."""
        return [r for r in self.rows if r["arm"] == arm and r["ratio"] == ratio]

    def values(self, arm: str, ratio: float, figure: str, point: int = -1) -> dict[int, float]:
        """Give a figure by seed, at a measuring point, the last one by default."""
        return {
            row["seed"]: row["points"][point]["figures"][figure]
            for row in self.of(arm, ratio)
            if figure in row["points"][point]["figures"]
        }

    @property
    def measured(self) -> list[tuple[str, float]]:
        """Arms and ratios that have results, in the plan's order."""
        pairs = [(arm.name, ratio) for arm in self.plan.arms for ratio in arm.ratios]
        return [pair for pair in pairs if self.of(*pair)]

    @property
    def figures(self) -> list[str]:
        """Figures that were measured at the end, in the order of `TITLES`."""
        found = {name for row in self.rows for name in row["points"][-1]["figures"]}
        return [name for name in TITLES if name in found]

    def cost(self, arm: str, ratio: float, kind: str) -> float:
        """Mean of one of `COSTS` over the seeds, whose widths may differ where they are chosen."""
        return mean_and_deviation([row[kind] for row in self.of(arm, ratio)])[0]

    def floor(self, group: str) -> float:
        """Mean agreement of the teacher's pictures of different latents."""
        return mean_and_deviation([row["floor"][group] for row in self.rows])[0]


def families(table: Table) -> dict[str, list[tuple[str, float]]]:
    """Gather arms and ratios that have results by their settings, but for the control's repeats.

    Returns:
        Arms and ratios, the smallest ratio first, by the name of the plan's first arm that has
        their settings.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    for name, ratio in table.measured:
        arm = table.plan.arm(name)
        if name in table.plan.repeats:
            continue
        settings = (arm.prune, arm.train)
        first = next(a for a in table.plan.arms if (a.prune, a.train) == settings)
        found.setdefault(first.name, []).append((name, ratio))
    return {name: sorted(pairs, key=lambda pair: pair[1]) for name, pairs in found.items()}


def read_table(name: str, results: Path) -> Table:
    """Read a plan, those of its results whose arms it still has, and the references' figures.

    Raises:
        ValueError: a result is of other settings than the plan's.
    """
    plan = read_plan(name)
    source = results_file(results, plan.name)
    jobs = {job.name: job for job in plan.jobs}
    rows = [row for row in read_results(source) if row["job"] in jobs]
    for row in rows:
        job = jobs[row["job"]]
        check_unchanged(job, row.get("settings", {}), settings_of(plan, job), str(source))
    file = references_file(results, plan.name)
    references = list(json.loads(file.read_text())["seeds"].values()) if file.is_file() else []
    return Table(plan, rows, references)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, figure: str, sign: str = "") -> str:
    """Write a value of a figure, in as many decimals as all of its values have."""
    return format(value, f"{sign}.{1 if figure in ONE_DECIMAL else 3}f")


def spread(values: Iterable[float], figure: str) -> str:
    """Write mean and standard deviation of a figure, of a single value itself."""
    found = list(values)
    if not found:
        return "-"
    texts = [number(v, figure) for v in mean_and_deviation(found) if math.isfinite(v)]
    return " ± ".join(texts) or "-"


def signed(difference: Interval | None, seeds: int, figure: str) -> str:
    """Write a figure's difference with its interval; bold: it leaves out 0 and has all seeds."""
    if difference is None:
        return "-"
    ends = (difference.mean, difference.low, difference.high)
    mean, low, high = (number(v, figure, "+") for v in ends)
    if difference.n < 2:
        return f"{mean} (one seed)"
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if difference.leaves_out_zero and difference.n == seeds else text


def label(table: Table, arm: str, ratio: float) -> str:
    """Name an arm, with its ratio where the plan has several."""
    ratios = {r for a in table.plan.arms for r in a.ratios}
    return f"{arm} {ratio:g}" if len(ratios) > 1 else arm


def means(table: Table, pairs: Sequence[tuple[str, float]]) -> str:
    """Tabulate mean ± standard deviation over the seeds."""
    figures = [f for f in table.figures if any(table.values(*p, f) for p in pairs)]
    rows = [
        [
            label(table, *pair),
            str(len(table.of(*pair))),
            *(f"{table.cost(*pair, kind):,.0f}" for kind in COSTS),
            *(spread(table.values(*pair, f).values(), f) for f in figures),
        ]
        for pair in pairs
    ]
    for name in table.references[0] if table.references else ():
        own = [row[name] for row in table.references]
        cells = [spread((row[f] for row in own if f in row), f) for f in figures]
        rows.append([f"*{name}*", str(len(own)), *("" for _ in COSTS), *cells])
    return markdown(["arm", "seeds", *COSTS.values(), *(TITLES[f] for f in figures)], rows)


def against_control(table: Table, arm: str, figure: str) -> Interval:
    """Compute the paired difference of a complete arm to the plan's control, at the main ratio."""
    ratio = table.plan.main_ratio
    found = paired_difference(
        table.values(arm, ratio, figure), table.values(table.plan.control, ratio, figure)
    )
    assert found is not None, f"{arm} and {table.plan.control} have no seed in common"
    return found


def complete(table: Table, figure: str) -> list[str]:
    """Give the arms that have all seeds at the main ratio, the best by a figure first."""
    plan = table.plan
    found = {arm.name: table.values(arm.name, plan.main_ratio, figure) for arm in plan.arms}
    means = {
        name: mean_and_deviation(list(values.values()))[0]
        for name, values in found.items()
        if len(values) == len(plan.seeds)
    }
    return sorted(means, key=means.__getitem__, reverse=HIGHER_IS_BETTER[figure])


def glance(table: Table, figures: Sequence[str]) -> str:
    """Tabulate few figures of the complete arms, the best by the first of them first.

    Bold: the difference to the plan's control, which must be complete, leaves out 0.
    """
    ratio = table.plan.main_ratio
    rows = []
    for arm in complete(table, figures[0]):
        cells = []
        for figure in figures:
            cell = spread(table.values(arm, ratio, figure).values(), figure)
            apart = against_control(table, arm, figure).leaves_out_zero
            cells.append(f"**{cell}**" if apart else cell)
        parameters = f"{table.cost(arm, ratio, 'parameters'):,.0f}"
        rows.append([f"`{arm}`", table.plan.arm(arm).about, parameters, *cells])
    head = ["arm", "what it is", COSTS["parameters"], *(TITLES[f] for f in figures)]
    return markdown(head, rows)


def controls(table: Table, pairs: Sequence[tuple[str, float]]) -> str:
    """Name what arms are compared with."""
    names = dict.fromkeys(table.plan.arm(arm).control for arm, _ in pairs)
    return ", ".join(f"`{name}`" for name in names)


def by_attribute(table: Table, pairs: Sequence[tuple[str, float]], inside: Sequence[str]) -> str:
    """Tabulate the mean agreement of every attribute, those inside the content first.

    Args:
        table: of the results.
        pairs: arms and ratios, at least one, a column each.
        inside: attributes inside the content.
    """
    figures = table.of(*pairs[0])[0]["points"][-1]["figures"]
    names = [figure.partition(":")[2] for figure in figures if ":" in figure]
    rows = [
        [
            name,
            "inside" if name in inside else "outside",
            *(
                number(mean_and_deviation(list(found.values()))[0], "agreement") if found else "-"
                for found in (table.values(*pair, f"agreement:{name}") for pair in pairs)
            ),
        ]
        for name in sorted(names, key=lambda name: name not in inside)
    ]
    return markdown(["attribute", "content", *(label(table, *pair) for pair in pairs)], rows)


def compared(table: Table, pairs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Give the arms whose control has results at their ratio."""
    return [
        (arm, ratio)
        for arm, ratio in pairs
        if (control := table.plan.arm(arm).control) != arm and table.of(control, ratio)
    ]


def differences(table: Table, pairs: Sequence[tuple[str, float]]) -> str:
    """Tabulate differences to each arm's control at the same ratio, paired by seed.

    Where the arms have several controls, a row names its own.
    """
    several = len({table.plan.arm(arm).control for arm, _ in pairs}) > 1
    rows = []
    for arm, ratio in pairs:
        control = table.plan.arm(arm).control
        cells = []
        for f in table.figures:
            ours, theirs = table.values(arm, ratio, f), table.values(control, ratio, f)
            cells.append(signed(paired_difference(ours, theirs), len(table.plan.seeds), f))
        name = label(table, arm, ratio)
        rows.append([f"{name} - {control}" if several else name, *cells])
    return markdown(["arm", *(TITLES[f] for f in table.figures)], rows)


def decided(table: Table, claim: Claim) -> tuple[str, Interval | None]:
    """Decide a claim; less than all of the plan's seeds decide nothing.

    Returns:
        The verdict of `studies.statistics.verdict`, and the difference.
    """
    ours = table.values(claim.arm, claim.ratio, claim.figure)
    theirs = table.values(claim.than, claim.ratio, claim.figure)
    difference = paired_difference(ours, theirs)
    if difference is None or difference.n < len(table.plan.seeds):
        return "not run", difference
    return verdict(difference, HIGHER_IS_BETTER[claim.figure]), difference


def decided_again(table: Table, claim: Claim) -> list[str]:
    """Decide a claim by each of the control's other runs.

    Returns:
        The verdicts of those that have the figure; none where the claim has nothing to do with the
        control.
    """
    control = table.plan.control
    if control not in (claim.arm, claim.than):
        return []
    others = [
        replace(claim, arm=name if claim.arm == control else claim.arm,
                than=name if claim.than == control else claim.than)
        for name in table.plan.repeats
    ]  # fmt: skip
    found = (decided(table, other)[0] for other in others)
    return [word for word in found if word != "not run"]


def decided_pooled(table: Table, claim: Claim) -> str:
    """Decide a claim by the standard deviation of all arms that have every seed.

    Returns:
        The verdict; empty where seeds are missing or the arms' deviations differ.
    """
    found = {pair: list(table.values(*pair, claim.figure).values()) for pair in table.measured}
    full = {pair: v for pair, v in found.items() if len(v) == len(table.plan.seeds) > 1}
    ours, theirs = (full.get((name, claim.ratio)) for name in (claim.arm, claim.than))
    if ours is None or theirs is None:
        return ""
    difference = pooled_difference(ours, theirs, list(full.values()))
    return verdict(difference, HIGHER_IS_BETTER[claim.figure]) if difference else ""


def verdicts(table: Table) -> str:
    """Tabulate the claims with what the intervals say."""
    rows = []
    for claim in table.plan.claims:
        found, difference = decided(table, claim)
        better = "higher" if HIGHER_IS_BETTER[claim.figure] else "lower"
        figure = TITLES.get(claim.figure, claim.figure.replace(":", " of "))
        sides = f"{claim.arm} - {claim.than}, {figure} ({better} is better)"
        cell = signed(difference, len(table.plan.seeds), claim.figure)
        again = ", ".join(f"*{other}*" for other in dict.fromkeys(decided_again(table, claim)))
        pooled = decided_pooled(table, claim)
        words = [f"*{found}*", again, pooled and f"*{pooled}*"]
        rows.append([claim.text, claim.source, sides, cell, *words])
    head = ["claim", "whose", "compared", "difference [95 %]", "verdict", "again", "pooled"]
    return markdown(head, rows)


def points_of(row: Result, figure: str) -> Mapping[int, float]:
    """Give a figure by images shown."""
    return {p["images"]: p["figures"][figure] for p in row["points"] if figure in p["figures"]}


def overview(table: Table) -> str:
    """Tabulate all arms, and their differences to the control."""
    parts = [means(table, table.measured)]
    if pairs := compared(table, table.measured):
        parts += [f"Differences to {controls(table, pairs)}, paired by seed, 95 % intervals:"]
        parts += [differences(table, pairs)]
    return "\n\n".join(parts)
