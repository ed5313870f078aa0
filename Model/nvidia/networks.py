"""From the objects of a pickle to this project's state dicts."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from Model.nvidia import layout
from Model.nvidia.configuration import Facts, Kind, Setting, UnsupportedError, check, flat_settings
from Model.nvidia.layout import Framework, State
from Model.nvidia.reader import Array, Persistent, TensorFlowNetwork
from Model.ops import make_kernel

LARGEST_LOG2 = 12
"""Of the largest side in px that is looked for."""
LAST_LAYER: Mapping[tuple[Framework, Kind], str] = {
    ("PyTorch", "generator"): "synthesis.b{0}.conv1.weight",
    ("PyTorch", "discriminator"): "b{0}.fromrgb.weight",
    ("TensorFlow", "generator"): "synthesis/{0}x{0}/Conv1/weight",
    ("TensorFlow", "discriminator"): "{0}x{0}/FromRGB/weight",
}
"""A tensor of the largest resolution."""
LR_MUL = 0.01
"""The learning rate multiplier of every mapping network here."""

Tensors = dict[str, Tensor]


def convert_network(network: Any, kind: Kind) -> tuple[State, Facts, Tensor | None]:
    """Convert one network.

    Args:
        network: `Persistent` or `TensorFlowNetwork`.
        kind: what it should be.

    Returns:
        Its state dict, what else there is to know, and the mean w (style_dim,) if it is there.

    Raises:
        UnsupportedError: says why it cannot be converted.
    """
    framework: Framework
    if isinstance(network, Persistent):
        framework, (tensors, facts) = "PyTorch", _of_pytorch(network, kind)
    elif isinstance(network, TensorFlowNetwork):
        framework, (tensors, facts) = "TensorFlow", _of_tensorflow(network, kind)
    else:
        raise UnsupportedError(f"{type(network).__name__} instead of a network")
    size = _size(tensors, LAST_LAYER[framework, kind])
    if kind == "discriminator":
        rows = layout.discriminator_rows(size)
        state = layout.convert(tensors, rows, framework) | layout.discriminator_filters(size)
        return state, facts, None
    latent_avg = tensors.pop("mapping.w_avg" if framework == "PyTorch" else "dlatent_avg", None)
    state = _generator(tensors, size, facts.lr_mul, framework)
    if latent_avg is not None and latent_avg.shape != state["style.1.bias"].shape:
        raise UnsupportedError(f"its mean w has shape {tuple(latent_avg.shape)}")
    return state, facts, latent_avg


def _size(tensors: Tensors, pattern: str) -> int:
    """Side in px of the largest resolution that has a layer."""
    sides = [2**k for k in range(3, LARGEST_LOG2 + 1) if pattern.format(2**k) in tensors]
    if not sides:
        raise UnsupportedError(f"it lacks the tensor {pattern.format('N')} (N = 8, 16, ...)")
    return max(sides)


def _generator(tensors: Tensors, size: int, lr_mul: float, framework: Framework) -> State:
    pattern = "mapping.fc{}.weight" if framework == "PyTorch" else "mapping/Dense{}/weight"
    n_mlp = next(i for i in itertools.count() if pattern.format(i) not in tensors)
    state = layout.convert(tensors, layout.generator_rows(size, max(n_mlp, 1)), framework)
    for name in [name for name in state if name.startswith("style.")]:
        if name.endswith("weight") and len(set(state[name].shape)) != 1:
            raise UnsupportedError(
                f"its mapping network has a layer of {tuple(state[name].shape)}; here z, w and what"
                " is between them are of one width"
            )
        if lr_mul != LR_MUL:  # stored values are multiplied by it at run time
            state[name] = state[name] * (lr_mul / LR_MUL)
    return state | layout.generator_filters(size)


def _of_pytorch(network: Persistent, kind: Kind) -> tuple[Tensors, Facts]:
    """Tensors and settings of a persistent network.

    Raises:
        UnsupportedError: it is of another architecture.
    """
    parts = dict(_parts(network))
    if network.version != 6:
        raise UnsupportedError(f"version {network.version!r} of the format, not 6")
    if "synthesis.input" in parts:
        raise UnsupportedError(
            "a StyleGAN3 generator (alias-free layers); only StyleGAN2's can be converted"
        )
    if network.class_name.lower() != kind:
        raise UnsupportedError(f"a network of class {network.class_name!r}, not {kind.title()}")
    settings = list(flat_settings(_mapping(network.state.get("_init_kwargs", {}))))
    for path, part in parts.items():
        settings += _attributes(path, part)
    facts = check(settings, kind)
    tensors = {
        f"{path}.{name}".lstrip("."): value
        for path, part in parts.items()
        for group in ("_parameters", "_buffers")
        for name, value in _mapping(part.state.get(group, {})).items()
        if value is not None
    }
    return _without_filters(_tensors(tensors)), facts


def _tensors(values: Mapping[str, Any]) -> Tensors:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"damaged: {name} is {type(value).__name__}, no tensor")
    return dict(values)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnsupportedError(f"damaged: {type(value).__name__} instead of a dict")
    return value


def _parts(network: Persistent) -> Iterator[tuple[str, Persistent]]:
    """A network and all its modules by path; each once, so that no loop is endless."""
    waiting, seen = [("", network)], {id(network)}
    while waiting:
        path, part = waiting.pop()
        yield path, part
        for name, child in _mapping(part.state.get("_modules", {})).items():
            if child is None:
                continue
            if not isinstance(child, Persistent) or id(child) in seen:
                raise UnsupportedError(f"damaged: its part {path}.{name} is no module of its own")
            seen.add(id(child))
            waiting.append((f"{path}.{name}".lstrip("."), child))


def _attributes(path: str, part: Persistent) -> Iterator[Setting]:
    """What a module does at run time, by its own attributes."""
    last = path.rpartition(".")[2]
    for name in ("c_dim", "cmap_dim", "img_channels", "architecture", "use_noise", "conv_clamp"):
        if name in part.state:
            yield name, part.state[name]
    if "activation" in part.state and last not in ("affine", "skip", "out"):
        yield "activation", part.state["activation"]
    if path.startswith("mapping.fc") and "bias_gain" in part.state:
        yield "lr_multiplier", part.state["bias_gain"]
    if last == "mbstd":
        yield "mbstd_group_size", part.state.get("group_size", 4)
        yield "mbstd_num_channels", part.state.get("num_channels", 1)


def _without_filters(tensors: Tensors) -> Tensors:
    """Leave out the stored filters, which are all the same here.

    Raises:
        UnsupportedError: one is another.
    """
    for name in [name for name in tensors if name.endswith("resample_filter")]:
        taps = tensors.pop(name).float()
        if taps.shape != (4, 4) or not torch.allclose(taps, make_kernel(), atol=1e-6):
            raise UnsupportedError(f"{name} is not made of [1, 3, 3, 1], the only filter here")
    return tensors


def _of_tensorflow(network: TensorFlowNetwork, kind: Kind) -> tuple[Tensors, Facts]:
    """Tensors and settings of a TensorFlow network and its components.

    Raises:
        UnsupportedError: it is of another architecture.
    """
    components = _mapping(network.state.get("components", {}))
    networks = [("", network), *((f"{name}/", part) for name, part in components.items())]
    settings: list[Setting] = []
    tensors: Tensors = {}
    for prefix, part in networks:
        if not isinstance(part, TensorFlowNetwork):
            raise UnsupportedError(f"damaged: its component {prefix} is no network")
        version = part.state.get("version")
        if type(version) is not int or version < 4:
            raise UnsupportedError(f"version {version!r} of the format; StyleGAN2's is 4 or later")
        settings += flat_settings(_mapping(part.state.get("static_kwargs", {})))
        for name, value in part.state.get("variables", ()):
            if isinstance(value, Array):
                tensors[prefix + name] = torch.from_numpy(value.values)
            else:  # a NumPy scalar
                tensors[prefix + name] = torch.tensor(float(value))
    old = [name for name in tensors if "ToRGB_lod" in name or "FromRGB_lod" in name]
    if old:
        raise UnsupportedError(f"its layer {old[0]} is of configurations A to D, which grow")
    facts = check(settings, kind)
    tensors.pop("lod", None)  # the level of detail of growing networks, 0 and unused
    return tensors, facts
