"""Trains a face parser, or a parser of anything else, on pictures with label maps."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from Compression import parser_training
from Compression.content import ContentParser, usual_exclusions
from Compression.parser_training import Augmentation, Batch, Scores, TrainingPlan
from Dataset.label_maps import LabelMapDataset
from Model import checkpoint
from Model.face_parser import BiSeNet
from Util.cli import OneLineParser, check_writable, run_script
from Util.device import pick_device
from Util.settings import at_least, blame, fraction, integers, positive

EXAMPLE = """example:
  python3 train_parser.py --path Dataset/toon_faces_128px --val_path Dataset/toon_faces_128px_val \\
      --out Model/parser_model/toon_faces_128px.pt --size 128 --image_size 64 \\
      --width 8 --stem_stride 1 --iter 4500 --batch_size 16 --lr 0.025
"""


def class_pair(text: str) -> tuple[int, int]:
    """Argument type: two class indices as A,B."""
    pair = integers(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of classes such as 2,3")
    return pair[0], pair[1]


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(
        prog="train_parser.py",
        description="Train a BiSeNet parser on a folder with images/NAME.png (or .jpg) and\n"
        "labels/NAME.png, 8-bit maps of class indices. Prints the intersection over union of\n"
        "every class, their mean, and that of the content mask, on pictures held out.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", required=True, metavar="DIR", help="folder with images/ and labels/")
    add(
        "--val_path",
        metavar="DIR",
        help="held-out pictures, same layout (default: a part of --path)",
    )
    add(
        "--val_fraction",
        type=fraction(True, True),
        default=0.1,
        metavar="X",
        help="part of --path that is held "
        "out if there is no --val_path, in (0, 1) (default: %(default)s)",
    )
    add(
        "--out",
        default="Model/parser_model/parser.pt",
        metavar="FILE",
        help="checkpoint to write (default: %(default)s)",
    )
    add(
        "--eval_only",
        metavar="CKPT",
        help="train nothing, score this parser on --val_path, or else on all of --path",
    )
    add(
        "--size",
        type=at_least(1),
        default=128,
        metavar="PX",
        help="side of the parser's input in pixels (default: %(default)s)",
    )
    add(
        "--image_size",
        type=at_least(1),
        metavar="PX",
        help="side in pixels that pictures are "
        "reduced to before they are enlarged to --size: the size of the pictures to be parsed, if "
        "it is smaller than --size",
    )
    add(
        "--n_classes",
        type=at_least(1),
        default=19,
        metavar="N",
        help="number of classes (default: %(default)s, those of CelebAMask-HQ)",
    )
    add(
        "--classes_excluded",
        type=int,
        nargs="*",
        metavar="C",
        help="classes that are no content (default: 0 and, with 19 classes, 16)",
    )
    add(
        "--flip_pairs",
        type=class_pair,
        nargs="*",
        metavar="A,B",
        help="classes that change "
        "places in a mirror image (default: with 19 classes 2,3 4,5 7,8, else none)",
    )
    add(
        "--width",
        type=at_least(1),
        default=8,
        metavar="N",
        help="channels of the first stage; 64 is the published parser (default: %(default)s)",
    )
    add(
        "--stem_stride",
        type=int,
        choices=(1, 2, 4),
        default=1,
        help="logits are computed at 1 / (2 * N) of --size; 1 keeps the finest detail and costs "
        "the most, 4 is the published parser (default: %(default)s)",
    )
    add(
        "--iter",
        type=at_least(1),
        default=4000,
        metavar="N",
        help="training iterations (default: %(default)s)",
    )
    add(
        "--batch_size",
        type=at_least(2),
        default=16,
        metavar="N",
        help="pictures per iteration, at least 2 (default: %(default)s)",
    )
    add(
        "--lr",
        type=positive,
        default=0.01,
        metavar="X",
        help="highest learning rate of AdamW (default: %(default)s)",
    )
    add(
        "--eval_every",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="iterations between evaluations, each of which saves (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    add(
        "--device",
        default="auto",
        metavar="DEV",
        help="auto, cpu, cuda or cuda:N; auto takes the GPU if there is one (default: %(default)s)",
    )
    add(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes that read pictures; 0 reads in the main one (default: %(default)s)",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Completes the flags that depend on others and checks what a type cannot.

    Raises:
        ValueError: naming the flag.
    """
    args.device = pick_device(args.device)
    if args.eval_only is None:
        complete_classes(args, args.n_classes)
        if Path(args.out).is_dir():
            raise ValueError(f"--out {args.out} is a folder; name a file in it")
        check_writable("out", Path(args.out))


def complete_classes(args: argparse.Namespace, n_classes: int) -> None:
    """Fills in the flags whose defaults follow from the number of classes, and checks them.

    Raises:
        ValueError: naming the flag.
    """
    args.n_classes = n_classes
    faces = n_classes == len(parser_training.CELEBAMASK_NAMES)
    if args.flip_pairs is None:
        args.flip_pairs = parser_training.CELEBAMASK_FLIP_PAIRS if faces else ()
    if args.classes_excluded is None:
        args.classes_excluded = usual_exclusions(n_classes)
    for flag in ("flip_pairs", "classes_excluded"):
        for value in torch.tensor(getattr(args, flag)).flatten().tolist():
            if not 0 <= value < n_classes:
                raise ValueError(f"--{flag}: there is no class {value} in 0 to {n_classes - 1}")


def open_dataset(flag: str, path: str, size: int, n_classes: int) -> LabelMapDataset:
    """Opens a folder of pictures and label maps.

    Raises:
        ValueError: naming the flag.
    """
    with blame(flag):
        return LabelMapDataset(path, size, n_classes)


def open_both(args: argparse.Namespace) -> tuple[Dataset[Batch], Dataset[Batch]]:
    """The pictures to train on and those held out.

    Raises:
        ValueError: naming the flag.
    """
    everything = open_dataset("path", args.path, args.size, args.n_classes)
    if args.val_path is not None:
        return everything, open_dataset("val_path", args.val_path, args.size, args.n_classes)
    order = torch.randperm(
        len(everything), generator=torch.Generator().manual_seed(args.seed)
    ).tolist()
    held_out = max(1, round(args.val_fraction * len(everything)))
    return Subset(everything, order[held_out:]), Subset(everything, order[:held_out])


def report(scores: Scores) -> str:
    """A table of the scores."""
    faces = len(scores.class_iou) == len(parser_training.CELEBAMASK_NAMES)
    lines = ["class              IoU"]
    for index, (iou, occurs) in enumerate(
        zip(scores.class_iou.tolist(), scores.occurs.tolist(), strict=True)
    ):
        name = parser_training.CELEBAMASK_NAMES[index] if faces else ""
        lines.append(f"{index:>3} {name:<12} " + (f"{iou:.4f}" if occurs else "   (none)"))
    lines.append(f"mean IoU of the {int(scores.occurs.sum())} classes: {scores.mean_iou:.4f}")
    lines.append(f"content-mask IoU: {scores.content_iou:.4f}")
    return "\n".join(lines)


def run_evaluation(args: argparse.Namespace) -> None:
    """Scores a parser from a file."""
    with blame("eval_only"):
        network = checkpoint.load_face_parser(args.eval_only, args.device)
    complete_classes(args, network.n_classes)
    flag, path = ("val_path", args.val_path) if args.val_path else ("path", args.path)
    dataset = open_dataset(flag, path, network.input_size, network.n_classes)
    batches = DataLoader(dataset, args.batch_size, num_workers=args.workers)
    parser = ContentParser(network, args.classes_excluded)
    print(report(parser_training.evaluate(parser, tqdm(batches, "evaluating"), args.image_size)))


def run_training(args: argparse.Namespace) -> None:
    """Trains a parser and saves it, at every evaluation and at the end."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train_set, val_set = open_both(args)
    if len(train_set) < args.batch_size:  # type: ignore[arg-type]
        raise ValueError(f"--batch_size {args.batch_size}: more than the pictures to train on")
    loader = DataLoader(
        train_set, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )
    held_out = DataLoader(val_set, args.batch_size, num_workers=args.workers)
    network = BiSeNet(args.n_classes, args.width, args.stem_stride, args.size).to(args.device)
    parser = ContentParser(network, args.classes_excluded)
    augmentation = Augmentation(flip_pairs=args.flip_pairs, image_size=args.image_size)
    plan = TrainingPlan(args.iter, args.lr, augmentation=augmentation)

    with tqdm(total=args.iter, desc="training", mininterval=1) as bar:

        def after_step(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if step % args.eval_every and step != args.iter:
                return
            scores = parser_training.evaluate(parser, held_out, args.image_size)
            checkpoint.save(args.out, {"parser": network, "config": network.config})
            bar.write(
                f"iteration {step}: loss {loss:.4f}, mean IoU {scores.mean_iou:.4f}, "
                f"content-mask IoU {scores.content_iou:.4f}"
            )
            if step == args.iter:
                bar.write(report(scores))

        parser_training.train(network, parser_training.endless(loader), plan, generator, after_step)
    print(f"wrote {args.out}")


def run(args: argparse.Namespace) -> None:
    """Trains or scores a parser.

    Raises:
        ValueError: naming the flag or file.
    """
    check(args)
    run_training(args) if args.eval_only is None else run_evaluation(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    return run_script(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
