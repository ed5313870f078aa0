"""Generators as ONNX files, for runtimes that know nothing of PyTorch.

A file computes what `Generator.forward` does, truncation included, for any batch size. It is
exported from the plain PyTorch operators, so it needs none of the compiled ones, and it is compared
with PyTorch before it gets its name. What this needs beyond requirements.txt is in
requirements-export.txt.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor, nn

from Model.complexity import LayerCost, layer_costs
from Model.generator import Generator
from Model.ops.dispatch import VARIABLE
from Util.files import atomic_path
from Util.settings import SettingError, Settings, setting

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

NEEDED = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
LARGEST_DIFFERENCE = {False: 1e-3, True: 0.05}
"""What a file may differ from PyTorch by, without and with half, where values reach 1 or less."""
STORED_IN_HALF = 256
"""Constants of fewer values stay in float32."""


@dataclass(frozen=True, kw_only=True)
class Form(Settings):
    """What an ONNX file takes and gives.

    Inputs are float32: ``z`` (N, style_dim) or ``w_plus`` (N, n_latent, style_dim); ``psi`` (1,),
    the truncation; with ``noise="input"`` also ``noise_0``, ``noise_1``, ... (N, 1, h, w). The
    output is ``image`` (N, 3, size, size), nominally in [-1, 1]. The mapping network alone has
    ``z`` and ``w`` (N, style_dim), without truncation.
    """

    input: str = setting(
        "z",
        "what images are made of: z, or w_plus with a w for each layer",
        choices=("z", "w_plus"),
    )
    output: str = setting(
        "image", "image, or w for the mapping network alone", choices=("image", "w")
    )
    noise: str = setting(
        "fixed", "layer noise: fixed, the stored maps, or input", choices=("fixed", "input")
    )
    half: bool = setting(
        False, "store weights and compute convolutions in float16; inputs and output stay float32"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output == "w" and (self.input, self.noise, self.half) != ("z", "fixed", False):
            raise SettingError(
                "output", "w: the mapping network has the input z alone and stays in float32"
            )


@dataclass(frozen=True)
class Parity:
    """How far a file's output is from PyTorch's, over a few latents, batch sizes and psi.

    Attributes:
        largest: absolute difference; times 127.5 it is in grey levels of an image.
        psnr: peak signal-to-noise ratio in dB for values in [-1, 1].
    """

    largest: float
    psnr: float


class _Images(nn.Module):
    """Latents and psi -> images: what is traced."""

    w_mean: Tensor

    def __init__(self, generator: Generator, w_mean: Tensor, form: Form) -> None:
        super().__init__()
        self.generator, self.form = generator, form
        self.register_buffer("w_mean", w_mean)

    def forward(self, latent: Tensor, psi: Tensor, noise: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.float16) if self.form.half else nullcontext():
            w = self.generator.mapping(latent) if self.form.input == "z" else latent
            w = self.w_mean + psi * (w - self.w_mean)  # `truncate`, for any psi
            maps = noise or None
            return self.generator([w], input_is_latent=True, noise=maps, randomize_noise=False)


def check_packages() -> None:
    """Find out that packages are missing before any work is done.

    Raises:
        ValueError: names them and says how they are installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX files need {', '.join(missing)}; pip install -r requirements-export.txt"
        )


@contextmanager
def plain_operators() -> Iterator[None]:
    """Make the operators those of PyTorch alone, which is all that other runtimes know."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def _draw(generator: Generator, form: Form, batch: int) -> dict[str, Tensor]:
    """Random inputs of a file, all but psi, by name."""
    random = torch.Generator().manual_seed(batch)
    latent: Tensor = torch.randn(batch, generator.style_dim, generator=random)
    if form.input == "w_plus":
        latent = generator.w_plus([latent]).contiguous()
    maps = generator.fixed_noise if form.noise == "input" else []
    noise = [torch.randn(batch, *m.shape[1:], generator=random) for m in maps]
    return {form.input: latent, **{f"noise_{i}": map_ for i, map_ in enumerate(noise)}}


@torch.no_grad()
def to_onnx(generator: Generator, w_mean: Tensor, form: Form) -> "ModelProto":
    """Convert a generator, or its mapping network.

    Args:
        generator: on the CPU.
        w_mean: (1, style_dim), what truncation moves w towards; it is stored in the file.
        form: what the file takes and gives.

    Raises:
        ValueError: packages are missing.
    """
    check_packages()
    batch = {0: torch.export.Dim("batch")}
    draws = _draw(generator, form, 2)
    latent, *noise = draws.values()
    network: nn.Module = generator.style
    names, inputs, shapes = list(draws), (latent,), (batch,)
    if form.output == "image":
        network = _Images(generator, w_mean, form)
        names.insert(1, "psi")
        inputs = (latent, torch.ones(1), noise)  # type: ignore[assignment]
        shapes = (batch, None, [batch] * len(noise))  # type: ignore[assignment]
    with catch_warnings(), plain_operators():
        simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            inputs,
            input_names=names,
            output_names=[form.output],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _tidy(model)
    if form.half:
        _store_in_half(model)
    return model


def _tidy(model: "ModelProto") -> None:
    """Drop what tells of the machine that exported: source files and lines of every node."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
    foreign = sorted({node.op_type for node in graph.node if node.domain not in ("", "ai.onnx")})
    assert not foreign, f"operators that no runtime knows: {foreign}"


def _store_in_half(model: "ModelProto") -> None:
    """Store the larger constants in float16; what computes in float32 gets them converted."""
    from onnx import TensorProto, helper, numpy_helper

    def halved(tensor: "TensorProto") -> "TensorProto":
        values = numpy_helper.to_array(tensor).astype(np.float16)
        return numpy_helper.from_array(values, f"{tensor.name}.half")

    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) >= STORED_IN_HALF:
            name = tensor.name
            tensor.CopyFrom(halved(tensor))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def costs(generator: Generator, form: Form) -> list[LayerCost]:
    """Costs of the layers that a file holds."""
    mapping, *synthesis = layer_costs(generator)
    if form.output == "w":
        return [mapping]
    return [mapping, *synthesis] if form.input == "z" else synthesis


def describe(generator: Generator, form: Form, licence: str, source: str) -> dict[str, str]:
    """What a file says of itself, as text by name."""
    layers = costs(generator, form)
    return {
        "size": str(generator.size),
        "macs": str(sum(layer.macs for layer in layers)),
        "parameters": str(sum(layer.parameters for layer in layers)),
        "input": form.input,
        "output": form.output,
        "noise": form.noise,
        "precision": "float16" if form.half else "float32",
        "licence": licence,
        "source": source,
    }


@torch.no_grad()
def parity(file: Path, generator: Generator, w_mean: Tensor, form: Form) -> Parity:
    """Compare a file, run by ONNX Runtime on the CPU, with the generator as PyTorch runs it."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3  # that a processor has no float16 arithmetic is no news
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    pairs = []
    for batch, psi in ((1, 1.0), (3, 0.5)):
        draws = _draw(generator, form, batch)
        latent, *noise = draws.values()
        if form.output == "w":
            expected = generator.mapping(latent)
        else:
            expected = generator(
                [latent],
                truncation=psi,
                truncation_latent=w_mean,
                input_is_latent=form.input == "w_plus",
                noise=noise or None,
                randomize_noise=False,
            )
            draws["psi"] = torch.full((1,), psi)
        (found,) = session.run(None, {name: value.numpy() for name, value in draws.items()})
        pairs.append((torch.from_numpy(found), expected))
    return agreement(*pairs)


def agreement(*pairs: tuple[Tensor, Tensor]) -> Parity:
    """How far values that were found are from those that were expected, in pairs."""
    scaled = [((found - expected) / _scale(expected)).flatten() for found, expected in pairs]
    difference = torch.cat(scaled)
    rms = difference.square().mean().sqrt().item()
    return Parity(difference.abs().max().item(), 20 * math.log10(2 / max(rms, 1e-12)))


def _scale(values: Tensor) -> float:
    """1 for images of a trained model; the largest value where values go far beyond."""
    largest = values.abs().max().item()
    return largest if largest > 4 else 1.0


def save_onnx(
    path: str | os.PathLike[str],
    generator: Generator,
    w_mean: Tensor,
    form: Form,
    about: Mapping[str, str],
) -> Parity:
    """Write a file atomically, if it agrees with PyTorch.

    Args:
        path: target; missing folders are made.
        generator: on the CPU.
        w_mean: (1, style_dim), see `to_onnx`.
        form: what the file takes and gives.
        about: what it says of itself, see `describe`.

    Raises:
        ValueError: packages are missing, or the file disagrees; what was there is still there.
        OSError: it could not be written.
    """
    model = to_onnx(generator, w_mean, form)
    from onnx import checker, helper, save_model

    helper.set_model_props(model, dict(about))
    with atomic_path(path) as temporary:
        save_model(model, temporary)
        checker.check_model(temporary, full_check=True)
        found = parity(temporary, generator, w_mean, form)
        if not found.largest <= LARGEST_DIFFERENCE[form.half]:
            raise ValueError(
                f"{path}: not written, ONNX Runtime's result differs from PyTorch's by up to"
                f" {found.largest:.2g}, more than {LARGEST_DIFFERENCE[form.half]:g}"
            )
    return found
