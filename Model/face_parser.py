"""The face parser: BiSeNet on a ResNet-18 trunk, with the names of the published checkpoint.

The architecture is that of "BiSeNet: Bilateral Segmentation Network for Real-time Semantic
Segmentation" (Yu et al., ECCV 2018) in the variant published for CelebAMask-HQ faces
(79999_iter.pth of face-parsing.PyTorch): in place of a separate spatial path it has the trunk's
features at one eighth of the input's side.

Two numbers make cheaper relatives of the published network: `width` scales every layer, and
`stem_stride` keeps more of the detail of a small input.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from Model.layers import Conv2d, fast_layout
from Model.ops import upsampled_argmax
from Model.ops.dispatch import gradient_wanted

STEM_PIXELS = 2**18
"""Pixels whose widest maps exist at once where there are no gradients: one image of 512 px."""

PUBLISHED_WIDTH = 64
PUBLISHED_STEM_STRIDE = 4
PUBLISHED_INPUT_SIZE = 512
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CELEBAMASK_NAMES = (
    *("background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear"),
    *("ear_r", "nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat"),
)
CELEBAMASK_EXCLUDED = (0, 16)
"""What is not content: background and cloth ("Content-Aware GAN Compression", section 3.1)."""


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, h, w) to (N, O, h, w)."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 (He et al., CVPR 2016, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if in_channels != out_channels or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, h, w) to (N, O, h / stride, w / stride)."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        if self.downsample is None:
            return F.relu(residual.add_(x), inplace=True)
        return F.relu(residual.add_(self._shortcut(x)), inplace=True)

    def _shortcut(self, x: Tensor) -> Tensor:
        """Map x as the residual's sizes want it."""
        assert self.downsample is not None
        first: Any = self.downsample[0]
        if not gradient_wanted(*first.parameters()):
            y = F.conv2d(x, first.weight, first.bias, self.stride)
            return self.downsample[1](y)
        # A 1x1 layer with a stride reads every stride-th pixel. They are picked beforehand, because
        # oneDNN's weight gradient of such a layer writes out of bounds for fewer than 16 channels
        # in channels-last order (github.com/uxlfoundation/oneDNN, issue 6035).
        return self.downsample(x[:, :, :: self.stride, :: self.stride])


class ResNet18(nn.Module):
    """ResNet-18 without its classifier; returns the outputs of its last three stages."""

    def __init__(self, width: int, stem_stride: int) -> None:
        super().__init__()
        # The later strides go first: a first layer without one, at the picture's full size, would
        # cost the most.
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2 if stem_stride == 4 else 1, padding=1)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 1 if stem_stride == 1 else 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, 3, H, W) to features at 1/8, 1/16 and 1/32 of the side (with stem stride 4)."""
        feat8 = self.layer2(self.layer1(self._stem(fast_layout(x))))
        feat16 = self.layer3(feat8)
        feat32 = self.layer4(feat16)
        return feat8, feat16, feat32

    def _stem(self, x: Tensor) -> Tensor:
        """Map images to the first stage's input, few at a time where nothing else depends on it.

        Its maps are the network's largest by far. What follows is faster the more it has at once.
        """
        images = max(1, STEM_PIXELS // (x.shape[2] * x.shape[3]))
        if self.training or torch.is_grad_enabled() or x.device.type != "cpu" or len(x) <= images:
            return self._entry(x)
        return torch.cat([self._entry(part) for part in x.split(images)])

    def _entry(self, x: Tensor) -> Tensor:
        # The maximum commutes with the ReLU, and leaves it a quarter of the values or fewer.
        return F.relu(self.maxpool(self.bn1(self.conv1(x))), inplace=True)


class AttentionRefinement(nn.Module):
    """A 3x3 layer whose channels are weighted by a function of their mean (section 3.2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, out_channels)
        self.conv_atten = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, h, w) to (N, O, h, w)."""
        x = self.conv(x)
        attention = self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True)))
        return x * attention.sigmoid()


class ContextPath(nn.Module):
    """The trunk and the way back up from 1/32 to 1/8 of the side (section 3.2)."""

    def __init__(self, width: int, stem_stride: int) -> None:
        super().__init__()
        self.resnet = ResNet18(width, stem_stride)
        self.arm16 = AttentionRefinement(4 * width, 2 * width)
        self.arm32 = AttentionRefinement(8 * width, 2 * width)
        self.conv_head32 = ConvBNReLU(2 * width, 2 * width)
        self.conv_head16 = ConvBNReLU(2 * width, 2 * width)
        self.conv_avg = ConvBNReLU(8 * width, 2 * width, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, 3, H, W) to trunk features at 1/8, context at 1/8 and at 1/16 of the side."""
        feat8, feat16, feat32 = self.resnet(x)
        # One value per channel for the whole image: broadcasting is its nearest upsampling.
        context = self.arm32(feat32) + self.conv_avg(feat32.mean((2, 3), keepdim=True))
        context16 = self.conv_head32(F.interpolate(context, feat16.shape[2:], mode="nearest"))
        context = self.arm16(feat16) + context16
        context8 = self.conv_head16(F.interpolate(context, feat8.shape[2:], mode="nearest"))
        return feat8, context8, context16


class FeatureFusion(nn.Module):
    """Join detail and context and re-weight the channels of the result (section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convblk = ConvBNReLU(channels, channels, kernel_size=1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        """Map two (N, C / 2, h, w) to (N, C, h, w)."""
        fused = self.convblk(torch.cat((detail, context), dim=1))
        attention = F.relu(self.conv1(fused.mean((2, 3), keepdim=True)))
        return fused * (1 + self.conv2(attention).sigmoid())


class OutputHead(nn.Module):
    """A 3x3 layer and a 1x1 classifier."""

    def __init__(self, in_channels: int, mid_channels: int, n_classes: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, mid_channels)
        self.conv_out = nn.Conv2d(mid_channels, n_classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, h, w) to logits (N, n_classes, h, w)."""
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Semantic segmentation of ImageNet-normalised images.

    The default is exactly the published face parser. Parameters start from Kaiming initialisation;
    nothing is downloaded.

    Args:
        n_classes: number of classes; the published parser has CelebAMask-HQ's 19.
        width: channels of the first stage. The stages have width, 2, 4 and 8 times width.
        stem_stride: 4 (published), 2 or 1. The logits are computed at 1 / (2 * stem_stride) of the
            input's side; 2 leaves out the pooling's stride, 1 also that of the second stage.
        input_size: side in pixels of the square images that the network was trained for; `prepare`
            resizes to it, `forward` is not limited to it.
        classes_excluded: classes that are not content. None means CelebAMask-HQ's background and
            cloth where there are 19 classes, else class 0.
        class_names: one for each class. Without names, 19 classes have CelebAMask-HQ's.

    Raises:
        ValueError: for a number that is not positive, a stem stride other than 1, 2, 4, or classes
            that do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        n_classes: int = 19,
        width: int = PUBLISHED_WIDTH,
        stem_stride: int = PUBLISHED_STEM_STRIDE,
        input_size: int = PUBLISHED_INPUT_SIZE,
        classes_excluded: Sequence[int] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value in (("n_classes", n_classes), ("width", width), ("input_size", input_size)):
            if value < 1:
                raise ValueError(f"face parser: {name} is {value}; it must be at least 1")
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"face parser: stem_stride is {stem_stride}; it must be 1, 2 or 4")
        self.n_classes = n_classes
        self.width = width
        self.stem_stride = stem_stride
        self.input_size = input_size
        faces = n_classes == len(CELEBAMASK_NAMES)
        if classes_excluded is None:
            classes_excluded = CELEBAMASK_EXCLUDED if faces else (0,)
        if not class_names:
            class_names = CELEBAMASK_NAMES if faces else [f"class {i}" for i in range(n_classes)]
        self.classes_excluded, self.class_names = tuple(classes_excluded), tuple(class_names)
        self._check_classes()
        self.cp = ContextPath(width, stem_stride)
        self.ffm = FeatureFusion(4 * width)
        self.conv_out = OutputHead(4 * width, 4 * width, n_classes)
        self.conv_out16 = OutputHead(2 * width, width, n_classes)
        self.conv_out32 = OutputHead(2 * width, width, n_classes)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self._initialise()

    def _check_classes(self) -> None:
        for value in self.classes_excluded:
            if type(value) is not int or not 0 <= value < self.n_classes:
                known = f"0 to {self.n_classes - 1}"
                raise ValueError(f"face parser: there is no class {value!r} to exclude in {known}")
        printable = [isinstance(name, str) and name.isprintable() for name in self.class_names]
        if len(printable) != self.n_classes or not all(printable):
            raise ValueError(f"face parser: class_names are not {self.n_classes} printable names")

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as they are stored next to the weights in a checkpoint."""
        return {
            "n_classes": self.n_classes,
            "width": self.width,
            "stem_stride": self.stem_stride,
            "input_size": self.input_size,
            "classes_excluded": list(self.classes_excluded),
            "class_names": list(self.class_names),
        }

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise pictures for the network; differentiable in `images`.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, 3, input_size, input_size), clamped to [0, 1] before the ImageNet normalisation.
        """
        size = (self.input_size, self.input_size)
        # Enlarging keeps means and factors, and costs less after them than before.
        images = (images.add(1).mul(0.5).clamp(0, 1) - self.mean) / self.std
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return images

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the main and the two auxiliary outputs; the latter serve training only.

        Args:
            images: (N, 3, H, W), ImageNet-normalised.

        Returns:
            Three logit maps (N, n_classes, H, W): main output, context at 1/8, context at 1/16.
        """
        size = images.shape[2:]
        main, at8, at16 = (self.upsample(logits, size) for logits in self.all_logits(images))
        return main, at8, at16

    def all_logits(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs before their upsampling, the last at half the others' side."""
        detail8, context8, context16 = self.cp(images)
        main = self.conv_out(self.ffm(detail8, context8))
        return main, self.conv_out16(context8), self.conv_out32(context16)

    @property
    def corners_coincide(self) -> bool:
        """Whether the corner pixels' centres coincide when logits are enlarged.

        The published network's do, so the maps drift against the picture by up to half a logit
        pixel from its middle to its border. With the smaller stem strides, made for thin structures
        in small pictures, the maps are enlarged evenly.
        """
        return self.stem_stride == 4

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Enlarge logits to the picture's size, bilinearly."""
        return F.interpolate(
            logits, tuple(size), mode="bilinear", align_corners=self.corners_coincide
        )

    def main_logits(self, images: Tensor) -> Tensor:
        """Compute the main output alone, before its upsampling: (N, n_classes, h, w)."""
        detail8, context8, _ = self.cp(images)
        return self.conv_out(self.ffm(detail8, context8))

    def classify(self, images: Tensor) -> Tensor:
        """Compute the logits of pictures as they come.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, n_classes, input_size, input_size).
        """
        size = (self.input_size, self.input_size)
        # Enlarged in float32: in half precision, neighbouring logits would tie.
        return self.upsample(self.main_logits(self.prepare(images)).float(), size)

    def class_map(self, images: Tensor) -> Tensor:
        """Compute the likeliest class of every pixel, as of `classify`.

        Args:
            images: (N, 3, H, W), nominally in [-1, 1].

        Returns:
            (N, input_size, input_size) int64.
        """
        logits = self.main_logits(self.prepare(images)).float()
        return upsampled_argmax(logits, (self.input_size,) * 2, self.corners_coincide)

    def trunk_features(self, images: Tensor) -> list[Tensor]:
        """Compute the trunk's features, for losses that compare images by them.

        Args:
            images: (N, 3, H, W), ImageNet-normalised. Gradients flow back to them.

        Returns:
            Three maps with 2, 4 and 8 times `width` channels, at 1/8, 1/16 and 1/32 of the side
            (with the published stem stride).
        """
        return list(self.cp.resnet(images))


def fold_batch_norm(parser: BiSeNet) -> BiSeNet:
    """Copy a parser for inference, with the batch normalisation inside the convolutions before it.

    This spares a pass over memory for every layer. The outputs are equal up to rounding; the
    parameters are others, so the copy cannot be saved as a face parser.
    """
    folded = copy.deepcopy(parser).eval()
    for module in list(folded.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                before = "0" if isinstance(module, nn.Sequential) else name.replace("bn", "conv")
                convolution: Any = module.get_submodule(before)
                setattr(module, before, fuse_conv_bn_eval(convolution, norm))
                setattr(module, name, nn.Identity())
    return folded
