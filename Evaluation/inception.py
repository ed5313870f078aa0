"""The Inception network of the Frechet inception distance."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

from Model.checkpoint import CheckpointError, read

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
    """Torchvision's block with another pooling in its last branch.

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
        """Pooled features (N, 2048) of images (N, 3, H, W), nominally in [-1, 1].

        As in the original implementation: floats without an 8-bit step, resized bilinearly to 299
        px without aligned corners.
        """
        if images.shape[2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net(images)


def default_file() -> Path:
    """Where the weights are looked for and downloaded to."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]


def load_inception(file: Path | None, device: torch.device) -> FIDInception:
    """Load the network, frozen.

    Args:
        file: the weights; None takes `default_file` and downloads it when missing.
        device: where it runs.

    Raises:
        CheckpointError: no download, or not the network's weights; says what to do.
    """
    if file is None:
        file = default_file()
        if not file.is_file():
            _download(file)
    weights = {k: v for k, v in read(file).items() if not k.startswith("fc.")}
    network = FIDInception()
    try:
        network.net.load_state_dict(weights)
    except RuntimeError:
        name = URL.rsplit("/", 1)[1]
        raise CheckpointError(f"{file}: not the FID Inception network; expected {name}") from None
    network = network.to(memory_format=torch.channels_last).to(device)
    return network.eval().requires_grad_(False)


def _download(file: Path) -> None:
    """Fetch the weights, checked against the hash in their name, into place at once."""
    digits = file.stem.rsplit("-", 1)[1]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(file), hash_prefix=digits)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is missing and could not be downloaded ({error}); put {URL} there, or name"
            " the file by --inception_ckpt, or take --features parser"
        ) from None
