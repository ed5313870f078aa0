"""Perceptual distances between image batches: LPIPS, or the features of the face parser."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from Evaluation.features import trunk_parser
from Model.checkpoint import CheckpointError, load_strict, read
from Model.downloads import downloaded
from Model.face_parser import BiSeNet
from Model.layers import fast_layout
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
        half: type of the trunk's convolutions. What follows them stays in float32: the squared
            differences of normalised features are too small for float16.
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
            network = load_lpips(name, trunk).to(device)
            if half:
                network.net = Trunk(network.get_submodule("net"), half)
    compile_method(network, "forward", compile_mode)
    return lambda a, b: network(at_most(a, 256), at_most(b, 256)).flatten()


class Trunk(nn.Module):
    """A convolutional trunk, maybe in half precision, with float32 features.

    Args:
        network: images (N, 3, H, W) -> feature maps.
        half: type of its convolutions; None leaves it as it is.
    """

    def __init__(self, network: nn.Module, half: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.precision = network, half

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the features."""
        return _features(self.network, fast_layout(images), self.precision)


def _features(
    trunk: Callable[[Tensor], Iterable[Tensor]], images: Tensor, half: torch.dtype | None
) -> list[Tensor]:
    with torch.autocast(images.device.type, half, enabled=half is not None):
        found = trunk(images)
    return [features.float() if half else features for features in found]


class ParserDistance(nn.Module):
    """LPIPS without learned weights on the trunk of a face parser.

    Features of the three trunk stages are normalised to unit length per position; the distance is
    their squared difference, averaged over positions and summed over stages (Zhang et al., CVPR
    2018, eq. 1 with w = 1). It needs no download and knows the content it was trained on.

    Args:
        parser: a face parser; frozen.
        half: see `Trunk`.
    """

    def __init__(self, parser: BiSeNet, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.parser = parser.eval().requires_grad_(False)
        self.precision = half

    def _features(self, images: Tensor) -> list[Tensor]:
        prepared = self.parser.prepare(images)
        features = _features(self.parser.trunk_features, prepared, self.precision)
        return [F.normalize(f, dim=1) for f in features]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare pairs of (N, 3, H, W) in [-1, 1]: (N,) >= 0, differentiable."""
        pairs = zip(self._features(a), self._features(b), strict=True)
        distances = [(x - y).square().sum(dim=1).mean(dim=(1, 2)) for x, y in pairs]
        return torch.stack(distances).sum(dim=0)


class Lpips(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018, eq. 1) by the weights of the lpips package, in few operators.

    Args:
        network: the package's; frozen.
    """

    offset: Tensor
    factor: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.net, self.lins = network.net, network.lins
        scale = network.scaling_layer.scale
        self.register_buffer("factor", 1 / scale, persistent=False)
        self.register_buffer("offset", -network.scaling_layer.shift / scale, persistent=False)
        self.eval().requires_grad_(False)

    def _features(self, images: Tensor) -> list[Tensor]:
        return list(self.net(torch.addcmul(self.offset, images, self.factor)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare pairs of (N, 3, H, W) in [-1, 1]: (N, 1, 1, 1) >= 0, differentiable once."""
        weights = [layer.model[-1].weight for layer in self.lins]
        maps = [*self._features(a), *self._features(b)]
        return _WeightedDistance.apply(len(weights), *weights, *maps)


_SMALLEST_NORM = 1e-10


class _WeightedDistance(torch.autograd.Function):
    """Sum over layers of the mean over positions of  sum_c w_c (u_c - v_c)^2.

    u = a / m, m = |a| + 1e-10 by position, and v likewise of b. With D = 2 w (u - v) / positions,
    dL/da = (D - u (u D)) / m; the small number counts in m alone.

    Operators on lists, of 5 layers: a third of those that the package asks for.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        weights, maps = tensors[:count], tensors[count:]
        norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in maps]
        torch._foreach_add_(norms, _SMALLEST_NORM)
        units = torch._foreach_div(maps, norms)
        differences = units[:count]
        torch._foreach_sub_(differences, units[count:])
        squares = torch._foreach_mul(differences, differences)
        means = [
            F.conv2d(x, weight).mean((2, 3), keepdim=True)
            for x, weight in zip(squares, weights, strict=True)
        ]
        ctx.count = count
        ctx.save_for_backward(*weights, *maps)
        ctx.norms, ctx.differences = norms, differences
        return torch.stack(means).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, (grad,) = ctx.count, grads
        weights, maps = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        shares = [2 / (x.shape[2] * x.shape[3]) for x in maps[:count]]
        along = torch._foreach_mul(ctx.differences, torch._foreach_mul(weights, shares))
        torch._foreach_mul_(along, [grad] * count)
        found: list[Tensor | None] = []
        for side in range(2):
            if not any(ctx.needs_input_grad[1 + (1 + side) * count :][:count]):
                found += [None] * count
                continue
            half = slice(side * count, (side + 1) * count)
            signed = torch._foreach_neg(along) if side else along
            found += _through_norm(signed, maps[half], ctx.norms[half])
        return (None, *[None] * count, *found)


def _through_norm(
    grads: tuple[Tensor, ...], maps: tuple[Tensor, ...], norms: list[Tensor]
) -> list[Tensor]:
    """Follow gradients by u = x / |x| back to x: (g - u (u g)) / |x|."""
    units = torch._foreach_div(maps, norms)
    products = [p.sum(dim=1, keepdim=True) for p in torch._foreach_mul(units, grads)]
    torch._foreach_mul_(units, products)
    found = torch._foreach_sub(grads, units)
    torch._foreach_div_(found, norms)
    return list(found)


def load_lpips(name: str, trunk: str | Path | None = None) -> nn.Module:
    """Load LPIPS of the lpips package, frozen.

    Args:
        name: vgg, alex or squeeze.
        trunk: file with torchvision's ImageNet weights of the trunk; None downloads them.

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
    return Lpips(network)


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
