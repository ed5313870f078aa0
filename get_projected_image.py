"""Find the latents and layer noise from which a generator makes given pictures, and how close."""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from Compression.content import ContentParser, parser_for
from Dataset.pictures import UnreadableImageError, fit_square, read_image
from Dataset.sources.folder import SUFFIXES, image_files
from Evaluation import sampling
from Evaluation.command_line import (
    add_perceptual_flags,
    distance_name,
    evaluation_parser,
    load_evaluated,
    perceptual_for,
    print_json,
)
from Evaluation.distances import Distance
from Evaluation.fidelity import fidelity
from Evaluation.projection import LEARNING_RATE, Projection, project, save_projection
from Model.generator import Generator
from Util.cli import OneLineParser, check_writable, run_script
from Util.device import pick_device
from Util.files import atomic_path
from Util.pictures import save_png, side_by_side
from Util.settings import at_least, file_path

PICTURE = "Image_Projection_Visualization.png"
TABLE = "projection.csv"
FIGURES = ("psnr", "perceptual", "content_psnr", "content_perceptual")
Row = dict[str, str | float]
"""The figures of one picture, and its name as ``picture``."""
EXAMPLES = f"""writes into --out: {PICTURE}, {TABLE}, and for every
picture NAME.npz (w_plus, noise_0, noise_1, ...), which get_edited_image.py takes

examples:
  python3 get_projected_image.py
      the bundled model, on four pictures that it made itself and has to find again
  python3 get_projected_image.py --image_file Dataset/toon_faces_128px_val/images --n_sample 8
      the bundled model, on pictures that it has not seen
  python3 get_projected_image.py --generated_img_size 256 --ckpt FILE --image_file Helen-Set55
      a folder of portraits, with LPIPS-VGG (downloaded on first use)
"""


def build_parser() -> OneLineParser:
    """Declare the command line."""
    parser = evaluation_parser("get_projected_image.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--image_file",
        type=file_path,
        metavar="PATH",
        help="a picture or a folder of pictures, cropped centrally to a square and resized to the"
        " model's size (default: pictures that the model makes of --seed)",
    )
    add(
        "--n_sample",
        type=at_least(1),
        metavar="N",
        help="first pictures of the folder that are projected (default: all); without --image_file"
        " how many the model makes (default: 4)",
    )
    add(
        "--num_iters",
        type=at_least(1),
        default=800,
        metavar="N",
        help="iterations per picture: search directions of lbfgs, whose line searches mostly take"
        " one evaluation each; steps of adam (default: %(default)s)",
    )
    _add_optimiser_flags(parser)
    add_perceptual_flags(parser)
    add(
        "--out",
        type=file_path,
        default=Path("projection"),
        metavar="DIR",
        help="folder of the results (default: %(default)s)",
    )
    add(
        "--shown",
        type=at_least(1),
        default=8,
        metavar="N",
        help=f"pictures in {PICTURE} at most (default: %(default)s)",
    )
    return parser


def _add_optimiser_flags(parser: OneLineParser) -> None:
    add = parser.add_argument
    add(
        "--optimizer",
        choices=tuple(LEARNING_RATE),
        default="lbfgs",
        help="lbfgs has a strong Wolfe line search (default: %(default)s)",
    )
    add(
        "--lr",
        type=number(zero=False),
        metavar="LR",
        help="first step that lbfgs's line search tries (default: 1); adam's step size, which"
        " decays to 0 along a cosine (default: 0.1)",
    )
    add(
        "--batch_size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="pictures projected at once, each by a search of its own: a matter of speed and memory"
        " (and of rounding: equal digits need equal batches; default: %(default)s)",
    )
    add(
        "--mse_weight",
        type=number(zero=True),
        default=1.0,
        metavar="W",
        help="weight of the mean squared error, over values in [-1, 1] (default: %(default)s)",
    )
    add(
        "--perceptual_weight",
        type=number(zero=True),
        metavar="W",
        help="weight of the perceptual distance (default: 1 for LPIPS, 0.1 for parser, whose"
        " distances are larger)",
    )


def number(zero: bool) -> Callable[[str], float]:
    """Argument type: a finite number above 0, or with ``zero`` of at least 0."""

    def parse(text: str) -> float:
        value = float(text)
        if not (0 < value < math.inf or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if zero else 'above'} 0")
        return value

    return parse


@dataclass(frozen=True)
class Targets:
    """The pictures to project.

    Attributes:
        names: one each, unique.
        load: numbers of pictures -> (len, 3, size, size) in [-1, 1].
        origin: a sentence for the output.
    """

    names: list[str]
    load: Callable[[Sequence[int]], Tensor]
    origin: str


def own_pictures(args: argparse.Namespace, generator: Generator) -> Targets:
    """Pictures that the generator makes itself, with layer noise of their own."""
    n = args.n_sample or 4
    return Targets(
        [f"seed_{args.seed}_image_{i}" for i in range(n)],
        lambda part: sampling.images(generator, part, args.seed),
        f"no --image_file: projecting {n} pictures that the model itself makes of seed {args.seed}",
    )


def picture_files(args: argparse.Namespace) -> list[Path]:
    """The files of --image_file.

    Raises:
        ValueError: there are none, or two would have the same result file.
    """
    place: Path = args.image_file
    if not place.exists():
        raise ValueError(f"--image_file {place}: no such file or folder")
    if not place.is_dir():
        return [place]
    files = [place / name for name in image_files(place)][: args.n_sample]
    if not files:
        raise ValueError(f"--image_file {place}: holds no pictures ({', '.join(SUFFIXES)})")
    stems: dict[Path, Path] = {}
    for file in files:
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file:
            raise ValueError(f"--image_file: {other} and {file} differ in their ending only")
    return files


def pictures_from_files(args: argparse.Namespace, size: int, device: torch.device) -> Targets:
    """Pictures of --image_file, each read once now, so that none stops the work later.

    Raises:
        ValueError: names the first one that cannot be read.
    """
    files = picture_files(args)
    fitted = []
    for file in files:
        try:
            width, height = read_image(file).size
        except UnreadableImageError as error:
            raise ValueError(f"--image_file {file}: {error}") from None
        if (width, height) != (size, size):
            crop = "" if width == height else f"cropped centrally to {min(width, height)} px and "
            fitted.append(f"{file.name} ({width}x{height} px) {crop}resized to {size}x{size} px")
    more = f"; likewise {len(fitted) - 1} more of {len(files)}" if len(fitted) > 1 else ""
    notes = fitted if args.info_print else [fitted[0] + more] if fitted else []
    root = args.image_file if args.image_file.is_dir() else args.image_file.parent

    def load(part: Sequence[int]) -> Tensor:
        squares = [np.array(fit_square(read_image(files[i]), size)) for i in part]
        pixels = torch.from_numpy(np.stack(squares)).to(device)
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)

    names = [file.relative_to(root).as_posix() for file in files]
    count = f"{len(files)} picture{'s' * (len(files) > 1)} of {args.image_file}"
    return Targets(names, load, "\n".join([count, *notes]))


def project_all(
    args: argparse.Namespace, generator: Generator, targets: Targets, perceptual: Distance
) -> Iterator[tuple[list[str], Tensor, Projection]]:
    """Project batch after batch under a progress bar: names, real pictures, what was found."""
    batches = list(sampling.shares(len(targets.names), args.batch_size))
    with tqdm(total=len(batches) * args.num_iters, desc="projecting", unit="it") as bar:

        def progress(loss: Tensor) -> None:
            bar.set_postfix(loss=f"{loss.mean():.4g}", refresh=False)
            bar.update()

        for part in batches:
            real = targets.load(part)
            projection = project(
                generator,
                real,
                perceptual,
                optimizer=args.optimizer,
                num_iters=args.num_iters,
                lr=args.lr,
                mse_weight=args.mse_weight,
                perceptual_weight=args.perceptual_weight,
                seed=args.seed,
                progress=progress,
            )
            yield [targets.names[i] for i in part], real, projection


def project_and_save(
    args: argparse.Namespace,
    generator: Generator,
    targets: Targets,
    parser: ContentParser,
    perceptual: Distance,
) -> list[Row]:
    """Project, write latents as soon as they are there, and the picture and the table at the end.

    Returns:
        A row of figures for each picture.
    """
    rows: list[Row] = []
    shown: dict[str, list[Tensor]] = {"real": [], "projected": [], "content": []}
    for names, real, projection in project_all(args, generator, targets, perceptual):
        with torch.no_grad():
            made = generator.synthesis(projection.w_plus, projection.noise).image
        mask = parser(real)
        figures = fidelity(real, made, mask, perceptual)
        figures |= {"loss": projection.loss, "evaluations": projection.evaluations}
        for i, name in enumerate(names):
            file = (args.out / name).with_suffix(".npz")
            save_projection(file, projection.part(i), generator, args.ckpt.name, [name])
            rows.append({"picture": name} | {k: v[i].item() for k, v in figures.items()})
        room = args.shown - len(rows) + len(names)
        for row, images in zip(shown.values(), (real, made, mask), strict=True):
            row.append(images[: max(room, 0)].cpu())
    strips = {caption: torch.cat(images) for caption, images in shown.items()}
    scale = max(1, 128 // generator.size)
    save_png(args.out / PICTURE, side_by_side(strips, scale))
    save_csv(args.out / TABLE, rows)
    return rows


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows under their names, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of every distance; those without content are left out of the content-aware ones."""
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in FIGURES}
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {k: float(values.mean()) if values.size else math.nan for k, values in known.items()}


def table(rows: Sequence[Row], distance: str) -> str:
    """The distances of every picture, and their means."""
    heads = ("PSNR (dB)", distance, "content PSNR (dB)", f"content {distance}")
    summary = [*rows, {"picture": "mean"} | means(rows)] if len(rows) > 1 else rows
    width = max(len(str(row["picture"])) for row in summary)
    lines = [" ".join([" " * width, *(f"{head:>{len(head) + 2}}" for head in heads)])]
    for row in summary:
        cells = [f"{row[k]:>{len(head) + 2}.4g}" for k, head in zip(FIGURES, heads, strict=True)]
        lines.append(" ".join([f"{row['picture']:<{width}}", *cells]))
    empty = sum(math.isnan(float(row["content_psnr"])) for row in rows)
    if empty:
        lines.append(f"nan: {empty} of {len(rows)} pictures have no content for the parser")
    return "\n".join(lines)


def protocol_of(args: argparse.Namespace, distance: str) -> str:
    """What the figures mean."""
    return (
        "PSNR of values clamped to [-1, 1], peak-to-peak 2, no 8-bit step;"
        f" {distance} at no more than 256 px; content: the real picture's content mask, PSNR over"
        f" its pixels only, {distance} of both pictures times the mask; w+ and layer noise by"
        f" {args.optimizer}, {args.num_iters} iterations, on {args.mse_weight:g} MSE +"
        f" {args.perceptual_weight:g} {distance}"
    )


def run(args: argparse.Namespace) -> None:
    """Project and report.

    Raises:
        ValueError: naming the flag or file.
    """
    device = pick_device(args.device)
    generator = load_evaluated(args.ckpt, args.generated_img_size, device)
    parser = parser_for(args.parser_ckpt, args.ckpt, device)
    perceptual = perceptual_for(args, args.ckpt, device)
    distance = distance_name(args.perceptual)
    if args.perceptual_weight is None:
        args.perceptual_weight = 0.1 if args.perceptual == "parser" else 1.0
    if args.image_file:
        targets = pictures_from_files(args, generator.size, device)
    else:
        targets = own_pictures(args, generator)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is no folder; name another")
    check_writable("out", args.out / PICTURE)
    print(targets.origin)
    rows = project_and_save(args, generator, targets, parser, perceptual)
    print(table(rows, distance))
    protocol = protocol_of(args, distance)
    print(f"({protocol})")
    if args.info_print:
        passes = ", ".join(f"{row['evaluations']}" for row in rows)
        print(f"{args.ckpt}: {generator.size} px on {device}; evaluations: {passes}")
    print(f"saved {args.out}: {PICTURE}, {TABLE}, {len(rows)} x .npz")
    figures = {"mean": finite(means(rows)), "pictures": [finite(row) for row in rows]}
    print_json(args, figures, protocol)


def finite(row: Mapping[str, str | float]) -> dict[str, str | float | None]:
    """What JSON can hold: None for values that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
