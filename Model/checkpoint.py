"""Read and write network checkpoints: strictly, safely, atomically.

This is the only place where networks meet ``torch.load`` and ``torch.save``. Architectures are read
off the tensors, so a checkpoint needs no side file. Files are opened with ``weights_only=True``: a
pickle that would run code is refused, whoever made it. What a file claims is compared with what it
holds before memory is taken for it.
"""

import contextlib
import itertools
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from Model import nvidia
from Model.attribute_classifier import AttributeClassifier
from Model.discriminator import Discriminator
from Model.errors import CheckpointError
from Model.face_parser import BiSeNet
from Model.generator import Generator
from Util.files import atomic_path, unpacked_size
from Util.run_log import newest_checkpoint
from Util.streams import seeded

PathOrDict = str | os.PathLike[str] | Mapping[str, Any]
StateDict = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)

LARGEST_SIZE = 4096
"""Side in px of the largest images a generator's file may claim: its noise maps have that size."""


def file_of(path: str | os.PathLike[str]) -> Path:
    """Give the file that a path means: a training run's folder stands for its newest checkpoint."""
    path = Path(path)
    return (newest_checkpoint(path) if path.is_dir() else None) or path


def read(path: PathOrDict) -> dict[str, Any]:
    """Read a checkpoint into CPU memory without running any code from it.

    Args:
        path: a file, ours or NVIDIA's (`Model.nvidia`), a training run's folder, whose newest
            checkpoint is meant, or a dict that is returned as it is.

    Raises:
        CheckpointError: no such file, not a PyTorch file, damaged, or holding objects other than
            tensors and plain containers.
    """
    if isinstance(path, Mapping):
        return dict(path)
    path = file_of(path)
    _check_file(path)
    if nvidia.is_pickle(path):
        return nvidia.read(path)
    try:
        if zipfile.is_zipfile(path) and unpacked_size(path) > path.stat().st_size:
            raise ValueError("it would unpack to more than its size, but checkpoints are stored")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch finds odd about old or damaged files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = _unsafe_name(path, error)
        if not name:
            raise CheckpointError(f"{path}: no PyTorch checkpoint; name a .pt file") from None
        raise CheckpointError(
            f"{path}: refused, it holds something other than tensors and plain containers"
            f" ({name}); save it again as state dicts only"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise CheckpointError(
            f"{path}: not a whole PyTorch checkpoint ({reason}); copy it again, or name another"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dict of state dicts, found {type(content).__name__}"
        )
    return content


def _check_file(path: Path) -> None:
    """Refuse what is no file to read from, or a file of another kind that is easily taken for one.

    Raises:
        CheckpointError: names it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder without checkpoints; give a checkpoint (.pt)")
    if path.exists() and not path.is_file():
        raise CheckpointError(
            f"{path}: is a pipe or a device, but a checkpoint is read more than once; save it as a"
            " file first"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint (.pt)")
    if zipfile.is_zipfile(path) and _is_program(path):
        raise CheckpointError(
            f"{path}: is a TorchScript module, not a checkpoint of state dicts; only a parser may"
            " be one, with a JSON file beside it (Compression/parsers/script_module.py)"
        )


def _is_program(path: Path) -> bool:
    """Whether a zip archive holds a TorchScript module."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False


def _unsafe_name(path: PathOrDict, error: Exception) -> str:
    """Return the offending global of PyTorch's long message, else the pickle's first, if any."""
    text = str(error)
    match = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"class '?([\w.]+)", text)
    return match.group(1) if match else _first_global(Path(str(path)))


def _first_global(path: Path) -> str:
    """Return what a bare pickle would import first, without running it."""
    words: list[str] = []
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        for code, argument, _ in pickletools.genops(file):
            if code.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            words += [argument] if isinstance(argument, str) else []
    return ""


def _state_dict(source: PathOrDict, key: str, name: str = "") -> tuple[StateDict, str]:
    """Take one network's tensors and a name for messages out of a checkpoint."""
    content = read(source)
    name = name or ("checkpoint" if isinstance(source, Mapping) else str(source))
    state = content.get(key)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{name}: no network {key!r} in it; it holds {', '.join(map(str, content)) or 'none'}"
        )
    bad = [k for k, v in state.items() if not _is_plain(v)]
    if bad:
        raise CheckpointError(f"{name}: {key}.{bad[0]} is no tensor; this is not a state dict")
    state = {str(k): v for k, v in state.items()}
    _check_claims(state, f"{name}: {key}")
    if all(k.startswith("module.") for k in state):  # as saved from inside DataParallel
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state, f"{name}: {key}"


def _is_plain(value: Any) -> bool:
    """Return whether it is a tensor with all its values in memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _check_claims(state: StateDict, name: str) -> None:
    """Refuse tensors that repeat a few stored values: a small file could claim any size."""
    stored = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state.values()}
    if sum(v.nbytes for v in state.values()) > sum(stored.values()):
        raise CheckpointError(f"{name}: its tensors claim more values than are stored; refused")


def _shape(state: StateDict, key: str, dims: int, name: str) -> torch.Size:
    """Return the shape of a tensor that the architecture is read off."""
    if key not in state:
        raise CheckpointError(f"{name} has no tensor {key}; is this the right kind of network?")
    if state[key].ndim != dims:
        raise CheckpointError(f"{name}: {key} has shape {tuple(state[key].shape)}, not {dims}-D")
    return state[key].shape


def _count(state: StateDict, pattern: str, start: int = 0) -> int:
    """Count the indices from ``start`` on, without a gap, whose ``pattern`` names a tensor."""
    return next(n for n in itertools.count() if pattern.format(start + n) not in state)


def _check_tensors(own: Mapping[str, Tensor], state: StateDict, name: str, kind: str) -> None:
    """Refuse tensors that are missing, unexpected, of another shape or type, or not finite."""
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    for problem, keys in (("lacks", missing), ("has an unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{name} {problem} tensor {keys[0]}{more}; the file is damaged or"
                f" of another architecture than {kind}"
            )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            )
        if value.is_floating_point() != own[key].is_floating_point() or value.is_quantized:
            raise CheckpointError(f"{name}: {key} is {value.dtype}, expected {own[key].dtype}")
        if not value.to(own[key].dtype).isfinite().all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinite values")


def load_strict(network: nn.Module, state: StateDict, name: str) -> None:
    """Copy every tensor, in the network's own precision.

    Raises:
        CheckpointError: names a tensor that is missing, unexpected, unfit or not finite.
    """
    _check_tensors(network.state_dict(), state, name, type(network).__name__)
    network.load_state_dict(state)


def _build(
    make: Callable[[], Network], state: StateDict, name: str, optional: str = " "
) -> Network:
    """Make the network that a state dict describes, and fill it.

    It is made without memory first: what a file only claims to hold never takes any.

    Args:
        make: constructor with the sizes that were read off the tensors.
        state: its tensors.
        name: of the file, for messages.
        optional: prefix of tensors that stay as they are made (from a fixed seed) if none is there.
    """
    try:
        with torch.device("meta"):
            planned = make()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{name}: {str(error).splitlines()[0]}") from None
    own = planned.state_dict()
    if not any(key.startswith(optional) for key in state):
        own = {key: value for key, value in own.items() if not key.startswith(optional)}
    _check_tensors(own, state, name, type(planned).__name__)
    with seeded(0):
        network = make()
    network.load_state_dict(state, strict=False)
    return network


def load_generator(
    path_or_dict: PathOrDict,
    key: str = "g_ema",
    device: str | torch.device = "cpu",
    size: int | None = None,
    name: str = "",
) -> Generator:
    """Build the generator that a checkpoint holds, full-size or pruned.

    Older files lack the noise buffers ``noises.*``; these are then drawn from a fixed seed, so that
    two loads of one file agree. A ``latent_avg`` beside the networks is ignored.

    Args:
        path_or_dict: checkpoint file or dict.
        key: "g_ema" or "g".
        device: where the network goes.
        size: image side the caller expects; None accepts any.
        name: of a dict, for messages.

    Returns:
        The generator, in training mode and with gradients on.

    Raises:
        CheckpointError: see the module; also when the size is not the expected one.
    """
    state, name = _state_dict(path_or_dict, key, name)
    n_convs = _count(state, "convs.{}.conv.weight")
    widths = [_shape(state, "input.input", 4, name)[1]]
    for layer in ["conv1", *(f"convs.{i}" for i in range(n_convs))]:
        widths.append(_shape(state, f"{layer}.conv.weight", 5, name)[1])
    found_size = 2 ** (n_convs // 2 + 2)
    if found_size > LARGEST_SIZE:
        raise CheckpointError(f"{name} claims images of {found_size} px, more than {LARGEST_SIZE}")
    if size is not None and size != found_size:
        raise CheckpointError(f"{name} makes {found_size} px images, but {size} px were asked for")
    n_mlp = _count(state, "style.{}.weight", start=1)
    style_dim = _shape(state, "style.1.weight", 2, name)[0]
    kernel = _shape(state, "convs.1.conv.weight", 5, name)[4]

    def make() -> Generator:
        return Generator(found_size, style_dim, n_mlp, widths, second_kernel=kernel)

    network = _build(make, state, name, optional="noises.")
    return network.to(device)


def load_discriminator(
    source: PathOrDict, key: str = "d", device: str | torch.device = "cpu", name: str = ""
) -> Discriminator:
    """Build the discriminator that a checkpoint holds; see `load_generator`.

    Raises:
        CheckpointError: see the module.
    """
    state, name = _state_dict(source, key, name)
    n_blocks = _count(state, "convs.{}.conv1.0.weight", start=1)
    widths = [_shape(state, "convs.0.0.weight", 4, name)[0]]
    for i in range(1, n_blocks + 1):
        widths.append(_shape(state, f"convs.{i}.conv2.1.weight", 4, name)[0])
    network = _build(lambda: Discriminator(2 ** (n_blocks + 2), channels=widths[::-1]), state, name)
    return network.to(device)


def summary(content: Mapping[str, Any], name: str) -> list[str]:
    """Load every network of a checkpoint and say what it is, one line each.

    Args:
        content: of the checkpoint.
        name: its own, for messages.

    Raises:
        CheckpointError: one does not load.
    """
    lines = []
    for key in (key for key in ("g", "g_ema") if key in content):
        network = load_generator(content, key, name=name)
        widths = ", ".join(map(str, network.channels))
        lines.append(
            f"{key}: generator, {network.size} px, latents of {network.style_dim}, {network.n_mlp}"
            f" mapping layers, channels {widths}"
        )
    if "d" in content:
        lines.append(f"d: discriminator, {load_discriminator(content, name=name).size} px")
    return lines + (["latent_avg: mean w"] if "latent_avg" in content else [])


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= LARGEST_SIZE


def load_face_parser(source: PathOrDict, device: str | torch.device = "cpu") -> BiSeNet:
    """Build the face parser that a file holds, in evaluation mode and without gradients.

    The file is either the published bare state dict (``79999_iter.pth``), or
    ``{"parser": state dict, "config": {"n_classes", "width", "stem_stride", "input_size",
    "classes_excluded", "class_names"}}``. What a config lacks is as `BiSeNet` has it by default.

    Raises:
        CheckpointError: see the module.
    """
    content = read(source)
    name = "checkpoint" if isinstance(source, Mapping) else str(source)
    config: Any = {}
    if "parser" in content:
        config = content.get("config", {})
    elif networks := [key for key in ("g", "g_ema", "d") if key in content]:
        raise CheckpointError(f"{name}: holds {', '.join(networks)}, and no face parser")
    else:
        content = {"parser": content}
    state, name = _state_dict(content, "parser", name)
    n_classes = _shape(state, "conv_out.conv_out.weight", 4, name)[0]
    width = _shape(state, "cp.resnet.conv1.weight", 4, name)[0]
    if not isinstance(config, Mapping) or not _is_side(config.get("input_size", 1)):
        raise CheckpointError(f"{name}: its config does not fit ({str(config)[:80]})")
    network = _build(
        lambda: BiSeNet(**{**config, "n_classes": n_classes, "width": width}), state, name
    )
    return network.to(device).eval().requires_grad_(False)


def load_attribute_classifier(
    source: PathOrDict, device: str | torch.device = "cpu"
) -> AttributeClassifier:
    """Build the classifier that a file holds, in evaluation mode and without gradients.

    The file is ``{"classifier": state dict, "config": {"attributes": {name: [value, ...]},
    "inside": [name, ...]}}``; tensors may be in half precision.

    Raises:
        CheckpointError: see the module.
    """
    content = read(source)
    name = "checkpoint" if isinstance(source, Mapping) else str(source)
    state, name = _state_dict(content, "classifier", name)
    config: Any = content.get("config")
    if not _is_attribute_config(config):
        raise CheckpointError(f"{name}: its config does not fit ({str(config)[:80]})")
    network = _build(
        lambda: AttributeClassifier(config["attributes"], config["inside"]), state, name
    )
    return network.to(device).eval().requires_grad_(False)


def _is_attribute_config(config: Any) -> bool:
    """Return whether it maps names to lists of names, few enough to be heads of a network."""

    def names(value: Any) -> bool:
        few = isinstance(value, list) and len(value) <= 1000
        return few and all(isinstance(v, str) for v in value)

    if not isinstance(config, Mapping) or not names(config.get("inside")):
        return False
    attributes = config.get("attributes")
    return isinstance(attributes, Mapping) and all(
        isinstance(k, str) and k.isidentifier() and names(v) for k, v in attributes.items()
    )


def _on_cpu(content: Any) -> Any:
    """Move networks, as state dicts, and tensors to the CPU: torch.load asks for their device."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping):
        return {key: _on_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(_on_cpu, content))
    return content.detach().cpu() if isinstance(content, Tensor) else content


def save(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: a reader sees the old file or the whole new one.

    Args:
        path: target; missing folders are made.
        content: networks (`torch.nn.Module`, stored as CPU state dicts), state dicts, and plain
            containers of numbers, strings and tensors.

    Raises:
        OSError: the file could not be written; what was there is still there.
    """
    plain = _on_cpu(content)
    try:
        # By handle, or PyTorch would write the temporary file's name into it.
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(plain, file)
    except RuntimeError as error:  # PyTorch's words for a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{path}: could not be written ({reason}); is the disk full?") from error
