"""Perceptual distances between image batches: LPIPS, or the features of the face parser."""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from Evaluation.features import trunk_parser
from Model.checkpoint import CheckpointError, load_strict, read
from Model.downloads import downloaded
from Model.face_parser import BiSeNet
from Model.layers import Conv2d, fast_layout
from Model.ops import feature_distance
from Util.compiling import compile_method
from Util.settings import blame

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two image batches (N, 3, H, W) in [-1, 1] -> perceptual distance of each pair, (N,)."""

LPIPS_TRUNKS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


def load_distance(
    name: str,
    trunk: str | Path | None,
    parser: Callable[[], str | Path],
    device: torch.device,
    half: torch.dtype | None = None,
    compile_mode: str = "",
) -> Distance:
    """Load a perceptual distance.

    Args:
        name: parser (`ParserDistance`), or vgg, alex or squeeze (LPIPS).
        trunk: see `load_lpips`.
        parser: names the face parser's file; asked only where it is needed.
        device: where it runs.
        half: type of the trunk's convolutions; None is that of the images. What follows them stays
            in float32: the squared differences of normalised features are too small for float16.
        compile_mode: see `Util.compiling.compile_method`.

    Returns:
        See `Distance`; larger images are reduced to 256 px first, as LPIPS is meant to be used.

    Raises:
        SettingError: a file does not fit; names the setting parser_ckpt or perceptual_ckpt.
    """
    network: nn.Module
    if name == "parser":
        with blame("parser_ckpt"):
            network = ParserDistance(trunk_parser(parser(), device), half)
    else:
        with blame("perceptual_ckpt"):
            network = load_lpips(name, trunk, half).to(device)
    compile_method(network, "forward", compile_mode)
    return lambda a, b: network(at_most(a, 256), at_most(b, 256)).flatten()


def within_content(distance: Distance) -> Distance:
    """Leave out pairs of which one picture has no content: their distance is not a number.

    Args:
        distance: of pictures that have been multiplied by their content masks.
    """

    def known(a: Tensor, b: Tensor) -> Tensor:
        empty = [~images.flatten(1).any(dim=1) for images in (a, b)]
        return distance(a, b).masked_fill(empty[0] | empty[1], torch.nan)

    return known


def _features(
    trunk: Callable[[Tensor], Iterable[Tensor]], images: Tensor, half: torch.dtype | None
) -> list[Tensor]:
    with torch.autocast(images.device.type, half, enabled=half is not None):
        found = trunk(fast_layout(images))
    return [features.float() if half else features for features in found]


class ParserDistance(nn.Module):
    """LPIPS without learned weights on the trunk of a face parser.

    It compares the features of the three trunk stages (`Model.ops.feature_distance`), needs no
    download, and knows the content it was trained on.

    Args:
        parser: a face parser; frozen.
        half: see `load_distance`.
    """

    def __init__(self, parser: BiSeNet, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.parser = parser.eval().requires_grad_(False)
        self.precision = half

    def _features(self, images: Tensor) -> list[Tensor]:
        prepared = self.parser.prepare(images)
        return _features(self.parser.trunk_features, prepared, self.precision)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare pairs of (N, 3, H, W) in [-1, 1]: (N,) >= 0, differentiable once."""
        return feature_distance(self._features(a), self._features(b))


class Lpips(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018, eq. 1) by the weights of the lpips package, in few operators.

    Args:
        network: the package's, of which it takes a copy, frozen.
        half: see `load_distance`.
    """

    offset: Tensor
    factor: Tensor

    def __init__(self, network: Any, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.net, self.lins = copy.deepcopy(network.net), copy.deepcopy(network.lins)
        for module in self.net.modules():
            if type(module) is nn.Conv2d:  # minimal filtering, which VGG gains most by
                module.__class__ = Conv2d
        scale = network.scaling_layer.scale
        self.register_buffer("factor", 1 / scale, persistent=False)
        self.register_buffer("offset", -network.scaling_layer.shift / scale, persistent=False)
        self.precision = half
        self.eval().requires_grad_(False)

    def _features(self, images: Tensor) -> list[Tensor]:
        prepared = torch.addcmul(self.offset, images, self.factor)
        return _features(self.net, prepared, self.precision)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare pairs of (N, 3, H, W) in [-1, 1]: (N, 1, 1, 1) >= 0, differentiable once."""
        weights = [layer.model[-1].weight for layer in self.lins]
        distances = feature_distance(self._features(a), self._features(b), weights)
        return distances.view(-1, 1, 1, 1)


def load_lpips(
    name: str, trunk: str | Path | None = None, half: torch.dtype | None = None
) -> nn.Module:
    """Load LPIPS of the lpips package, frozen.

    Args:
        name: vgg, alex or squeeze.
        trunk: file with torchvision's ImageNet weights of the trunk; None downloads them.
        half: see `load_distance`.

    Returns:
        Two batches (N, 3, H, W) in [-1, 1] -> (N, 1, 1, 1).

    Raises:
        CheckpointError: the trunk's file does not fit, or the download failed.
    """
    import lpips

    file = trunk or _published_trunk(name)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # The package prints a greeting, and calls torchvision in an outdated way.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
    _fill_trunk(network.net, read(file), str(file), LPIPS_TRUNKS[name])
    return Lpips(network, half)


def _published_trunk(name: str) -> Path:
    """Find or download torchvision's ImageNet weights."""
    url = torchvision.models.get_model_weights(LPIPS_TRUNKS[name]).IMAGENET1K_V1.url
    file = f"torchvision's {LPIPS_TRUNKS[name]} file"
    return downloaded(url, f"name {file} by the setting perceptual_ckpt, or take perceptual parser")


def _fill_trunk(net: nn.Module, weights: dict[str, Tensor], file: str, arch: str) -> None:
    """Copy torchvision's ``features.I.*`` into lpips' ``sliceK.I.*``."""
    state = net.state_dict()
    for key in state:
        source = "features." + key.split(".", 1)[1]
        if getattr(weights.get(source), "shape", None) != state[key].shape:
            raise CheckpointError(f"{file}: no fitting {source}; expected torchvision's {arch}")
        state[key] = weights[source]
    load_strict(net, state, file)


def at_most(images: Tensor, side: int) -> Tensor:
    """Reduce images (N, 3, H, W) bilinearly to ``side`` px where they are larger."""
    return images if images.shape[-1] <= side else resized(images, side)


def resized(images: Tensor, side: int) -> Tensor:
    """Resize images (N, 3, H, W) bilinearly to ``side`` px, without antialiasing."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
