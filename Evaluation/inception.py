"""The Inception network of the Frechet inception distance."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

from Model.checkpoint import CheckpointError, load_strict, read
from Model.downloads import downloaded
from Model.precision import preferred_layout

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
"""The 2015 TensorFlow network's weights, converted; the name ends in its SHA-256's first digits."""

SIDE, DIMENSIONS = 299, 2048


def _mean_of_inside(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _with_pool(block: type[nn.Module], pool: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    """Replace the pooling in the last branch of torchvision's block.

    TensorFlow's network averages over the pixels inside the picture, and its very last block takes
    the maximum; torchvision's was trained anew with neither.
    """

    class Block(block):  # type: ignore[misc, valid-type]
        def _forward(self, x: Tensor) -> list[Tensor]:
            *branches, _ = super()._forward(x)
            return [*branches, self.branch_pool(pool(x))]

    return Block


class FIDInception(nn.Module):
    """Inception v3 as of 2015-12-05 up to its last pooling (Heusel et al., 2017).

    The parameters have the names of the published file, whose 1008-way classifier is not needed.
    """

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            inception.BasicConv2d,
            _with_pool(inception.InceptionA, _mean_of_inside),
            inception.InceptionB,
            _with_pool(inception.InceptionC, _mean_of_inside),
            inception.InceptionD,
            _with_pool(inception.InceptionE, _mean_of_inside),
            inception.InceptionAux,
        ]
        net = inception.Inception3(1, aux_logits=False, inception_blocks=blocks, init_weights=False)
        net.Mixed_7c = _with_pool(inception.InceptionE, _maximum)(2048)
        net.fc = nn.Identity()
        net.dropout = nn.Identity()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Compute pooled features (N, 2048) of images (N, 3, H, W), nominally in [-1, 1].

        As in the original implementation: floats without an 8-bit step, resized bilinearly to 299
        px without aligned corners.
        """
        if images.shape[2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net(images)


def load_inception(file: Path | None, device: torch.device) -> FIDInception:
    """Load the network, frozen.

    Args:
        file: the weights; None takes the downloaded ones.
        device: where it runs.

    Raises:
        CheckpointError: no download, or not the network's weights; says what to do.
    """
    if file is None:
        file = downloaded(URL, "name it with inception_ckpt, or take the features parser")
    weights = {k: v for k, v in read(file).items() if not str(k).startswith("fc.")}
    network = FIDInception()
    # Counters that files older than PyTorch 0.4.1 lack, and that inference does not use.
    unused = {k: v for k, v in network.net.state_dict().items() if k.endswith("batches_tracked")}
    try:
        load_strict(network.net, unused | weights, "it")
    except CheckpointError as error:
        raise CheckpointError(
            f"{file}: not the FID Inception network ({error}); expected {URL.rsplit('/', 1)[1]}"
        ) from None
    network = network.to(memory_format=preferred_layout(device.type, half=False)).to(device)
    return network.eval().requires_grad_(False)
