"""Project many pictures: write what each is made of, and tables of how close they come."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from Dataset.images import to_float
from Dataset.pictures import FILTERS, UnreadableImageError, fit_square, read_image
from Dataset.sources.folder import SUFFIXES, image_files
from Evaluation import sampling
from Evaluation.comparison import fidelity, paper_fidelity
from Evaluation.distances import Distance
from Evaluation.features import Mask, masks_of
from Evaluation.projection import (
    LEARNING_RATE,
    PROTOCOLS,
    Projection,
    load_projection,
    project,
    save_projection,
)
from Evaluation.settings import ContentSettings, LoadMask, ModelSettings, Result, finite
from Model import bundled
from Model.generator import Generator
from Util import memory
from Util.cli import check_writable, if_interrupted
from Util.files import atomic_path
from Util.pictures import save_png, side_by_side
from Util.progress import Progress
from Util.settings import SettingError, blame, plain, setting

PICTURE = "Image_Projection_Visualization.png"
TABLE = "projection.csv"
RECORD = "projection.json"
SEARCH = ("optimizer", "num_iters", "lr", "mse_weight", "seed", "protocol")
FIGURES = {
    "psnr": "PSNR (dB)",
    "paper_psnr": "paper's PSNR (dB)",
    "perceptual": "{}",
    "paper_perceptual": "paper's {}",
    "content_psnr": "content PSNR (dB)",
    "content_perceptual": "content {}",
}
"""Heads of the table; {} is the perceptual distance."""
Row = dict[str, str | float]
"""The figures of one picture, and its name as ``picture``."""


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings(ContentSettings, ModelSettings):
    """Settings of `project_pictures`."""

    image_file: Path | None = setting(
        None,
        "a picture or a folder of pictures, cropped centrally to a square and resized to the"
        " model's size (default: pictures that the model makes of --seed)",
        metavar="PATH",
        exists="file or folder",
    )
    n_sample: int | None = setting(
        None,
        "first pictures of the folder that are projected (default: all); without --image_file"
        " how many the model makes (default: 4)",
        low=1,
    )
    protocol: str = setting(
        "standard",
        "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items())
        + "; it also prints the original's figures, whose PSNR wraps around",
        choices=PROTOCOLS,
    )
    resample: str = setting("bilinear", "filter that resizes pictures", choices=FILTERS)
    num_iters: int = setting(
        800,
        "iterations per picture: search directions of lbfgs, whose line searches mostly take one"
        " evaluation each; steps of adam",
        low=1,
    )
    optimizer: str = setting(
        "lbfgs", "lbfgs has a strong Wolfe line search", choices=tuple(LEARNING_RATE)
    )
    lr: float | None = setting(
        None,
        "first step that lbfgs's line search tries (default: 1); adam's step size, which decays to"
        " 0 along a cosine (default: 0.1)",
        above=0,
    )
    batch_size: int = setting(
        8,
        "pictures projected at once, fewer where they are large, each by a search of its own; equal"
        " digits need equal batches",
        low=1,
    )
    mse_weight: float = setting(
        1.0, "weight of the mean squared error, over values in [-1, 1]", low=0
    )
    perceptual_weight: float | None = setting(
        None,
        "weight of the perceptual distance (default: 1 for LPIPS, 0.1 for parser, whose distances"
        " are larger)",
        low=0,
    )
    out: Path = setting(Path("projection"), "folder of the results", metavar="DIR")
    resume: bool = setting(
        False, "keep the pictures that --out holds of an interrupted run, project the others"
    )
    shown: int = setting(8, f"pictures in {PICTURE} at most", low=1)

    @property
    def weight(self) -> float:
        """The weight of the perceptual distance."""
        if self.perceptual_weight is not None:
            return self.perceptual_weight
        return 0.1 if self.network(self.ckpt) == "parser" else 1.0


@dataclass(frozen=True)
class Targets:
    """The pictures to project.

    Attributes:
        names: one each, unique.
        load: numbers of pictures -> (len, 3, size, size) in [-1, 1].
        origin: where they are from, in words.
    """

    names: list[str]
    load: Callable[[Sequence[int]], Tensor]
    origin: str


def project_pictures(settings: ProjectionSettings, load_mask: LoadMask) -> Result:
    """Project pictures; write latents, a picture and a table into a folder.

    Args:
        settings: which pictures, and how.
        load_mask: see `LoadMask`.

    Raises:
        SettingError: names the setting and what to do.
    """
    device, model = settings.pick_device(), settings.ckpt
    settings.check_parser(model)
    generator = settings.load(model, device)
    # Nothing but some figures needs a parser.
    named = settings.parser_ckpt or settings.content or bundled.is_bundled(model)
    mask = None
    if named or bundled.PUBLISHED_PARSER.is_file():
        mask = settings.load_mask(load_mask, model, device)
    perceptual, distance = settings.load_distance(model, device), settings.distance_name(model)
    with blame("image_file"):
        targets = _targets(settings, generator)
    if settings.image_file and settings.out.resolve() == settings.image_file.resolve():
        raise SettingError("out", f"{settings.out} holds the pictures; name another folder")
    check_writable("out", settings.out / PICTURE)
    rows = _project_and_save(settings, generator, targets, mask, perceptual)
    protocol = _protocol(settings, distance, mask.chosen if mask else "")
    lines = [targets.origin, _table(rows, distance), f"({protocol})"]
    if mask is None:
        lines.append("no figures inside the content, which needs a face parser (parser_ckpt)")
    if settings.info_print:
        passes = ", ".join(f"{row['evaluations']}" for row in rows)
        lines.append(f"{model}: {generator.size} px on {device}; evaluations: {passes}")
    lines.append(f"saved {settings.out}: {PICTURE}, {TABLE}, {len(rows)} x .npz")
    figures = {"mean": _means(rows), "pictures": rows}
    chosen = {"perceptual": settings.network(model), "perceptual_weight": settings.weight}
    return Result(figures, protocol, lines, settings, chosen)


def _targets(settings: ProjectionSettings, generator: Generator) -> Targets:
    """Find pictures of files, or let the generator make some with layer noise of their own."""
    if settings.image_file:
        return _targets_from_files(settings, settings.image_file, generator)
    n, seed = settings.n_sample or 4, settings.seed
    return Targets(
        [f"seed_{seed}_image_{i}" for i in range(n)],
        lambda part: sampling.images(generator, part, seed),
        f"no image_file: projecting {n} pictures that the model itself makes of seed {seed}",
    )


def _picture_files(place: Path, n: int | None) -> list[Path]:
    """List a picture, or the first ``n`` of a folder, whose result files must differ."""
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder")
    if not place.is_dir():
        return [place]
    files = [place / name for name in image_files(place)][:n]
    if not files:
        raise ValueError(f"{place}: holds no pictures ({', '.join(SUFFIXES)})")
    stems: dict[Path, Path] = {}
    for file in files:
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file:
            raise ValueError(f"{other} and {file} differ in their ending only")
    return files


def _targets_from_files(settings: ProjectionSettings, place: Path, generator: Generator) -> Targets:
    """Find pictures of files, each read once now, so that none stops the work later."""
    files, size = _picture_files(place, settings.n_sample), generator.size
    notes = [note for file in files if (note := _fit(file, size, settings.resample))]
    if notes and not settings.info_print:
        more = f"; likewise {len(notes) - 1} more of {len(files)}" if len(notes) > 1 else ""
        notes = [notes[0] + more]

    def load(part: Sequence[int]) -> Tensor:
        squares = [
            np.array(fit_square(read_image(files[i]), size, settings.resample)) for i in part
        ]
        pixels = torch.from_numpy(np.stack(squares)).to(generator.device)
        return to_float(pixels.permute(0, 3, 1, 2))

    root = place if place.is_dir() else place.parent
    names = [file.relative_to(root).as_posix() for file in files]
    count = f"{len(files)} picture{'s' * (len(files) > 1)} of {place}"
    return Targets(names, load, "\n".join([count, *notes]))


def _fit(file: Path, size: int, resample: str) -> str:
    """Say how a picture is made to fit a size; empty if it does already."""
    try:
        width, height = read_image(file).size
    except UnreadableImageError as error:
        raise ValueError(f"{file}: {error}") from None
    if (width, height) == (size, size):
        return ""
    crop = "" if width == height else f"cropped centrally to {min(width, height)} px and "
    return f"{file.name} ({width}x{height} px) {crop}resized to {size}x{size} px by {resample}"


def _project(
    settings: ProjectionSettings,
    generator: Generator,
    targets: Targets,
    pending: Sequence[int],
    perceptual: Distance,
) -> Iterator[tuple[list[str], Tensor, Projection]]:
    """Project batch after batch under a progress bar: names, given pictures, what was found."""
    search = {name: getattr(settings, name) for name in SEARCH}
    search["perceptual_weight"] = settings.weight
    batch_size = memory.at_once(generator.size, memory.GRADIENTS, settings.batch_size)
    batches = list(sampling.shares(len(pending), batch_size))
    with Progress(len(batches) * settings.num_iters, "projecting") as bar:

        def progress(loss: Tensor) -> None:
            bar.figures(f"loss {loss.mean():.4g}")
            bar.update()

        for part in batches:
            numbers = [pending[i] for i in part]
            given = targets.load(numbers)
            found = project(generator, given, perceptual, **search, progress=progress)
            yield [targets.names[i] for i in numbers], given, found


def _project_and_save(
    settings: ProjectionSettings,
    generator: Generator,
    targets: Targets,
    content: Mask | None,
    perceptual: Distance,
) -> list[Row]:
    """Write latents and table after every batch, the picture at the end; return a row each."""
    masked = content is not None
    done = _finished(settings, generator, targets, masked) if settings.resume else {}
    pending = [i for i, name in enumerate(targets.names) if name not in done]

    def rows() -> list[Row]:
        return [done[name] for name in targets.names if name in done]

    def kept() -> str:
        if not done:
            return "no picture was finished"
        files = f"{len(done)} of {len(targets.names)} pictures are in {settings.out}"
        return f"{files}; the same command with --resume projects the others"

    with if_interrupted(kept):
        for names, given, found in _project(settings, generator, targets, pending, perceptual):
            figures = _figures(settings, generator, given, found, content, perceptual)
            for i, name in enumerate(names):
                file = _latents_file(settings, name)
                save_projection(file, found.part(i), generator, settings.ckpt.name, [name])
                done[name] = {"picture": name} | {k: v[i].item() for k, v in figures.items()}
            _save_rows(settings, rows())
        save_png(settings.out / PICTURE, _picture(settings, generator, targets, content))
    return rows()


def _latents_file(settings: ProjectionSettings, name: str) -> Path:
    """Where the latents of a picture are."""
    return (settings.out / name).with_suffix(".npz")


def _figures(
    settings: ProjectionSettings,
    generator: Generator,
    given: Tensor,
    found: Projection,
    content: Mask | None,
    perceptual: Distance,
) -> dict[str, Tensor]:
    """Measure projected pictures: one value each."""
    with torch.no_grad():
        made = sampling.synthesise(generator, found.w_plus, found.noise)
    mask = masks_of(content, given) if content else None
    figures = fidelity(given, made, mask, perceptual)
    if settings.protocol == "paper":
        figures |= paper_fidelity(given, made, perceptual)
    return figures | {"loss": found.loss, "evaluations": found.evaluations}


@torch.no_grad()
def _picture(
    settings: ProjectionSettings, generator: Generator, targets: Targets, content: Mask | None
) -> np.ndarray:
    """Show the first pictures, what was found of the files' latents, and the content."""
    numbers = range(min(settings.shown, len(targets.names)))
    given, made = targets.load(numbers), []
    for i in numbers:
        found = load_projection(_latents_file(settings, targets.names[i]), generator)
        made.append(sampling.synthesise(generator, found.w_plus, found.noise))
    rows = {"real" if settings.image_file else "given": given, "projected": torch.cat(made)}
    if content:
        rows["content"] = masks_of(content, given)
    strips = {caption: images.cpu() for caption, images in rows.items()}
    return side_by_side(strips, max(1, 128 // generator.size))


def _common(settings: ProjectionSettings) -> dict[str, Any]:
    """The settings that pictures of one folder have in common, as values that JSON holds."""
    names = {*SEARCH, "ckpt", "image_file", "resample", "batch_size", "perceptual_ckpt"}
    names |= {"parser_ckpt", "content"}
    chosen = {"perceptual": settings.network(settings.ckpt), "perceptual_weight": settings.weight}
    return {name: value for name, value in plain(settings).items() if name in names} | chosen


def _save_rows(settings: ProjectionSettings, rows: Sequence[Row]) -> None:
    """Write the table, and the record by which an interrupted run goes on."""
    _save_csv(settings.out / TABLE, rows)
    record = {"settings": _common(settings), "pictures": finite(rows)}
    with atomic_path(settings.out / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _finished(
    settings: ProjectionSettings, generator: Generator, targets: Targets, masked: bool
) -> dict[str, Row]:
    """The rows of pictures that the folder holds already, by name; masked: with content's figures.

    Raises:
        SettingError: the folder is of other settings or another model, or damaged.
    """
    file = settings.out / RECORD
    if not file.is_file():
        return {}
    with blame("resume"):
        try:
            record = json.loads(file.read_text())
            made, rows = (
                dict(record["settings"]),
                {row["picture"]: row for row in record["pictures"]},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); name another --out") from None
        for name, value in _common(settings).items():
            if made.get(name) != value:
                raise ValueError(
                    f"{settings.out}: made with {name} {made.get(name)}, not {value}; give the same"
                    " settings, or name another --out"
                )
        if any(("content_psnr" in row) != masked for row in rows.values()):
            had = "without a face parser" if masked else "with a face parser"
            raise ValueError(
                f"{settings.out}: made {had}; make that so again, or name another --out"
            )
        done = {}
        for name in targets.names:
            if name in rows and (latents := _latents_file(settings, name)).is_file():
                load_projection(latents, generator)  # of these weights, and whole
                done[name] = {k: math.nan if v is None else v for k, v in rows[name].items()}
        return done


def _save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows under their names, atomically."""
    # A name that is no UTF-8 is written as the bytes that it is.
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Average every figure; the content-aware ones leave out pictures without content."""
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in _named(rows)}
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {k: float(values.mean()) if values.size else math.nan for k, values in known.items()}


def _named(rows: Sequence[Row]) -> list[str]:
    """The figures that the rows have, in the order of the table."""
    return [name for name in FIGURES if name in rows[0]]


def _table(rows: Sequence[Row], distance: str) -> str:
    """Format the figures of every picture, and their means."""
    names = _named(rows)
    heads = [FIGURES[name].format(distance) for name in names]
    summary = [*rows, {"picture": "mean"} | _means(rows)] if len(rows) > 1 else rows
    width = max(len(str(row["picture"])) for row in summary)
    lines = [" ".join([" " * width, *(f"{head:>{len(head) + 2}}" for head in heads)])]
    for row in summary:
        cells = [f"{row[k]:>{len(head) + 2}.4g}" for k, head in zip(names, heads, strict=True)]
        lines.append(" ".join([f"{row['picture']:<{width}}", *cells]))
    if empty := sum(math.isnan(float(row.get("content_psnr", 0))) for row in rows):
        lines.append(f"nan: {empty} of {len(rows)} pictures have no content for the parser")
    return "\n".join(lines)


def _protocol(settings: ProjectionSettings, distance: str, content: str) -> str:
    """Say what the figures mean."""
    of = f" of {content}" if content else ""
    paper = ""
    if settings.protocol == "paper":
        paper = (
            "; paper's PSNR: of bytes, whose differences and squares wrap around at 256; paper's"
            f" {distance}: not clamped, halved to 256 px"
        )
    return (
        f"protocol {settings.protocol}: {PROTOCOLS[settings.protocol]};"
        " PSNR of values clamped to [-1, 1], peak-to-peak 2, no 8-bit step;"
        f" {distance} at no more than 256 px; content: the real picture's content mask{of},"
        f" PSNR over its pixels only, {distance} of both pictures times the mask; w+ and layer"
        f" noise by {settings.optimizer}, {settings.num_iters} iterations, on"
        f" {settings.mse_weight:g} MSE + {settings.weight:g} {distance}{paper}"
    )
