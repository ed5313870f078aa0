"""The content of interest: which pixels of a picture belong to it, by a parser's class map."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Model import bundled
from Model.checkpoint import load_face_parser
from Model.face_parser import BiSeNet, fold_batch_norm
from Util.settings import blame


class ContentParser(nn.Module):
    """Turns images into content masks: 1 where the class is none of the excluded ones.

    "Content-Aware GAN Compression" (Liu et al., CVPR 2021), section 3.1: everything but background
    and clothes. Works at any batch size, without gradients, and leaves the network in eval mode.

    Args:
        network: the parser; its `input_size` is the side in pixels of the pictures it is shown.
        classes_excluded: classes that are not content. None takes those of the network, which are
            CelebAMask-HQ's background and cloth, (0, 16), unless it was trained for others.
        chunk: images parsed at a time. It bounds the memory and does not change the result. None
            takes as many as have half a million pixels on a CPU, where more gain little, and four
            million on a GPU.

    Raises:
        ValueError: if a class to exclude is not one of the network's, or `chunk` is not positive.
    """

    is_content: Tensor

    def __init__(
        self,
        network: BiSeNet,
        classes_excluded: Iterable[int] | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        excluded = network.classes_excluded if classes_excluded is None else tuple(classes_excluded)
        device = next(network.parameters()).device
        unknown = [c for c in excluded if not 0 <= c < network.n_classes]
        if unknown:
            raise ValueError(
                f"classes_excluded has {unknown}, but the parser's {network.n_classes} classes are "
                f"0 to {network.n_classes - 1}; name the classes outside the content of interest"
            )
        if chunk is None:
            pixels = 2**19 if device.type == "cpu" else 2**22
            chunk = max(1, pixels // network.input_size**2)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; at least one image is parsed at a time")
        is_content = torch.ones(network.n_classes)
        is_content[list(excluded)] = 0
        self.network = network
        self.chunk = chunk
        self.register_buffer("is_content", is_content.to(device), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "ContentParser":
        """Stays in eval mode: the masks must not depend on what else is in the batch."""
        return super().train(False)

    def _parse_chunk(self, images: Tensor) -> Tensor:
        # Channels last from the start: the convolutions are faster on it, and the maximum is then
        # taken over contiguous values, several times faster than over strided planes. (PyTorch's
        # argmax takes twice as long as its max.)
        images = images.float().contiguous(memory_format=torch.channels_last)
        size = (self.network.input_size, self.network.input_size)
        logits = self.network.main_logits(self.network.prepare(images))
        logits = self.network.upsample(logits, size)
        return logits.permute(0, 2, 3, 1).max(dim=3).indices

    @torch.no_grad()
    def parse(self, images: Tensor) -> Tensor:
        """Class maps.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, input_size, input_size), int64 class indices.
        """
        _check_images(images)
        return torch.cat([self._parse_chunk(part) for part in images.split(self.chunk)])

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
        _check_images(images)
        size = images.shape[2:]
        masks = []
        for part in images.split(self.chunk):
            mask = self.is_content[self._parse_chunk(part)].unsqueeze(1)
            if mask.shape[2:] != size:
                mask = F.interpolate(mask, size, mode="bilinear", align_corners=False)
            masks.append((mask > 0.5).to(images.dtype))
        return torch.cat(masks)


def load_content_parser(path: str | PathLike[str], device: torch.device) -> ContentParser:
    """Make the content parser of a face parser's file, with the exclusions it was trained for.

    Raises:
        CheckpointError: the file holds no face parser.
    """
    return ContentParser(fold_batch_norm(load_face_parser(path, device)))


def parser_for(
    parser_ckpt: str | Path | None, model: str | Path, device: torch.device
) -> ContentParser:
    """The content parser of a file, or where none is named the one that fits the model.

    Raises:
        SettingError: names the setting parser_ckpt and what is wrong.
    """
    with blame("parser_ckpt"):
        return load_content_parser(parser_ckpt or bundled.default_parser(model), device)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images (N, 3, H, W), got {tuple(images.shape)}")
