"""The compiled operators against plain PyTorch and against the textbook forms.

``python -m benchmarks.operators [--threads N] [--json FILE]``

Three ways of each operator, at the sizes of the 256 px generator (its last layers, and one of 64
px), full and pruned by 0.7:

- textbook: what the definition says, one pass after another. A filter inserts zeros, pads, and
  convolves every channel as an image of its own; an epilogue is one PyTorch operation for each of
  demodulation, noise, bias, leaky ReLU and gain.
- reference: ``impl="reference"``, the best this project knows to do with PyTorch's operations.
- native: ``impl="native"``.

On a CPU also the 3x3 layer with style and epilogue, whose textbook form modulates the weights.

Each is set beside a copy of the result's size: the roof for anything that reads and writes every
value once. GB/s counts one read of the input and one write of the output.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import textbook
from benchmarks.timing import (
    OneThread,
    Timing,
    interleaved,
    milliseconds,
    run_benchmark,
    table,
)
from Model.ops import (
    Epilogue,
    apply_epilogue,
    filtered_leaky_relu,
    make_kernel,
    styled_conv3x3,
    upfirdn2d,
)
from Model.ops.dispatch import Impl
from Util.settings import setting

# Batch, channels and side: last layers of the 256 px generator, full size and pruned by 0.7.
SHAPES = ((1, 128, 256), (1, 512, 64), (1, 39, 256), (1, 77, 128), (1, 154, 64), (16, 39, 64))
GAIN = 2**0.5


@dataclass(frozen=True, kw_only=True)
class OperatorSettings(OneThread):
    """Where the operators run, and what is counted as their time."""

    device: str = setting("auto", "auto, cpu, cuda or cuda:N", metavar="DEV")


@dataclass(frozen=True)
class Operation:
    """One operation in its three forms, each a function of (x, impl); impl None is the textbook."""

    name: str
    x: Tensor
    run: Callable[[Tensor, Impl | None], Tensor]


def textbook_epilogue(
    x: Tensor, bias: Tensor, noise: Tensor, strength: Tensor, gain: Tensor
) -> Tensor:
    """Demodulate, add noise and bias, apply leaky ReLU and gain, each over all of memory."""
    y = x * gain[:, :, None, None]
    y = y + strength * noise
    y = y + bias.view(1, -1, 1, 1)
    return F.leaky_relu(y, 0.2) * GAIN


def layer(n: int, c: int, side: int) -> Operation:
    """Make a styled convolution with (n, c, side, side) activations, on the CPU."""
    x = torch.randn(n, c, side, side).contiguous(memory_format=torch.channels_last)
    weight, style = torch.randn(c, c, 3, 3) / (3 * c**0.5), torch.randn(n, c)
    bias, noise, strength = torch.randn(c), torch.randn(n, 1, side, side), torch.randn(1)
    gain = torch.randn(n, c)

    def run(x: Tensor, impl: Impl | None) -> Tensor:
        if impl is None:
            modulated = (weight * style.view(n, 1, c, 1, 1)).flatten(0, 1)
            y = F.conv2d(x.reshape(1, n * c, side, side), modulated, padding=1, groups=n)
            return textbook_epilogue(y.view(n, c, side, side), bias, noise, strength, gain)
        return styled_conv3x3(x, weight, style, Epilogue(bias, noise, strength, gain), impl)

    return Operation("3x3 layer", x, run)


def operations(n: int, c: int, side: int, device: str) -> list[Operation]:
    """Make the operations of a layer with (n, c, side, side) activations."""

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device)
        last = device == "cpu" and x.ndim == 4
        return x.contiguous(memory_format=torch.channels_last) if last else x

    bias, noise, strength, gain = randn(c), randn(n, 1, side, side), randn(1), randn(n, c)
    kernel = make_kernel(gain=4.0).to(device)
    parameters = Epilogue(bias, noise, strength, gain)

    def epilogue(x: Tensor, impl: Impl | None) -> Tensor:
        if impl is None:
            return textbook_epilogue(x, bias, noise, strength, gain)
        return apply_epilogue(x, parameters, impl)

    def resample(x: Tensor, impl: Impl | None, up: int, down: int, pad: tuple[int, int]) -> Tensor:
        if impl is None:
            return textbook.upfirdn2d(x, kernel, up, down, pad)
        return upfirdn2d(x, kernel, up, down, pad, impl)

    def both(x: Tensor, impl: Impl | None) -> Tensor:
        if impl is None:
            return epilogue(resample(x, None, 1, 1, (1, 1)), None)
        return filtered_leaky_relu(x, kernel, (1, 1), parameters, impl)

    def sampled(up: int, down: int, pad: tuple[int, int]) -> Callable[..., Tensor]:
        return functools.partial(resample, up=up, down=down, pad=pad)

    odd = randn(n, c, side + 1, side + 1)
    return [
        Operation("epilogue", randn(n, c, side, side), epilogue),
        Operation("blur", odd, sampled(1, 1, (1, 1))),
        Operation("blur + epilogue", odd, both),
        Operation("down 2", randn(n, c, side, side), sampled(1, 2, (1, 1))),
        Operation("up 2 (RGB)", randn(n, 3, side // 2, side // 2), sampled(2, 1, (2, 1))),
    ]


def timed(
    operation: Operation, rounds: int, device: str, clock: Callable[[], float]
) -> dict[str, dict[str, Timing]]:
    """Time the three forms and a copy, forward and forward with backward."""
    # Each in its own layout: the textbook's forms are written for PyTorch's default.
    inputs = {"textbook": operation.x.contiguous()}
    forms: dict[str, Impl | None]
    forms = {"textbook": None, "reference": "reference", "native": "native"}

    def forward(name: str) -> None:
        with torch.no_grad():
            operation.run(inputs.get(name, operation.x), forms[name])

    wanted = {name: inputs.get(name, operation.x).detach().requires_grad_() for name in forms}
    y = operation.run(operation.x, "reference")
    source, target, direction = torch.randn_like(y), torch.empty_like(y), torch.randn_like(y)

    def backward(name: str) -> None:
        torch.autograd.grad(operation.run(wanted[name], forms[name]), wanted[name], direction)

    once: dict[str, Callable[[], object]]
    once = {name: functools.partial(forward, name) for name in forms}
    once["copy"] = lambda: target.copy_(source)
    twice = {name: functools.partial(backward, name) for name in forms}
    return {
        "forward": interleaved(once, rounds, device, clock=clock),
        "forward + backward": interleaved(twice, rounds, device, clock=clock),
    }


def row(
    operation: Operation, shape: tuple[int, ...], way: str, times: dict[str, Timing]
) -> dict[str, object]:
    """Make a line of the result: times, ratios, and bytes per second where a copy is there."""
    native = times["native"].median
    result: dict[str, object] = {
        "operation": operation.name,
        "shape": shape,
        "pass": way,
        "seconds": {name: asdict(timing) for name, timing in times.items()},
        "textbook / native": times["textbook"].median / native,
        "reference / native": times["reference"].median / native,
    }
    if "copy" in times:
        y = operation.run(operation.x, "reference")
        moved = (operation.x.numel() + y.numel()) * y.element_size()
        result["GB/s"] = moved / native / 1e9
        result["copy GB/s"] = 2 * y.numel() * y.element_size() / times["copy"].median / 1e9
        result["native / copy"] = native / times["copy"].median
    return result


def measure(settings: OperatorSettings) -> list[dict[str, object]]:
    """Print a table of all operations; return its figures."""
    clock = settings.clock
    lines, results = [], []
    for n, c, side in SHAPES:
        layers = [layer(n, c, side)] if settings.device == "cpu" else []
        for operation in layers + operations(n, c, side, settings.device):
            shape = tuple(operation.x.shape)
            for way, times in timed(operation, settings.rounds, settings.device, clock).items():
                result = row(operation, shape, way, times)
                results.append(result)
                speed = (
                    f"{result['GB/s']:.1f} of {result['copy GB/s']:.1f}" if "GB/s" in result else ""
                )
                lines.append([
                    operation.name, "x".join(map(str, shape)), way,
                    *(milliseconds(times[k]) for k in ("textbook", "reference", "native")),
                    *(f"{result[f'{k} / native']:.1f}" for k in ("textbook", "reference")), speed,
                ])  # fmt: skip
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    head = ("operation", "input", "pass", "textbook ms", "reference ms", "native ms",
            "textbook / native", "reference / native", "GB/s, of a copy's")  # fmt: skip
    print(table(head, lines))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Speed of the compiled operators."
    return run_benchmark(OperatorSettings, measure, argv, "operators", what)


if __name__ == "__main__":
    sys.exit(main())
