"""Feature extractors: what turns images into the vectors that sets of images are compared by."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from Evaluation.inception import DIMENSIONS, URL, load_inception
from Model.downloads import download_path
from Model.face_parser import BiSeNet

Images = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extractor:
    """Features of images, with what must be said of them.

    Attributes:
        network: images (N, 3, H, W), nominally in [-1, 1] -> features (N, D).
        name: what a Frechet distance of these features is called.
        protocol: weights and preparation of the images, in words; features are comparable where
            this agrees.
        mask: images -> content masks (N, 1, H, W) in {0, 1} that they are multiplied by.
    """

    network: Images
    name: str
    protocol: str
    mask: Images | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) in float32."""
        if self.mask is not None:
            images = images * self.mask(images)
        return self.network(images).float()

    def dimensions(self, size: int, device: torch.device) -> int:
        """D for images of a side; computes those of one."""
        return self(torch.zeros(1, 3, size, size, device=device)).shape[1]


def fingerprint(file: Path) -> str:
    """First eight hexadecimal digits of a file's SHA-256."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:8]


def inception_extractor(file: Path | None, device: torch.device) -> Extractor:
    """The FID Inception network's 2048 pooled features.

    Args:
        file: its weights, None for the downloaded ones.
        device: where it runs.

    Raises:
        CheckpointError: see `load_inception`.
    """
    network = load_inception(file, device)
    protocol = (
        f"Inception {fingerprint(file or download_path(URL))}, {DIMENSIONS} pooled features; float"
        " images in [-1, 1] without an 8-bit step, bilinear to 299 px without aligned corners"
    )
    return Extractor(network, "FID", protocol)


def parser_extractor(parser: BiSeNet, file: Path) -> Extractor:
    """The features of a face parser's trunk, each stage averaged over the picture.

    Args:
        parser: frozen.
        file: the parser's checkpoint, named in the protocol.
    """

    def network(images: Tensor) -> Tensor:
        maps = parser.trunk_features(parser.prepare(images))
        return torch.cat([stage.mean(dim=(2, 3)) for stage in maps], dim=1)

    protocol = f"face parser {fingerprint(file)}, average-pooled features of all trunk stages"
    return Extractor(network, "Frechet parser distance", protocol)


def content_aware(extractor: Extractor, mask: Images, file: Path) -> Extractor:
    """The same features of images that are multiplied by their own content mask.

    Args:
        extractor: of whole images.
        mask: images -> content masks (N, 1, H, W) in {0, 1}.
        file: the checkpoint of the parser that makes them, named in the protocol.
    """
    protocol = f"{extractor.protocol}; images times the content mask of face parser"
    return replace(
        extractor,
        name=f"content-aware {extractor.name}",
        protocol=f"{protocol} {fingerprint(file)}",
        mask=mask,
    )


def make_extractor(
    features: str,
    inception_ckpt: Path | None,
    parser: BiSeNet | None,
    parser_file: Path | None,
    mask: Images | None,
    device: torch.device,
) -> Extractor:
    """The features that images are compared by.

    Args:
        features: inception or parser.
        inception_ckpt: Inception's weights, None for the downloaded ones.
        parser: the face parser, for features of its trunk.
        parser_file: where it and the masks are from.
        mask: multiplies the images by their content mask; None leaves them whole.
        device: where they run.

    Raises:
        ValueError: the weights are missing or unfit.
    """
    if features == "parser":
        assert parser is not None
        assert parser_file is not None
        extractor = parser_extractor(parser, parser_file)
    else:
        extractor = inception_extractor(inception_ckpt, device)
    if mask is not None:
        assert parser_file is not None
        extractor = content_aware(extractor, mask, parser_file)
    return extractor


def extract(
    extractor: Extractor,
    batches: Iterable[Tensor],
    device: torch.device,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Tensor]:
    """Features of all batches, one (n, D) on the CPU for each.

    Args:
        extractor: on ``device``.
        batches: images (n, 3, H, W).
        device: where they are compared.
        progress: called with the number of images after every batch.
    """
    features = []
    for images in batches:
        features.append(extractor(images.to(device)).cpu())
        progress(len(images))
    return features
