"""Paths of the files that this repository ships or that a user downloads."""

from os import PathLike
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "full_size_model/toon_faces_64px.pt"
COMPRESSED = FOLDER / "pruned_model/toon_faces_64px_compressed.pt"
PARSER = FOLDER / "parser_model/toon_faces_128px.pt"
PUBLISHED_PARSER = FOLDER / "parser_model/79999_iter.pth"
ATTRIBUTES = FOLDER / "attribute_model/toon_faces_64px.pt"
STATISTICS = FOLDER.parent / "Evaluation/real_statistics/toon_faces_64px.npz"
CONTENT_STATISTICS = STATISTICS.with_stem(f"{STATISTICS.stem}_content")
ATTRIBUTE_STATISTICS = STATISTICS.with_stem(f"{STATISTICS.stem}_attributes")
PRUNED_FOLDER = FOLDER / "pruned_model"
LICENCE = (
    "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), made from a remix of ToonHead by"
    " Johan Melin (https://www.johanmelin.com)"
)


def is_bundled(model: str | PathLike[str]) -> bool:
    """Return whether a checkpoint is one that this repository ships."""
    return Path(model).resolve() in (MODEL, COMPRESSED)


def statistics(features: str, content_aware: bool) -> Path | None:
    """Statistics of the real pictures for bundled models; None where there are none bundled.

    Args:
        features: whose, see `Evaluation.features.FEATURES`.
        content_aware: of the pictures times their content masks.
    """
    if features == "attributes":
        return None if content_aware else ATTRIBUTE_STATISTICS
    if features != "parser":
        return None
    return CONTENT_STATISTICS if content_aware else STATISTICS


def default_parser(model: str | PathLike[str]) -> Path:
    """Return the parser that fits a model: the bundled one for bundled models, else the published.

    Raises:
        ValueError: the published parser is missing; says where to get it.
    """
    if is_bundled(model):
        return PARSER
    if not PUBLISHED_PARSER.is_file():
        raise ValueError(
            f"{PUBLISHED_PARSER} is missing; put the face parser 79999_iter.pth of"
            " github.com/zllrunning/face-parsing.PyTorch there, or name another one"
        )
    return PUBLISHED_PARSER


def licence(model: str | PathLike[str]) -> str:
    """Licence of a bundled model, "" for any other."""
    return LICENCE if is_bundled(model) else ""
