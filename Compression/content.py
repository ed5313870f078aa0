"""The content of interest: which pixels of a picture belong to it, by a parser's classes.

``python -m Compression.content`` shows it (`Compression.content_picture`).
"""

import difflib
import itertools
import sys
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Compression.parsers import ClassMapParser, Parser, load_parser
from Model import bundled
from Model.layers import fast_layout
from Model.ops import argmax_of_maps
from Util import memory
from Util.settings import blame

GROUPS = {
    "brows": ("l_brow", "r_brow"),
    "ears": ("l_ear", "r_ear"),
    "eyes": ("l_eye", "r_eye"),
    "lips": ("u_lip", "l_lip"),
}
"""Names for several classes, where a parser has them."""


def excluded_classes(content: Sequence[str], parser: Parser) -> tuple[int, ...]:
    """The classes that are not content by a user's choice.

    Args:
        content: in turn, each adds classes, or removes them after a minus: a class's name or
            index, a group of `GROUPS`, or ``all``. If the first removes, it does so from the
            parser's own content. Empty: the parser's own content.
        parser: has the names.

    Raises:
        ValueError: an unknown class, or nothing is left.
    """
    names, everything = parser.class_names, set(range(len(parser.class_names)))
    own = everything - set(parser.classes_excluded)
    chosen = own if not content or content[0].startswith("-") else set()
    for item in content:
        found = _classes_of(item.removeprefix("-").strip(), names)
        chosen = chosen - found if item.startswith("-") else chosen | found
    if not chosen and content:
        raise ValueError(f"{','.join(content)}: leaves no class; name at least one")
    return tuple(sorted(everything - chosen))


def _classes_of(item: str, names: Sequence[str]) -> set[int]:
    """The classes that a name means.

    Raises:
        ValueError: none; says which are close.
    """
    if item == "all":
        return set(range(len(names)))
    found = {i for i, name in enumerate(names) if name == item}
    found = found or {i for i, name in enumerate(names) if name in GROUPS.get(item, ())}
    if found or (item.isdecimal() and int(item) < len(names)):
        return found or {int(item)}
    groups = [group for group, members in GROUPS.items() if set(members) & set(names)]
    close = difflib.get_close_matches(item, [*names, *groups], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
    raise ValueError(f"{item}: the parser has no such class; {hint}")


def describe(excluded: Iterable[int], names: Sequence[str]) -> str:
    """The shortest list of classes that means the content; `excluded_classes` understands it."""
    texts = [name if name.isidentifier() else str(i) for i, name in enumerate(names)]
    out = [texts[i] for i in sorted(excluded)]
    inside = [text for text in texts if text not in out]
    return ",".join(["all", *(f"-{text}" for text in out)] if len(out) < len(inside) else inside)


class ContentParser(nn.Module):
    """Turns images into content masks: 1 where the class is none of the excluded ones.

    "Content-Aware GAN Compression" (Liu et al., CVPR 2021), section 3.1: everything but background
    and clothes. Works at any batch size, without gradients, and leaves the network in eval mode.

    Args:
        network: the parser.
        classes_excluded: classes that are not content. None takes those of the network, which are
            CelebAMask-HQ's background and cloth, (0, 16), unless it was trained for others.
        chunk: images parsed at a time. It bounds the memory and does not change the result. None
            takes as many as `Util.memory` allows.
        name: what a checkpoint remembers of the parser.
        identity: kind and weights of the parser in words.

    Attributes:
        content: the classes that are content; `describe`.
        chosen: the same, or empty where it is the network's own.
        protocol: how the masks are made, in words; they are comparable where this agrees.

    Raises:
        ValueError: if a class to exclude is not one of the network's, or `chunk` is not positive.
    """

    is_content: Tensor

    def __init__(
        self,
        network: Parser,
        classes_excluded: Iterable[int] | None = None,
        chunk: int | None = None,
        name: str = "",
        identity: str = "a parser",
    ) -> None:
        super().__init__()
        own, count = tuple(network.classes_excluded), len(network.class_names)
        excluded = own if classes_excluded is None else tuple(classes_excluded)
        unknown = [c for c in excluded if not 0 <= c < count]
        if unknown:
            raise ValueError(
                f"classes_excluded has {unknown}, but the parser's {count} classes are "
                f"0 to {count - 1}; name the classes outside the content of interest"
            )
        device = _device_of(network)
        if chunk is None:
            pixels = memory.PARSING.get(device.type, memory.PARSING["cpu"])
            chunk = memory.at_once(network.input_size, pixels)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; at least one image is parsed at a time")
        is_content = torch.ones(count)
        is_content[list(excluded)] = 0
        self.network, self.chunk, self.name = network, chunk, name
        self.content = describe(excluded, network.class_names)
        self.chosen = "" if set(excluded) == set(own) else self.content
        inside = f", content {self.chosen}" if self.chosen else ""
        self.protocol = f"the content mask of {identity}{inside}"
        self.register_buffer("is_content", is_content.to(device), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "ContentParser":
        """Stays in eval mode: the masks must not depend on what else is in the batch."""
        return super().train(False)

    def _chunks(self, images: Tensor) -> Iterable[Tensor]:
        """The images, few at a time, as the network takes them fastest."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (N, 3, H, W), got {tuple(images.shape)}")
        return (fast_layout(part.float()) for part in images.split(self.chunk))

    def _class_maps(self, images: Tensor) -> Iterable[Tensor]:
        """Classes (n, h, w) of the images, few at a time."""
        network = self.network
        find = network.class_map if isinstance(network, ClassMapParser) else network.classify
        for part in self._chunks(images):
            found = find(part)
            yield found if found.ndim == 3 else argmax_of_maps(found)

    @torch.no_grad()
    def parse(self, images: Tensor) -> Tensor:
        """Class maps.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, h, w), int64 class indices, of the size that the parser works at.
        """
        return torch.cat(list(self._class_maps(images)))

    def mask_of(self, class_maps: Tensor, images: Tensor) -> Tensor:
        """Content masks of class maps that `parse` made of the images; see `forward`."""
        return (_resized(self._inside(class_maps), images) > 0.5).to(images.dtype)

    def _inside(self, class_map: Tensor) -> Tensor:
        return self.is_content.to(class_map.device)[class_map].unsqueeze(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Content masks.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, 1, H, W) in the images' type: 1 inside the content of interest, 0 outside.

        Raises:
            ValueError: if `images` is not of that shape.
        """
        return torch.cat([self.mask_of(found, images) for found in self._class_maps(images)])

    @torch.no_grad()
    def soft(self, images: Tensor) -> Tensor:
        """Probability of the content, sum_c p_c over its classes, in place of 0 and 1.

        Of a parser that knows no probabilities, it is the mask before it is rounded.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, 1, H, W) in [0, 1], in the images' type.
        """
        masks = []
        for part in self._chunks(images):
            found = self.network.classify(part)
            if found.ndim == 4:
                weights = self.is_content.to(found.device)
                # No matrix product: autocast would make probabilities too coarse.
                probabilities = found.float().permute(0, 2, 3, 1).softmax(dim=3)
                mask = (probabilities * weights).sum(dim=3).unsqueeze(1).clamp(0, 1)
            else:
                mask = self._inside(found)
            masks.append(_resized(mask, images))
        return torch.cat(masks).to(images.dtype)


class Metered:
    """A content mask that remembers which share of the pixels was inside.

    Attributes:
        parser: makes the masks.
        share: of all pixels so far, NaN before the first.
    """

    def __init__(self, parser: ContentParser) -> None:
        self.parser = parser
        self._inside, self._pixels = 0.0, 0

    def __call__(self, images: Tensor) -> Tensor:
        """See `ContentParser.forward`."""
        mask = self.parser(images)
        self._inside += float(mask.sum())
        self._pixels += mask.numel()
        return mask

    @property
    def share(self) -> float:
        """Content pixels over all pixels."""
        return self._inside / self._pixels if self._pixels else float("nan")


def share_warning(share: float, parser: ContentParser) -> str:
    """One line if the masks hold next to nothing or next to everything, else empty."""
    if 0.05 <= share <= 0.95 or share != share or parser.is_content.all():
        return ""
    return (
        f"the masks of {parser.content} hold {share:.1%} of the pixels; look at them with"
        " python3 -m Compression.content before you train"
    )


def load_content_parser(
    path: str | PathLike[str], device: torch.device, content: Sequence[str] = ()
) -> ContentParser:
    """Make the content parser of a name (`Compression.parsers`).

    Args:
        path: a parser's file, or its name.
        device: where it runs.
        content: see `excluded_classes`.

    Raises:
        ValueError: the parser cannot be loaded.
        SettingError: names the setting content.
    """
    loaded = load_parser(path, device)
    with blame("content"):
        excluded = excluded_classes(content, loaded.parser)
    return ContentParser(loaded.parser, excluded, name=loaded.name, identity=loaded.identity)


def parser_for(
    parser_ckpt: str | Path | None,
    model: str | Path,
    device: torch.device,
    content: Sequence[str] = (),
) -> ContentParser:
    """The content parser of a name, or where none is given the one that fits the model.

    Raises:
        SettingError: names the setting, parser_ckpt or content, and what is wrong.
    """
    with blame("parser_ckpt"):
        return load_content_parser(parser_ckpt or bundled.default_parser(model), device, content)


def _device_of(network: Parser) -> torch.device:
    """Where the network's tensors are."""
    if isinstance(network, nn.Module):
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            return tensor.device
    return torch.device("cpu")


def _resized(mask: Tensor, images: Tensor) -> Tensor:
    """A mask at the images' size."""
    size = images.shape[2:]
    if mask.shape[2:] == size:
        return mask
    return F.interpolate(mask, size, mode="bilinear", align_corners=False)


if __name__ == "__main__":
    from Compression.content_picture import main

    sys.exit(main())
