"""The image encoder of CLIP's ResNet-50 (Radford et al., 2021, section 2.4).

A ResNet with a stem of three convolutions, average pooling before every strided convolution, and
attention in place of the last pooling. The parameters have the names of the published network.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Model.checkpoint import CheckpointError, load_strict, read

SIDE = 224
"""Side in px of the pictures: the attention's positions belong to a grid of 7 x 7."""


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; strides are average pooling."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(
                _conv(in_channels, 4 * width, 1), nn.BatchNorm2d(4 * width)
            )

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, h, w) -> (N, 4 * width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self._pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(self._pool(x))))


class AttentionPool(nn.Module):
    """One query, the mean over the positions, attends to the mean and to every position."""

    def __init__(self, side: int, channels: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, channels))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, outputs)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, side, side) -> (N, outputs)."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding
        projected = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in projected)
        pooled = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class ClipResNet(nn.Module):
    """The image encoder; the defaults are those of RN50.

    Args:
        width: channels of the first stage.
        blocks: bottlenecks of the four stages.
        outputs: size of the embedding.
        side: of the pictures in px, a multiple of 32.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
        outputs: int = 1024,
        side: int = SIDE,
    ) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _conv(3, half, 3, stride=2), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, width, 3), nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            layers = []
            for i in range(count):
                layers.append(Bottleneck(channels, inner, 2 if stage and not i else 1))
                channels = 4 * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.attnpool = AttentionPool(side // 32, channels, channels // 64, outputs)
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, outputs) of images (N, 3, H, W), resized bilinearly to ``side``."""
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(
                images, (self.side, self.side), mode="bilinear", align_corners=False
            )
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.attnpool(x)


def load_clip(file: Path) -> ClipResNet:
    """Load RN50's image encoder from a state dict, frozen.

    The published RN50.pt is a TorchScript program, which is not run here: only tensors are read.

    Args:
        file: state dict of the whole model (``visual.*``) or of the encoder.

    Raises:
        CheckpointError: not such a state dict; says how to make one.
    """
    network = ClipResNet()
    try:
        content = read(file)
        weights = {
            str(k).removeprefix("visual."): v
            for k, v in content.items()
            if str(k).startswith("visual.") or "visual.conv1.weight" not in content
        }
        load_strict(network, weights, str(file))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; expected the tensors of CLIP RN50: where you trust RN50.pt, make the file by"
            " torch.save(torch.jit.load('RN50.pt', 'cpu').float().visual.state_dict(), 'FILE')"
        ) from None
    return network.eval().requires_grad_(False)
