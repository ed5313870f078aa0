"""Embeddings: networks trained without GANs that turn pictures into vectors, with gradients.

Pictures enter in [-1, 1] without further normalisation, as in DiME (Yeo et al., ECCV 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from Evaluation.clip import SIDE, load_clip
from Evaluation.features import fingerprint, parser_extractor
from Model.checkpoint import CheckpointError, load_strict, read
from Model.downloads import downloaded
from Model.precision import preferred_layout
from Util.settings import SettingError, blame

DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"
NAMES = ("dino", "clip", "parser")


@dataclass(frozen=True)
class Embedding:
    """A frozen network.

    Attributes:
        network: pictures (N, 3, H, W) in [-1, 1] -> (N, D), differentiable.
        protocol: weights and preparation of the pictures, in words.
    """

    network: Callable[[Tensor], Tensor]
    protocol: str


def load_dino(file: Path | None) -> nn.Module:
    """Load ResNet-50 trained by DINO (Caron et al., 2021), frozen.

    Args:
        file: its weights; None takes the downloaded ones.

    Raises:
        CheckpointError: no download, or not the network's weights.
    """
    file = file or downloaded(DINO_URL, "name the file (dino_ckpt), or take another network")
    network = torchvision.models.resnet50(weights=None)
    network.fc = nn.Identity()
    # Counters that inference does not use.
    unused = {k: v for k, v in network.state_dict().items() if k.endswith("batches_tracked")}
    weights = read(file)
    try:
        load_strict(network, unused | weights, str(file))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; expected {DINO_URL.rsplit('/', 1)[1]}") from None
    return network.eval().requires_grad_(False)


def load_embedding(
    name: str,
    file: Path | None,
    parser: Callable[[], str | Path],
    device: torch.device,
) -> Embedding:
    """Load an embedding.

    Args:
        name: one of `NAMES`: dino and clip at ResNet-50's size, or the features of a face parser.
        file: weights of dino or clip; None downloads dino's.
        parser: names the face parser's file; asked only where it is needed.
        device: where it runs.

    Raises:
        SettingError: a file is missing or does not fit; names dino_ckpt, clip_ckpt or parser_ckpt.
    """
    if name == "parser":
        with blame("parser_ckpt"):
            extractor = parser_extractor(Path(parser()), device)
        return Embedding(extractor.network, extractor.protocol)
    with blame(f"{name}_ckpt"):
        if name == "dino":
            network, how = load_dino(file), "ResNet-50 of DINO, 2048 pooled features, full size"
        elif file is None:
            raise SettingError(
                "clip_ckpt",
                "is missing; name the tensors of CLIP RN50 (see doc/recipes.md), or leave clip out"
                " of moments_networks",
            )
        else:
            network, how = load_clip(file), f"ResNet-50 of CLIP, bilinear to {SIDE} px"
    network = network.to(memory_format=preferred_layout(device.type, half=False)).to(device)
    mark = f" ({fingerprint(file)})" if file else ""
    return Embedding(network, f"{how}{mark}; pictures in [-1, 1]")
