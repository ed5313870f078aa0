"""Train a face parser, or a parser of anything else, on pictures with label maps."""

import sys
from collections.abc import Sequence

from Compression.parser_scores import Scores
from Compression.parser_training import ParserSettings, score_parser, train_parser
from Util.cli import check_writable, if_interrupted, run_settings
from Util.progress import Progress, show

DESCRIPTION = """Train a BiSeNet parser on a folder with images/NAME.png (or .jpg) and
labels/NAME.png, 8-bit maps of class indices. Print the intersection over union of
every class, their mean, and that of the content mask, on pictures held out."""
EXAMPLE = """example:
  python3 train_parser.py --path Dataset/toon_faces_128px --val_path Dataset/toon_faces_128px_val \\
      --out Model/parser_model/toon_faces_128px.pt --size 128 --image_size 64 \\
      --width 8 --stem_stride 1 --iter 4500 --batch_size 16 --lr 0.025
"""


def table(scores: Scores) -> str:
    """Tabulate the scores."""
    lines = ["class              IoU"]
    columns = (scores.class_names, scores.class_iou.tolist(), scores.occurs.tolist())
    for index, (name, iou, occurs) in enumerate(zip(*columns, strict=True)):
        lines.append(f"{index:>3} {name:<12} " + (f"{iou:.4f}" if occurs else "   (none)"))
    lines.append(f"mean IoU of the {int(scores.occurs.sum())} classes: {scores.mean_iou:.4f}")
    lines.append(f"content-mask IoU: {scores.content_iou:.4f}")
    return "\n".join(lines)


def train(settings: ParserSettings) -> None:
    """Train under a progress bar and print the scores."""

    def kept() -> str:
        there = settings.state_file.is_file()
        return f"{settings.out} is kept; the same command with --resume goes on" if there else ""

    with if_interrupted(kept), Progress(settings.iter, "training") as bar:

        def after_step(step: int, loss: float) -> None:
            bar.update()
            bar.figures(f"loss {loss:.3f}")

        def after_evaluation(step: int, loss: float, scores: Scores) -> None:
            show(
                f"iteration {step}: loss {loss:.4f}, mean IoU {scores.mean_iou:.4f}, "
                f"content-mask IoU {scores.content_iou:.4f}"
            )

        show(table(train_parser(settings, after_step, after_evaluation)))
    print(f"wrote {settings.out}")


def run(settings: ParserSettings) -> None:
    """Train or score a parser."""
    for name, file in (("out", settings.out), ("report", settings.report)):
        if file and not (name == "out" and settings.eval_only):
            check_writable(name, file)
    if settings.eval_only is None:
        train(settings)
    else:
        print(table(score_parser(settings)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_settings(
        ParserSettings,
        run,
        argv,
        prog="train_parser.py",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )


if __name__ == "__main__":
    sys.exit(main())
