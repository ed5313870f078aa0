"""What a parser is: pictures in, classes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Parser(Protocol):
    """Assigns a class to every pixel; frozen, on its device, and deterministic.

    Attributes:
        class_names: one for each class.
        classes_excluded: indices of the classes that are not content, unless the user chooses.
        input_size: side in pixels of the pictures that it sees; decides how many fit at a time.
    """

    class_names: tuple[str, ...]
    classes_excluded: tuple[int, ...]
    input_size: int

    def classify(self, images: Tensor) -> Tensor:
        """Classify pixels.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1], of any size.

        Returns:
            Logits or log-probabilities (N, n_classes, h, w), floating; or class maps (N, h, w),
            int64, of a parser that knows no more. Any h and w.
        """
        ...


@runtime_checkable
class ClassMapParser(Parser, Protocol):
    """A parser that finds classes cheaper than by all logits."""

    def class_map(self, images: Tensor) -> Tensor:
        """Find the likeliest class of every pixel.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1], of any size.

        Returns:
            (N, h, w), int64.
        """
        ...


@dataclass(frozen=True)
class Loaded:
    """A parser, and what it is called.

    Attributes:
        parser: ready to use.
        name: what a checkpoint remembers.
        identity: kind and weights in words; masks are comparable where this agrees.
    """

    parser: Parser
    name: str
    identity: str


@dataclass(frozen=True)
class ParserKind:
    """A kind of parser.

    Attributes:
        load: makes the parser of what follows ``KIND:``; raises ValueError, naming the file.
        description: one line for the help texts.
    """

    load: Callable[[str, torch.device], Loaded]
    description: str


@torch.no_grad()
def check_output(parser: Parser, name: str, device: torch.device) -> None:
    """Parse one black picture, to find out before any work that a parser does not do what it says.

    Raises:
        ValueError: it fails, or its output has another shape or number of classes than it names.
    """
    side, count = parser.input_size, len(parser.class_names)
    try:
        found = parser.classify(torch.zeros(1, 3, side, side, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{name}: cannot parse a picture of {side} px ({reason})") from None
    if found.is_floating_point() and found.ndim == 4 and len(found) == 1:
        if found.shape[1] != count:
            raise ValueError(
                f"{name}: puts out {found.shape[1]} classes, but {count} are named; name every one"
            )
    elif found.is_floating_point() or found.ndim != 3 or len(found) != 1:
        raise ValueError(
            f"{name}: made {tuple(found.shape)} {found.dtype} of 1 picture; expected logits"
            f" (1, {count}, h, w), or a class map (1, h, w) of integers"
        )
