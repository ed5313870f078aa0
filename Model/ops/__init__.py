"""The two operators a StyleGAN2 needs beyond PyTorch's own.

Every operator takes ``impl``: ``"reference"`` is plain PyTorch and runs on any device, ``"native"``
is a compiled kernel, ``"auto"`` takes the native one where it is built and the reference elsewhere.
"""

from Model.ops.fused_leaky_relu import fused_leaky_relu
from Model.ops.upfirdn2d import make_kernel, upfirdn2d

__all__ = ["fused_leaky_relu", "make_kernel", "upfirdn2d"]
