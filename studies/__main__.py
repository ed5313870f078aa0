"""Runs a plan: every arm is pruned, initialised, trained and measured with every seed."""

import argparse
import sys
from collections.abc import Sequence

from studies.jobs import Places, add_places
from studies.plan import FOLDER, Plan, read_plan
from studies.runner import chosen_jobs, describe_jobs, run_study
from studies.tables import overview, read_table, verdicts
from Util.cli import OneLineParser, run_script
from Util.settings import at_least

EPILOG = """examples:
  what there is to run, and for how long:
    python -m studies compression --dry_run
  run it; a stopped study goes on with the same command:
    python -m studies compression --jobs 2
  some arms alone:
    python -m studies compression --only 'cagc*'
  tables, plots and verdicts:
    python -m studies.report"""


def build_parser() -> OneLineParser:
    """All flags."""
    parser = OneLineParser(
        prog="python -m studies",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("plan", nargs="?", metavar="PLAN", help="a plan's file, or its name in studies/plans")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="jobs side by side (default: 1)")
    add("--only", default="", metavar="GLOB", help="jobs, arms or groups whose name fits")
    add("--dry_run", action="store_true", help="print the jobs and the time that they will take")
    add("--list", action="store_true", help="print the arms and their settings, or the plans")
    add_places(parser)
    return parser


def list_arms(plan: Plan) -> str:
    """Describe a plan's arms with all their settings."""
    lines = [f"{plan.name}: {plan.about}"]
    for arm in plan.arms:
        ratios = ", ".join(f"{ratio:g}" for ratio in arm.ratios)
        lines.append(f"{arm.group}/{arm.name} (ratio {ratios}): {arm.about}")
        for kind in ("prune", "train"):
            values = " ".join(f"{k}={v}" for k, v in getattr(arm, kind).items())
            lines.append(f"    {kind}: {values or 'defaults'}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Run, or say what would be run."""
    if args.plan is None:
        if not args.list:
            raise ValueError("PLAN is missing; --list prints the plans")
        for file in sorted(FOLDER.glob("*.toml")):
            print(f"{file.stem}: {read_plan(file).about}")
        return 0
    plan = read_plan(args.plan)
    if args.list:
        print(list_arms(plan))
        return 0
    places = Places(args.work, args.results)
    jobs = chosen_jobs(plan, args.only)
    print(describe_jobs(plan, jobs, places, args.jobs), flush=True)
    if args.dry_run:
        return 0
    code = run_study(args.plan, args.only, places, args.jobs)
    table = read_table(args.plan, args.results)
    if table.rows:
        print(f"\n{overview(table)}")
    if table.rows and table.plan.claims:
        print(f"\n{verdicts(table)}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
