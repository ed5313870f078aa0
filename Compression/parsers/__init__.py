"""Parsers: what finds the classes of pixels, by name.

A parser is named by KIND:ARGUMENT, KIND alone where it takes none, or a file: a module if a JSON
file of the same stem lies beside it, else a BiSeNet. A new kind is one file and one line here.
"""

from os import PathLike, fspath
from pathlib import Path

import torch

from Compression.parsers import bisenet, everything, script_module, torchvision_networks
from Compression.parsers.base import ClassMapParser, Loaded, Parser, ParserKind, check_output

__all__ = [
    "PARSERS",
    "ClassMapParser",
    "Loaded",
    "Parser",
    "ParserKind",
    "check_output",
    "load_parser",
]

PARSERS = {
    "bisenet": ParserKind(bisenet.load, "a face parser, or one of train_parser.py"),
    "torchvision": ParserKind(
        torchvision_networks.load, "NAME or NAME=WEIGHTS: a segmentation network of 21 classes"
    ),
    "module": ParserKind(script_module.load, "a TorchScript file with a JSON file beside it"),
    "none": ParserKind(everything.load, "every pixel is content"),
}


def load_parser(name: str | PathLike[str], device: torch.device) -> Loaded:
    """Load the parser of a name.

    Raises:
        ValueError: the name, a file or the network's output does not fit.
    """
    text = fspath(name)
    kind, _, argument = text.partition(":")
    if kind not in PARSERS:
        is_module = Path(text).with_suffix(".json").is_file() and not text.endswith(".json")
        kind, argument = "module" if is_module else "bisenet", text
    return PARSERS[kind].load(argument, device)
