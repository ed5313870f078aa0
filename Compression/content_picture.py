"""Show what a parser finds in a model's pictures, and which part of it is the content."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from Compression.content import ContentParser, parser_for, share_warning
from Compression.parsers import PARSERS
from Dataset.images import Images
from Evaluation import sampling
from Model import bundled
from Model.checkpoint import load_generator
from Util import memory
from Util.cli import check_writable, listed, run_settings
from Util.device import DeviceSettings
from Util.pictures import captioned, grid, rescale, save_png
from Util.progress import warn
from Util.settings import blame, setting, some_words

SIDE = 128
"""Side in px of a picture that is shown, about."""
EPILOG = """parsers (--parser KIND:..., or a file):
{parsers}

examples:
  python3 -m Compression.content
      the bundled model and its parser
  python3 -m Compression.content --ckpt FILE --content skin,hair,eyes
  python3 -m Compression.content --ckpt CATS.pt \\
      --parser torchvision:deeplabv3_resnet50 --content cat
  python3 -m Compression.content --ckpt FILE --content=-hair
      a list that begins with a minus starts from the parser's own content
"""


@dataclass(frozen=True, kw_only=True)
class ShowSettings(DeviceSettings):
    """Settings of the picture; one flag each."""

    ckpt: Path = setting(
        bundled.MODEL,
        "generator whose pictures are parsed (default: bundled)",
        metavar="FILE",
        exists="file",
    )
    path: Path | None = setting(
        None,
        "pictures to parse in place of the model's, of its size",
        metavar="DIR",
        exists="folder",
    )
    parser_ckpt: Path | None = setting(
        None,
        "parser: a file, or a name as below (default: the bundled one for the bundled"
        " models, else Model/parser_model/79999_iter.pth)",
        metavar="FILE",
        aliases=("parser",),
    )
    content: tuple[str, ...] = setting(
        (),
        "classes that are content: names or indices, groups such as eyes, all, and with a minus"
        " those to leave out (default: the parser's own)",
        metavar="CLASS,...",
        parse=some_words,
    )
    n_sample: int = setting(64, "pictures for the shares", low=1)
    shown: int = setting(8, "pictures that are shown", low=1)
    seed: int = setting(0, "seed of the pictures", low=0)
    out: Path = setting(Path("content.png"), "picture to write", metavar="FILE")


@dataclass(frozen=True)
class Shown:
    """What there is to show.

    Attributes:
        images: (N, 3, H, W) in [-1, 1], the first ones.
        maps: their class maps (N, H, W).
        masks: their content masks (N, 1, H, W).
        shares: of the pixels of all pictures, one for each class.
        inside: share of the pixels inside the mask.
    """

    images: Tensor
    maps: Tensor
    masks: Tensor
    shares: Tensor
    inside: float


def colours(n: int) -> np.ndarray:
    """A colour for each class, (n, 3) bytes: dark grey first, then hues a golden angle apart."""
    hues = (np.arange(n)[:, None] * 0.381966 + np.array([0.0, 2 / 3, 1 / 3])) * 2 * np.pi
    levels = np.array([0.95, 0.65, 0.8])[np.arange(n) % 3][:, None]
    found = (levels * (0.56 + 0.44 * np.cos(hues)) * 255).astype(np.uint8)
    found[0] = 60
    return found


def paint(maps: Tensor, palette: np.ndarray) -> Tensor:
    """Class maps (N, H, W) as images (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(palette)[maps].permute(0, 3, 1, 2) / 127.5 - 1


def observe(settings: ShowSettings, parser: ContentParser, device: torch.device) -> Shown:
    """Parse the pictures, a few at a time."""
    with blame("ckpt"):
        generator = load_generator(settings.ckpt, device=device).eval().requires_grad_(False)
    n, first, counts, inside = settings.n_sample, [], torch.zeros(1), 0.0
    images = None
    if settings.path:
        with blame("path"):
            images = Images(settings.path, generator.size)
            n = min(n, len(images))
    for part in sampling.shares(n, memory.at_once(generator.size, memory.INFERENCE, 8)):
        if images is None:
            made = sampling.images(generator, part, settings.seed)
        else:
            made = torch.stack([images[i, False] for i in part]).to(device)
        maps = parser.parse(made)
        masks = parser.mask_of(maps, made)
        pixels = torch.bincount(maps.flatten().cpu(), minlength=len(parser.network.class_names))
        counts = counts + pixels / (maps[0].numel() * n)
        inside += float(masks.mean()) * len(part) / n
        if part.start < settings.shown:
            first.append((made.cpu(), maps.cpu(), masks.cpu()))
    shown = [torch.cat(parts)[: settings.shown] for parts in zip(*first, strict=True)]
    return Shown(shown[0], shown[1], shown[2], counts, inside)


def table(shown: Shown, parser: ContentParser) -> str:
    """Share of the pixels of each class, and of the mask."""
    names = parser.network.class_names
    width = max(8, *map(len, names))
    lines = [f"{'':>3} {'class':<{width}}  pixels  content"]
    for i, (name, share) in enumerate(zip(names, shown.shares.tolist(), strict=True)):
        mark = "yes" if parser.is_content[i] else ""
        lines.append(f"{i:>3} {name:<{width}} {share:>7.2%}  {mark}".rstrip())
    lines.append(f"    {'the mask':<{width}} {shown.inside:>7.2%}  {parser.content}")
    return "\n".join(lines)


def picture(shown: Shown, parser: ContentParser) -> np.ndarray:
    """Rows of pictures, class maps and content, with a legend, (H, W, 3) bytes."""
    size = shown.images.shape[-1]
    scale = SIDE // size if size <= SIDE else 1 / (size // SIDE)
    images = rescale(shown.images, scale)
    side = images.shape[-1]
    palette = colours(len(parser.network.class_names))
    maps = F.interpolate(shown.maps[:, None].float(), (side, side)).long()
    coloured = paint(maps[:, 0], palette)
    masks = rescale(shown.masks, scale)
    # Outside of the content the picture fades into a chequered ground, as in picture editors.
    squares = torch.arange(side) // 8
    ground = ((squares[:, None] + squares) % 2).float() * 0.25 + 0.6
    kept = images * masks + ground * (1 - masks)
    rows = {"picture": images, "classes": coloured, "content": kept, "mask": masks * 2 - 1}
    columns, gap = len(images), 4
    strips = {name: grid(x.expand(-1, 3, -1, -1), columns, gap) for name, x in rows.items()}
    body = captioned(strips, gap=gap)
    return np.concatenate([body, _legend(shown, parser, palette, body.shape[1])])


def _legend(shown: Shown, parser: ContentParser, palette: np.ndarray, width: int) -> np.ndarray:
    """Colour, name and share of each class that occurs; the content is framed in black."""
    font, row, pad = ImageFont.load_default(15), 24, 8
    names = parser.network.class_names
    order = [i for i in shown.shares.argsort(descending=True).tolist() if shown.shares[i] > 0]
    entries = [(i, f"{names[i]} {shown.shares[i]:.1%}") for i in order]
    cell = max(int(font.getlength(text)) for _, text in entries) + row + 3 * pad
    columns = max(1, (width - 2 * pad) // cell)
    height = (-(-len(entries) // columns) + 1) * row + 3 * pad
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    head = f"content ({shown.inside:.1%} of the pixels): {parser.content}"
    while font.getlength(head) > width - 2 * pad and len(head) > 8:
        head = head[:-4] + "..."
    draw.text((pad, pad + row // 2), head, fill="black", font=font, anchor="lm")
    for k, (i, text) in enumerate(entries):
        x, y = pad + k % columns * cell, 2 * pad + (k // columns + 1) * row
        box = (x, y + 3, x + row - 6, y + row - 3)
        inside = bool(parser.is_content[i])
        draw.rectangle(box, fill=tuple(palette[i].tolist()), outline="black" if inside else None)
        ink = "black" if inside else "#999999"
        draw.text((x + row, y + row // 2), text, fill=ink, font=font, anchor="lm")
    return np.asarray(canvas)


def run(settings: ShowSettings) -> None:
    """Parse, print the shares, and draw."""
    device = settings.pick_device()
    check_writable("out", settings.out)
    parser = parser_for(settings.parser_ckpt, settings.ckpt, device, settings.content)
    shown = observe(settings, parser, device)
    save_png(settings.out, picture(shown, parser))
    print(table(shown, parser))
    if warning := share_warning(shown.inside, parser):
        warn(f"warning: {warning}")
    print(f"saved {settings.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_settings(
        ShowSettings,
        run,
        argv,
        prog="python -m Compression.content",
        description=__doc__,
        epilog=EPILOG.format(parsers=listed(PARSERS)),
    )
