"""Extractors: what turns images into the features that sets of images are compared by."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from Evaluation.inception import DIMENSIONS, URL, load_inception
from Model import bundled
from Model.checkpoint import CheckpointError, load_attribute_classifier, load_face_parser
from Model.downloads import download_path
from Model.face_parser import BiSeNet, fold_batch_norm
from Util.device import tf32_allowed
from Util.settings import blame

Mask = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W), nominally in [-1, 1] -> content masks (N, 1, H, W) in {0, 1}."""


class ContentMask(Protocol):
    """A `Mask` of which is known how it is made.

    Attributes:
        protocol: kind, weights and content in words; masks are comparable where this agrees.
        chosen: the classes that are content, by name; empty where they are the parser's own.
    """

    protocol: str
    chosen: str

    def __call__(self, images: Tensor) -> Tensor:
        """See `Mask`."""
        ...


LoadMask = Callable[[Path, torch.device, Sequence[str]], ContentMask]
"""Makes the content mask of a parser, by its file or name, and of the classes that are content;
without classes, they are the parser's own."""

FEATURES = ("inception", "parser", "attributes")


def masks_of(mask: Mask, images: Tensor) -> Tensor:
    """The content masks of images, which must be one value for each pixel.

    Raises:
        ValueError: they are not.
    """
    found, expected = mask(images), (len(images), 1, *images.shape[2:])
    if not isinstance(found, Tensor) or found.shape != expected:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"the content mask makes {shape} of images {tuple(images.shape)}, not {expected}"
        )
    return found


@dataclass(frozen=True)
class Extractor:
    """Features of images, with what must be said of them.

    Attributes:
        network: images (N, 3, H, W), nominally in [-1, 1] -> features (N, D).
        name: what a distance of these features is called, such as "parser"; empty for those of
            Inception, which need no name.
        protocol: weights and preparation of the images, in words; features are comparable where
            this agrees.
        mask: what the images are multiplied by; None leaves them whole.
    """

    network: Callable[[Tensor], Tensor]
    name: str
    protocol: str
    mask: Mask | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute features (N, D) in float32."""
        if self.mask is not None:
            images = images * masks_of(self.mask, images)
        return self.network(images).float()

    def distance_name(self, abbreviation: str, kind: str) -> str:
        """Name a distance of these features.

        Args:
            abbreviation: its name with the features of Inception, such as "FID".
            kind: of the distance with those of another network, such as "Frechet".
        """
        name = f"{kind} {self.name} distance" if self.name else abbreviation
        return f"content-aware {name}" if self.mask else name

    def dimensions(self, size: int, device: torch.device) -> int:
        """Compute D for images of a side."""
        return self(torch.zeros(1, 3, size, size, device=device)).shape[1]


def fingerprint(file: Path) -> str:
    """Return the first eight hexadecimal digits of a file's SHA-256."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:8]


def _inception_extractor(file: Path | None, device: torch.device) -> Extractor:
    """Extract the FID Inception network's pooled features; None takes downloaded weights."""
    network = load_inception(file, device)
    protocol = (
        f"Inception {fingerprint(file or download_path(URL))}, {DIMENSIONS} pooled features; float"
        " images in [-1, 1] without an 8-bit step, bilinear to 299 px without aligned corners"
    )
    return Extractor(network, "", protocol)


def trunk_parser(file: str | Path, device: torch.device) -> BiSeNet:
    """Load a face parser whose trunk's features are compared.

    Raises:
        CheckpointError: not a file of a BiSeNet; other parsers make masks alone.
    """
    if not Path(file).is_file() and (str(file) == "none" or ":" in str(file)):
        raise CheckpointError(
            f"{file}: only the file of a BiSeNet parser has features to compare; take Inception"
            " (features) or LPIPS (perceptual)"
        )
    if Path(file).with_suffix(".json").is_file():
        raise CheckpointError(
            f"{file}: is a module, and only a BiSeNet parser has features to compare; take"
            " Inception (features) or LPIPS (perceptual)"
        )
    return fold_batch_norm(load_face_parser(file, device))


def parser_extractor(file: Path, device: torch.device) -> Extractor:
    """Extract the features of a face parser's trunk, each stage averaged over the picture."""
    parser = trunk_parser(file, device)

    def network(images: Tensor) -> Tensor:
        maps = parser.trunk_features(parser.prepare(images))
        return torch.cat([stage.mean(dim=(2, 3)) for stage in maps], dim=1)

    protocol = f"face parser {fingerprint(file)}, average-pooled features of all trunk stages"
    return Extractor(network, "parser", protocol)


def attribute_extractor(file: Path, device: torch.device) -> Extractor:
    """Extract the penultimate features of a classifier of attributes."""
    network = load_attribute_classifier(file, device)
    protocol = f"attribute classifier {fingerprint(file)}, penultimate features; images at 64 px"
    return Extractor(network.features, "attribute", protocol)


def make_extractor(
    features: str,
    inception_ckpt: Path | None,
    parser_ckpt: Path | None,
    load_mask: LoadMask | None,
    device: torch.device,
    content: Sequence[str] = (),
) -> Extractor:
    """Load the features that images are compared by.

    Args:
        features: one of `FEATURES`; attributes are those of the bundled classifier.
        inception_ckpt: Inception's weights, None for the downloaded ones.
        parser_ckpt: the face parser, for features of its trunk and for masks.
        load_mask: makes the mask that multiplies the images; None leaves them whole.
        device: where they run.
        content: see `LoadMask`.

    Raises:
        SettingError: the weights are missing or do not fit; names inception_ckpt or parser_ckpt.
    """
    if features == "inception":
        with blame("inception_ckpt"):
            extractor = _inception_extractor(inception_ckpt, device)
    elif features == "attributes":
        extractor = attribute_extractor(bundled.ATTRIBUTES, device)
    if features == "parser" or load_mask is not None:
        with blame("parser_ckpt"):
            if parser_ckpt is None:
                raise ValueError("is missing; name a face parser")
            if features == "parser":
                extractor = parser_extractor(parser_ckpt, device)
            if load_mask is not None:
                mask = load_mask(parser_ckpt, device, content)
                protocol = f"{extractor.protocol}; images times {mask.protocol}"
                extractor = replace(extractor, protocol=protocol, mask=mask)
    if tf32_allowed(device):
        # Its features are not those of float32, nor are the statistics that are kept of them.
        extractor = replace(extractor, protocol=f"{extractor.protocol}; in TensorFloat-32")
    return extractor
