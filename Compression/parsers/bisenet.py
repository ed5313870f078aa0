"""The face parser of the paper, and those that train_parser.py makes."""

from pathlib import Path

import torch

from Compression.parsers.base import Loaded
from Evaluation.features import fingerprint
from Model.checkpoint import load_face_parser
from Model.face_parser import fold_batch_norm


def load(argument: str, device: torch.device) -> Loaded:
    """Load a BiSeNet's file, with the classes it was trained for."""
    parser = fold_batch_norm(load_face_parser(argument, device))
    return Loaded(parser, Path(argument).name, f"face parser {fingerprint(Path(argument))}")
