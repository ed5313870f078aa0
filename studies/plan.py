"""A plan: which arms are run with which seeds, for how long, and what is measured.

A TOML file. `[prune]` and `[train]` hold what all arms share, by the names of prune.py's and
train.py's flags; an arm's own `prune` and `train` win over it, and over those of an earlier arm
that it is `like`. Seed s of every arm scores by the same latents, as many as it scores by, sees the
same pictures in the same order and is measured on the same latents, so that arms are compared seed
by seed. In training, latents and layer noise are the same, too, but where an arm draws numbers of
its own: for a new discriminator, or for a term.

    about = "one line"
    seeds = [0, 1, 2]
    ratios = [0.7]
    control = "cagc"                    # what the others are compared with; an arm may name its own
    repeats = ["again"]                 # may be left out: arms that are the control once more
    [budget]
    images = 28800                      # shown in training; 0: no training
    measure_at = [0, 0.25, 0.5, 1]      # shares of it
    pictures = 10000                    # rendered for training
    [measure]
    figures = ["l1", "agreement"]       # of `studies.measuring.FIGURES`
    n_sample = 2000                     # latents
    real_pictures = 2000                # that they are compared with; no training saw them
    [[arms]]                            # in the order in which they are run
    name = "cagc"
    group = "content"
    about = "one line"
    prune = { metric = "content_aware" }
    [[arms]]
    name = "everywhere"
    group = "content"
    like = "cagc"                       # that arm's settings, but for its own
    train = { content_aware_KD = false }
    [[claims]]                          # decided by the intervals, see `studies.tables.decided`
    text = "Distilling inside the content beats distilling everywhere."
    source = "Liu et al., section 3.3"
    arm = "cagc"
    than = "everywhere"
    figure = "agreement_inside"
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Compression import distillation, pruning, run
from Compression.pruning import PruneSettings
from studies.measuring import FIGURES, GROUPS, HIGHER_IS_BETTER
from train_hyperparams import TrainConfig
from Util.settings import Kind, SettingError, Settings, from_flags, known_settings

FOLDER = Path(__file__).parent / "plans"
RESERVED = {
    "prune": {"ckpt", "out", "seed", "remove_ratio"},
    "train": {"path", "ckpt", "teacher_ckpt", "out", "resume", "seed", "iter", "model_save_freq"},
}
"""Settings that the runner gives itself."""


class PlanError(ValueError):
    """A plan cannot be used; the message names the file, the place in it and what to do."""


@dataclass(frozen=True)
class Arm:
    """One way to compress.

    Attributes:
        name: short, of letters, digits, - and _.
        group: the question that it belongs to.
        about: one line.
        control: the arm that it is compared with, at the same ratio.
        ratios: shares of the channels that are removed.
        prune: settings of prune.py, those shared by all arms and of the arm it is like among them.
        train: settings of train.py, likewise.
    """

    name: str
    group: str
    about: str
    control: str
    ratios: tuple[float, ...]
    prune: Mapping[str, Any]
    train: Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A statement that the results decide.

    Attributes:
        text: in words.
        source: who made it.
        figure: that decides.
        arm: that it says is better.
        than: another arm.
        ratio: at which both are compared.
    """

    text: str
    source: str
    figure: str
    arm: str
    than: str
    ratio: float


@dataclass(frozen=True)
class Job:
    """One arm at one ratio with one seed."""

    arm: Arm
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and its results."""
        return f"{self.arm.name}-{self.ratio:g}-s{self.seed}"


@dataclass(frozen=True)
class Plan:
    """See the module."""

    name: str
    about: str
    seeds: tuple[int, ...]
    control: str
    repeats: tuple[str, ...]
    images: int
    measure_at: tuple[float, ...]
    pictures: int
    figures: tuple[str, ...]
    n_sample: int
    real_pictures: int
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]

    @property
    def jobs(self) -> list[Job]:
        """All jobs, arm by arm, so that an arm has all its seeds before the next begins."""
        return [Job(a, ratio, seed) for a in self.arms for ratio in a.ratios for seed in self.seeds]

    @property
    def main_ratio(self) -> float:
        """The first arm's first, at which most arms are compared."""
        return self.arms[0].ratios[0]

    def arm(self, name: str) -> Arm:
        """Find an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)


class _Table:
    """A table of the file, whose every key must be known."""

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, dict):
            raise PlanError(f"{place}: expected a table, found {values!r}")
        self.values, self.place, self.asked = values, place, set[str]()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Take a value of a type; without a default it must be there."""
        self.asked.add(key)
        value = self.values.get(key, default)
        if value is ...:
            raise PlanError(f"{self.place}: {key} is missing")
        fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
        if not fits and value is not default:
            raise PlanError(f"{self.place}: {key} is {value!r}, of the wrong type")
        return value

    def several(
        self, key: str, kind: type | tuple[type, ...], default: Any = ...
    ) -> tuple[Any, ...]:
        """Take a list of values of a type, at least one unless the default is empty."""
        found = self.take(key, (list, tuple), default)
        bad = [v for v in found if not isinstance(v, kind) or isinstance(v, bool)]
        if bad or (not found and default != ()):
            raise PlanError(f"{self.place}: {key} is {list(found)!r}; a list of values is expected")
        if len(set(map(repr, found))) < len(found):
            raise PlanError(f"{self.place}: {key} names something twice")
        return tuple(found)

    def end(self) -> None:
        """Refuse keys that nothing has asked for."""
        if unknown := sorted(self.values.keys() - self.asked):
            known = ", ".join(sorted(self.asked))
            raise PlanError(f"{self.place}: {unknown[0]} is unknown; there are {known}")


def read_plan(text_or_file: str | Path) -> Plan:
    """Read a plan by its file, or by its name in studies/plans.

    Raises:
        PlanError: it cannot be used.
    """
    named = FOLDER / f"{text_or_file}.toml"
    file = named if named.is_file() else Path(text_or_file)
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise PlanError(f"{file}: no such plan; name a file, or one of {there}")
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: no TOML ({error})") from None
    return parse_plan(content, file.stem, str(file))


def parse_plan(content: Mapping[str, Any], name: str, place: str) -> Plan:
    """Make a plan of a file's content.

    Args:
        content: see the module.
        name: of the plan.
        place: of the content, for messages.

    Raises:
        PlanError: it cannot be used.
    """
    top = _Table(dict(content), place)
    budget = _Table(top.take("budget", dict), f"{place}, budget")
    measure = _Table(top.take("measure", dict), f"{place}, measure")
    ratios = top.several("ratios", (int, float), (0.7,))
    control = top.take("control", str)
    prune, train = (top.take(kind, dict, {}) for kind in ("prune", "train"))
    shared = Arm("", "", "", control, ratios, prune, train)
    arms: list[Arm] = []
    for item in top.take("arms", list):
        arms.append(_arm(item, shared, arms, place))
    plan = Plan(
        name=name,
        about=top.take("about", str),
        seeds=top.several("seeds", int),
        control=control,
        repeats=top.several("repeats", str, ()),
        images=budget.take("images", int),
        measure_at=budget.several("measure_at", (int, float), (0, 1)),
        pictures=budget.take("pictures", int, 10_000),
        figures=measure.several("figures", str),
        n_sample=measure.take("n_sample", int),
        real_pictures=measure.take("real_pictures", int, 2000),
        arms=tuple(arms),
        claims=tuple(_claim(item, place) for item in top.take("claims", list, [])),
    )
    for table in (top, budget, measure):
        table.end()
    _check(plan, place)
    return plan


def _arm(item: Any, shared: Arm, before: Sequence[Arm], place: str) -> Arm:
    table = _Table(item, f"{place}, arms")
    name = table.take("name", str)
    table.place = f"{place}, arm {name}"
    like = table.take("like", str, "")
    known = {"": shared} | {arm.name: arm for arm in before}
    if like not in known:
        raise PlanError(f"{table.place}: like {like}: no arm before it has that name")
    base = known[like]
    arm = Arm(
        name,
        table.take("group", str),
        table.take("about", str, ""),
        table.take("control", str, shared.control),
        table.several("ratios", (int, float), shared.ratios),
        {**base.prune, **table.take("prune", dict, {})},
        {**base.train, **table.take("train", dict, {})},
    )
    table.end()
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise PlanError(f"{table.place}: take letters, digits, - and _")
    return arm


def _claim(item: Any, place: str) -> Claim:
    table = _Table(item, f"{place}, claims")
    texts = {key: table.take(key, str) for key in ("text", "source", "figure", "arm", "than")}
    claim = Claim(**texts, ratio=table.take("ratio", float, 0.7))
    table.end()
    return claim


def _check(plan: Plan, place: str) -> None:
    """Refuse what does not go together, before anything is computed."""
    names = [arm.name for arm in plan.arms]
    if len(set(names)) < len(names):
        raise PlanError(f"{place}, arms: two have the same name")
    if plan.images < 0 or plan.pictures < 1 or min(plan.n_sample, plan.real_pictures) < 4:
        raise PlanError(f"{place}: images, pictures, n_sample or real_pictures is too low")
    if not all(0 <= share <= 1 for share in plan.measure_at):
        raise PlanError(f"{place}, budget: measure_at holds shares of the budget, in [0, 1]")
    if plan.images and max(plan.measure_at) < 1:
        raise PlanError(f"{place}, budget: measure_at lacks 1, the end of the budget")
    if unknown := set(plan.figures) - FIGURES.keys():
        known = ", ".join(FIGURES)
        raise PlanError(f"{place}, measure: {min(unknown)}: unknown; take some of {known}")
    controls = (plan.control, *plan.repeats, *(arm.control for arm in plan.arms))
    for what in (*controls, *(n for c in plan.claims for n in (c.arm, c.than))):
        if what not in names:
            raise PlanError(f"{place}: {what}: no such arm; there are {', '.join(names)}")
    _check_claims(plan, place)
    for arm in plan.arms:
        _check_arm(plan, arm, place)


def _check_claims(plan: Plan, place: str) -> None:
    """Refuse claims of figures and ratios that nothing has."""
    for claim in plan.claims:
        if claim.figure not in HIGHER_IS_BETTER:
            known = ", ".join(HIGHER_IS_BETTER)
            raise PlanError(f"{place}, claims: {claim.figure}: unknown; take one of {known}")
        if not any(claim.figure in GROUPS[group] for group in plan.figures):
            raise PlanError(
                f"{place}, claims: {claim.figure} is not measured; see [measure] figures"
            )
        for name in (claim.arm, claim.than):
            if claim.ratio not in plan.arm(name).ratios:
                raise PlanError(f"{place}, claims: {name} is not run at ratio {claim.ratio:g}")


def _check_arm(plan: Plan, arm: Arm, place: str) -> None:
    """Make an arm's settings once, with stand-ins for what the runner knows."""
    job = Job(arm, arm.ratios[0], plan.seeds[0])
    for kind in ("prune", "train"):
        if clash := RESERVED[kind] & getattr(arm, kind).keys():
            raise PlanError(f"{place}, arm {arm.name}, {kind}: {min(clash)} is the runner's")
    try:
        for ratio in arm.ratios:
            prune_settings(dataclasses.replace(job, ratio=ratio), Path("pruned.pt"))
        config = train_config(plan, job, Path("data"), Path("pruned.pt"), Path("run"))
        distillation.weights(config)
    except ValueError as error:
        raise PlanError(f"{place}, arm {arm.name}: {error}") from None
    if plan.images % config.batch_size:
        raise PlanError(
            f"{place}, arm {arm.name}: {plan.images} images are no whole number of batches of"
            f" {config.batch_size}"
        )


def _settings(
    kind: type[Kind], values: Mapping[str, Any], options: Sequence[type[Settings]]
) -> Kind:
    """Make settings of named values; each must be known and of its type."""
    found = known_settings(values, kind, *options, source="settings")
    if unknown := sorted(values.keys() - found.keys()):
        raise SettingError(unknown[0], "is no setting")
    return from_flags(kind, found, options)


def prune_settings(job: Job, out: Path) -> PruneSettings:
    """Make a job's pruning settings.

    Raises:
        SettingError: names the setting.
    """
    own = {"remove_ratio": float(job.ratio), "seed": job.seed, "out": str(out), "device": "cpu"}
    return _settings(PruneSettings, {**job.arm.prune, **own}, pruning.option_kinds())


def train_config(plan: Plan, job: Job, data: Path, pruned: Path, folder: Path) -> TrainConfig:
    """Make a job's training settings.

    Args:
        plan: of the job.
        job: which one.
        data: folder of training pictures.
        pruned: checkpoint to start from.
        folder: of the run; where it holds one, that goes on.

    Raises:
        SettingError: names the setting.
    """
    batch = job.arm.train.get("batch_size", TrainConfig().batch_size)
    every = greatest_step(plan, batch)
    own = {
        "path": str(data),
        "ckpt": str(pruned),
        "teacher_ckpt": str(prune_settings(job, pruned).ckpt),
        "out": str(folder),
        "resume": str(folder) if folder.exists() else "",
        "seed": job.seed,
        "iter": max(1, plan.images // batch),
        "model_save_freq": every,
        "device": "cpu",
        "workers": 0,
    }
    return _settings(TrainConfig, {**job.arm.train, **own}, run.option_kinds())


def iterations(plan: Plan, batch: int) -> list[int]:
    """Give the iterations after which a run is measured, in order; 0 is before training."""
    return sorted({round(share * plan.images / batch) for share in plan.measure_at})


def greatest_step(plan: Plan, batch: int) -> int:
    """Compute the largest number of iterations of which every measuring point is a multiple."""
    return math.gcd(*iterations(plan, batch), max(1, plan.images // batch))
