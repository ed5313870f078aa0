"""Runtimes on the same generator: this project's operators, torch.compile, ONNX Runtime, OpenVINO.

``python -m benchmarks.runtimes [--only pruned] [--threads N]``. The 256 px generator, full size and
pruned by 0.7, from w+ to images with the stored noise, at batch 1 and 8. Weights are random: speed
does not depend on them. Every runtime's images are compared with ours. A runtime whose package is
missing, or that fails, is named and left out.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.jobs import frozen, generator
from benchmarks.timing import Timing, interleaved, machine, milliseconds, parser, table, write_json
from Model.generator import Generator
from Model.onnx import Form, check_packages, plain_operators, to_onnx
from Util.device import pick_device

RATIOS = {"full": 0.0, "pruned": 0.7}
BATCHES = (1, 8)
Images = Callable[[Tensor], np.ndarray]
"""w+ (N, n_latent, style_dim) -> images (N, 3, size, size)."""
Result = dict[str, Any]


class _FromW(nn.Module):
    """w+ -> images, with the stored noise."""

    def __init__(self, network: Generator) -> None:
        super().__init__()
        self.network = network

    def forward(self, w_plus: Tensor) -> Tensor:
        return self.network([w_plus], input_is_latent=True, randomize_noise=False)


@torch.no_grad()
def _by_pytorch(network: Callable[[Tensor], Tensor], w_plus: Tensor) -> np.ndarray:
    return network(w_plus).numpy()


def compiled(network: Generator) -> Images:
    """PyTorch's compiler, on the plain operators: it cannot look into ours."""
    run = partial(_by_pytorch, torch.compile(_FromW(network)))
    with plain_operators():
        for batch in BATCHES:  # it compiles on the first call of every shape
            run(torch.randn(batch, network.n_latent, network.style_dim))
    return run


def onnx_runtime(file: Path) -> Images:
    """ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    psi = np.ones(1, np.float32)
    return lambda w_plus: session.run(None, {"w_plus": w_plus.numpy(), "psi": psi})[0]


def openvino(file: Path, precision: str) -> Images:
    """OpenVINO on the CPU, with as many threads as PyTorch has.

    Raises:
        ValueError: the processor lacks the precision.
    """
    import openvino as ov

    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("this processor has no bfloat16")
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(file), "CPU", settings)
    psi = np.ones(1, np.float32)
    return lambda w_plus: model({"w_plus": w_plus.numpy(), "psi": psi})[0]


def runtimes(network: Generator, folder: Path) -> Iterator[tuple[str, Images]]:
    """All runtimes that work here, ours first; what does not is told on standard error."""
    yield "ours", partial(_by_pytorch, _FromW(network))
    file = folder / "generator.onnx"
    makers: dict[str, Callable[[], Images]] = {"torch.compile": partial(compiled, network)}
    try:
        check_packages()
        w_mean = torch.zeros(1, network.style_dim)
        file.write_bytes(to_onnx(network, w_mean, Form(input="w_plus")).SerializeToString())
    except ValueError as error:
        print(f"left out: ONNX files ({error})", file=sys.stderr)
    else:
        makers["ONNX Runtime"] = partial(onnx_runtime, file)
        makers["OpenVINO fp32"] = partial(openvino, file, "f32")
        makers["OpenVINO bf16"] = partial(openvino, file, "bf16")
    for name, make in makers.items():
        try:
            yield name, make()
        except Exception as error:  # a runtime may fail in its own ways
            print(f"left out: {name} ({str(error).splitlines()[0][:200]})", file=sys.stderr)


def compare(label: str, rounds: int) -> Iterator[Result]:
    """Time all runtimes on one model, at every batch size."""
    network = frozen(generator(256, RATIOS[label]))
    with TemporaryDirectory() as folder:
        found = dict(runtimes(network, Path(folder)))
    for batch in BATCHES:
        w_plus = torch.randn(batch, network.n_latent, network.style_dim)
        images = {name: run(w_plus) for name, run in found.items()}
        times = interleaved({name: partial(run, w_plus) for name, run in found.items()}, rounds)
        # Images of random weights may go beyond [-1, 1]; their largest value counts as 1.
        grey = 127.5 / np.abs(images["ours"]).max()
        for name, timing in times.items():
            yield {
                "model": label,
                "batch": batch,
                "runtime": name,
                "time": asdict(timing),
                "ratio": timing.median / times["ours"].median,
                "difference": float(grey * np.abs(images[name] - images["ours"]).max()),
            }


def row(result: Result) -> list[str]:
    """A line of the table."""
    return [
        f"{result['model']}, batch {result['batch']}",
        result["runtime"],
        milliseconds(Timing(**result["time"])),
        f"{result['ratio']:.2f}",
        f"{result['difference']:.2g}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON if asked."""
    flags = parser("The same generator in several runtimes.", RATIOS)
    options = flags.parse_args(argv)
    pick_device("cpu")
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    print(machine("cpu"))
    results: list[Result] = []
    for label in options.only:
        for result in compare(label, options.rounds):
            results.append(result)
            print(row(result), file=sys.stderr, flush=True)
    head = ("256 px", "runtime", "ms", "/ ours", "largest difference (grey levels)")
    print(table(head, [row(result) for result in results]))
    write_json(options.json, "cpu", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
