"""Where each tensor of our networks is in NVIDIA's, and in which shape.

Neither side scales stored weights: equalised learning rates, activation gains and demodulation
apply at run time with the same constants (`Model.layers`). What differs:

- an upsampling convolution of PyTorch is stored as the transposed convolution applies it, like
  ours; TensorFlow's is stored as a correlation, so it is flipped in both directions;
- TensorFlow's weights are (k, k, I, O) and (in, out), ours (O, I, k, k) and (out, in);
- TensorFlow adds 1 to the style after its bias, ours has that 1 in the bias;
- NVIDIA's filters sum to 1 and get a gain of 4 where they upsample; ours are stored with it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from Model.nvidia.configuration import UnsupportedError
from Model.ops import make_kernel

Framework = Literal["PyTorch", "TensorFlow"]
State = dict[str, Tensor]


class Row(NamedTuple):
    """One tensor: our name, both of NVIDIA's, and what kind it is."""

    ours: str
    pytorch: str
    tensorflow: str
    kind: str = "as it is"


Change = Callable[[Tensor], Tensor]


def _hwio(weight: Tensor) -> Tensor:
    """(k, k, I, O) -> (O, I, k, k)."""
    return weight.permute(3, 2, 0, 1)


SHARED: Mapping[str, Change] = {
    "strength": lambda t: t.reshape(1),
    "colour bias": lambda t: t.view(1, 3, 1, 1),
}
CHANGES: Mapping[Framework, Mapping[str, Change]] = {
    "PyTorch": {
        **SHARED,
        "constant": lambda t: t[None],
        "modulated": lambda t: t[None],
        "upsampling": lambda t: t[None],
        "noise": lambda t: t[None, None],
    },
    "TensorFlow": {
        **SHARED,
        "linear": lambda t: t.transpose(0, 1),
        "convolution": _hwio,
        "modulated": lambda t: _hwio(t)[None],
        "upsampling": lambda t: _hwio(t).flip(2, 3)[None],
        "modulation bias": lambda t: t + 1,
    },
}
"""How a tensor of a kind comes into our shape; a kind that is not there stays as it is."""


def generator_rows(size: int, n_mlp: int) -> Iterator[Row]:
    """All tensors of a generator but its filters."""
    for i in range(n_mlp):
        ours, theirs = f"style.{i + 1}", (f"mapping.fc{i}", f"mapping/Dense{i}")
        yield from _layer(ours, *theirs, "linear")
    yield Row("input.input", "synthesis.b4.const", "synthesis/4x4/Const/const", "constant")
    yield from _styled("conv1", "b4.conv1", "4x4/Conv", 0)
    yield from _to_rgb("to_rgb1", 4)
    for k in range(3, size.bit_length()):
        side = 2**k
        up, same = f"convs.{2 * k - 6}", f"convs.{2 * k - 5}"
        yield from _styled(up, f"b{side}.conv0", f"{side}x{side}/Conv0_up", 2 * k - 5, "upsampling")
        yield from _styled(same, f"b{side}.conv1", f"{side}x{side}/Conv1", 2 * k - 4)
        yield from _to_rgb(f"to_rgbs.{k - 3}", side)


def _layer(ours: str, pytorch: str, tensorflow: str, kind: str) -> Iterator[Row]:
    yield Row(f"{ours}.weight", f"{pytorch}.weight", f"{tensorflow}/weight", kind)
    yield Row(f"{ours}.bias", f"{pytorch}.bias", f"{tensorflow}/bias")


def _modulation(ours: str, pytorch: str, tensorflow: str) -> Iterator[Row]:
    name = f"{ours}.conv.modulation"
    yield Row(f"{name}.weight", f"{pytorch}.affine.weight", f"{tensorflow}/mod_weight", "linear")
    bias = f"{pytorch}.affine.bias", f"{tensorflow}/mod_bias"
    yield Row(f"{name}.bias", *bias, "modulation bias")


def _styled(
    ours: str, pytorch: str, tensorflow: str, index: int, kind: str = "modulated"
) -> Iterator[Row]:
    pytorch, tensorflow = f"synthesis.{pytorch}", f"synthesis/{tensorflow}"
    yield Row(f"{ours}.conv.weight", f"{pytorch}.weight", f"{tensorflow}/weight", kind)
    yield from _modulation(ours, pytorch, tensorflow)
    strength = f"{pytorch}.noise_strength", f"{tensorflow}/noise_strength"
    yield Row(f"{ours}.noise.weight", *strength, "strength")
    yield Row(f"{ours}.activate.bias", f"{pytorch}.bias", f"{tensorflow}/bias")
    noise = f"{pytorch}.noise_const", f"synthesis/noise{index}"
    yield Row(f"noises.noise_{index}", *noise, "noise")


def _to_rgb(ours: str, side: int) -> Iterator[Row]:
    pytorch, tensorflow = f"synthesis.b{side}.torgb", f"synthesis/{side}x{side}/ToRGB"
    yield Row(f"{ours}.conv.weight", f"{pytorch}.weight", f"{tensorflow}/weight", "modulated")
    yield from _modulation(ours, pytorch, tensorflow)
    yield Row(f"{ours}.bias", f"{pytorch}.bias", f"{tensorflow}/bias", "colour bias")


def generator_filters(size: int) -> State:
    """The filters of a generator's upsampling layers."""
    blocks = range(size.bit_length() - 3)
    names = [name for i in blocks for name in (f"convs.{2 * i}.conv.blur", f"to_rgbs.{i}.upsample")]
    return {f"{name}.kernel": make_kernel(gain=4.0) for name in names}


def discriminator_rows(size: int) -> Iterator[Row]:
    """All tensors of a discriminator but its filters, from the image on."""
    yield Row("convs.0.0.weight", f"b{size}.fromrgb.weight", *_in(size, "FromRGB"))
    yield Row("convs.0.1.bias", f"b{size}.fromrgb.bias", f"{size}x{size}/FromRGB/bias")
    for n in range(1, size.bit_length() - 2):
        side = 2 * size >> n
        ours, pytorch, tensorflow = f"convs.{n}", f"b{side}", f"{side}x{side}"
        yield Row(f"{ours}.conv1.0.weight", f"{pytorch}.conv0.weight", *_in(side, "Conv0"))
        yield Row(f"{ours}.conv1.1.bias", f"{pytorch}.conv0.bias", f"{tensorflow}/Conv0/bias")
        yield Row(f"{ours}.conv2.1.weight", f"{pytorch}.conv1.weight", *_in(side, "Conv1_down"))
        yield Row(f"{ours}.conv2.2.bias", f"{pytorch}.conv1.bias", f"{tensorflow}/Conv1_down/bias")
        yield Row(f"{ours}.skip.1.weight", f"{pytorch}.skip.weight", *_in(side, "Skip"))
    yield Row("final_conv.0.weight", "b4.conv.weight", *_in(4, "Conv"))
    yield Row("final_conv.1.bias", "b4.conv.bias", "4x4/Conv/bias")
    yield from _layer("final_linear.0", "b4.fc", "4x4/Dense0", "linear")
    yield from _layer("final_linear.1", "b4.out", "Output", "linear")


def _in(side: int, layer: str) -> tuple[str, str]:
    return f"{side}x{side}/{layer}/weight", "convolution"


def discriminator_filters(size: int) -> State:
    """The filters of a discriminator's downsampling layers."""
    blocks = range(1, size.bit_length() - 2)
    names = [name for n in blocks for name in (f"convs.{n}.conv2.0", f"convs.{n}.skip.0")]
    return {f"{name}.kernel": make_kernel() for name in names}


def convert(tensors: Mapping[str, Tensor], rows: Iterator[Row], framework: Framework) -> State:
    """Rename and reshape the tensors of a network; all of them must be known.

    Raises:
        UnsupportedError: names one that is missing, left over or of an unfit shape.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors.values())}
    if sum(tensor.nbytes for tensor in tensors.values()) > sum(storages.values()):
        raise UnsupportedError("its tensors claim more values than are stored")
    state, left = {}, set(tensors)
    for row in rows:
        theirs = row.pytorch if framework == "PyTorch" else row.tensorflow
        if theirs not in tensors:
            raise UnsupportedError(f"it lacks the tensor {theirs}")
        change = CHANGES[framework].get(row.kind, lambda t: t)
        try:
            state[row.ours] = change(tensors[theirs]).contiguous()
        except (RuntimeError, IndexError):
            shape = tuple(tensors[theirs].shape)
            raise UnsupportedError(f"its tensor {theirs} has shape {shape}") from None
        left.discard(theirs)
    if left:
        raise UnsupportedError(f"it has a tensor {min(left)}, which no StyleGAN2 has")
    return state
