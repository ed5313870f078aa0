"""The operators a StyleGAN2 needs beyond PyTorch's own.

Every operator takes ``impl``: ``"reference"`` is plain PyTorch and runs on any device, ``"native"``
is a compiled kernel, ``"auto"`` takes the native one where it can be built and is faster, and the
reference elsewhere. The environment variable STYLEGAN_OPS says what "auto" means. Compiled kernels
are built when first used (`Model.ops.build`); see doc/operators.md.
"""

from Model.ops.convolution import (
    conv2d,
    conv3x3,
    styled_conv,
    styled_conv3x3,
    styled_upsampling_conv3x3,
)
from Model.ops.epilogue import (
    Epilogue,
    apply_epilogue,
    filtered_leaky_relu,
    fused_leaky_relu,
    scaled_maps,
)
from Model.ops.feature_distance import feature_distance
from Model.ops.upfirdn2d import make_kernel, upfirdn2d
from Model.ops.upsampled_argmax import argmax_of_maps, upsampled_argmax

__all__ = [
    "Epilogue",
    "apply_epilogue",
    "argmax_of_maps",
    "conv2d",
    "conv3x3",
    "feature_distance",
    "filtered_leaky_relu",
    "fused_leaky_relu",
    "make_kernel",
    "scaled_maps",
    "styled_conv",
    "styled_conv3x3",
    "styled_upsampling_conv3x3",
    "upfirdn2d",
    "upsampled_argmax",
]
