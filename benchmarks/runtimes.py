"""The same generator in several runtimes: ours, PyTorch's compiler, ONNX Runtime, OpenVINO.

``python -m benchmarks.runtimes [--only pruned,compressed] [--threads N]``. From w+ to images with
the stored noise, at batch 1 and 8: the 256 px generator, full size and pruned by 0.7, with random
weights, on which speed does not depend; and the bundled 64 px models. Every runtime's images are
compared with those of PyTorch's own operators: by the largest difference in grey levels and by the
peak signal-to-noise ratio. The time of the processor, summed over threads, is beside that on the
clock; with one thread the two agree unless the machine is busy, and "/ prepared" is of the former,
against "ours prepared": `Generator.prepare("float32")`. A runtime that is missing or fails is named
and left out.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.jobs import frozen, generator
from benchmarks.timing import (
    Measurement,
    Timing,
    interleaved_by,
    milliseconds,
    run_benchmark,
    some_of,
    table,
)
from Evaluation.sampling import draw_z
from Model import bundled
from Model.checkpoint import load_generator
from Model.generator import Generator
from Model.onnx import (
    LARGEST_DIFFERENCE,
    Form,
    Parity,
    agreement,
    check_packages,
    plain_operators,
    to_onnx,
)
from Util.settings import setting

MODELS: dict[str, Callable[[], Generator]] = {
    "full": partial(generator, 256),
    "pruned": partial(generator, 256, 0.7),
    "teacher": partial(load_generator, bundled.MODEL),
    "compressed": partial(load_generator, bundled.COMPRESSED),
}
Images = Callable[[Tensor], np.ndarray]
"""w+ (N, n_latent, style_dim) -> images (N, 3, size, size)."""
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings(Measurement):
    """What is measured."""

    only: tuple[str, ...] = some_of(MODELS)
    batches: tuple[int, ...] = setting((1, 8), "images at a time", low=1, nargs="+", metavar="N")


class FromW(nn.Module):
    """w+ -> images, with the stored noise."""

    def __init__(self, network: Generator) -> None:
        super().__init__()
        self.network = network

    def forward(self, w_plus: Tensor) -> Tensor:
        """Images of w+."""
        return self.network([w_plus], input_is_latent=True, randomize_noise=False)


@torch.no_grad()
def by_pytorch(network: Callable[[Tensor], Tensor], w_plus: Tensor) -> np.ndarray:
    """Images by PyTorch, with the operators of this project."""
    return network(w_plus).numpy()


def plainly(run: Images) -> Images:
    """The same with PyTorch's own operators."""

    def plain(w_plus: Tensor) -> np.ndarray:
        with plain_operators():
            return run(w_plus)

    return plain


def compiled(network: Generator) -> Images:
    """PyTorch's compiler, on PyTorch's operators: it cannot look into ours."""
    return plainly(partial(by_pytorch, torch.compile(FromW(network), dynamic=False)))


def onnx_runtime(file: Path) -> Images:
    """ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    psi = np.ones(1, np.float32)
    return lambda w_plus: session.run(None, {"w_plus": w_plus.numpy(), "psi": psi})[0]


def openvino(file: Path, precision: str) -> Images:
    """OpenVINO on the CPU, with as many threads as PyTorch has; compiled for every batch size.

    Raises:
        ValueError: the processor lacks the precision.
    """
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    import openvino as ov

    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("this processor has no bfloat16")
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    psi, models = np.ones(1, np.float32), {}

    def run(w_plus: Tensor) -> np.ndarray:
        shape = tuple(w_plus.shape)
        if shape not in models:
            model = core.read_model(file)
            model.reshape({"w_plus": shape, "psi": (1,)})
            models[shape] = core.compile_model(model, "CPU", settings)
        return models[shape]({"w_plus": w_plus.numpy(), "psi": psi})[0]

    return run


def runtimes(network: Generator, folder: Path) -> Iterator[tuple[str, Callable[[], Images]]]:
    """What makes each runtime, ours first."""
    ours = partial(by_pytorch, FromW(network))
    yield "ours", lambda: ours
    for name, precision in (("ours prepared", "float32"), ("ours bf16", "bf16")):
        prepared = FromW(deepcopy(network).prepare(precision))
        yield name, partial(partial, by_pytorch, prepared)
    yield "PyTorch alone", lambda: plainly(ours)
    yield "torch.compile", partial(compiled, network)
    try:
        check_packages()
    except ValueError as error:
        print(f"left out: all that runs ONNX files ({error})", file=sys.stderr)
        return
    file = folder / "generator.onnx"
    w_mean = torch.zeros(1, network.style_dim)
    file.write_bytes(to_onnx(network, w_mean, Form(input="w_plus")).SerializeToString())
    yield "ONNX Runtime", partial(onnx_runtime, file)
    yield "OpenVINO fp32", partial(openvino, file, "f32")
    yield "OpenVINO bf16", partial(openvino, file, "bf16")


def working(network: Generator, folder: Path, latents: Sequence[Tensor]) -> dict[str, Images]:
    """The runtimes that take these latents; what does not work is told on standard error."""
    found = {}
    for name, make in runtimes(network, folder):
        try:
            run = make()
            for w_plus in latents:
                run(w_plus)
            found[name] = run
        except Exception as error:  # a runtime may fail in its own ways
            reason = str(error).strip().splitlines() or [type(error).__name__]
            print(f"left out: {name} ({reason[0][:200]})", file=sys.stderr)
    return found


def distance(images: np.ndarray, expected: np.ndarray) -> Parity:
    """How far images are from others."""
    return agreement((torch.from_numpy(images), torch.from_numpy(expected)))


def differences(found: dict[str, Images], w_plus: Tensor) -> dict[str, Parity]:
    """How far every runtime's images are from those of PyTorch's own operators.

    Raises:
        ValueError: a runtime that computes in float32 does not make the same images.
    """
    images = {name: run(w_plus) for name, run in found.items()}
    result = {name: distance(made, images["PyTorch alone"]) for name, made in images.items()}
    for name, parity in result.items():
        if not parity.largest <= LARGEST_DIFFERENCE[False] and "bf16" not in name:
            raise ValueError(f"{name}: differs from PyTorch's images by up to {parity.largest:.2g}")
    return result


def compare(label: str, settings: RuntimeSettings) -> Iterator[Result]:
    """Time all runtimes on one model, at every batch size."""
    network = frozen(MODELS[label]())
    latents = [network.w_plus([draw_z(network, range(n), seed=0)]) for n in settings.batches]
    latents = [w_plus.contiguous() for w_plus in latents]
    with TemporaryDirectory() as folder:
        found = working(network, Path(folder), latents)
        for w_plus in latents:
            parity = differences(found, w_plus)
            variants = {name: partial(run, w_plus) for name, run in found.items()}
            clocks = time.perf_counter, time.process_time
            times = interleaved_by(clocks, variants, settings.rounds)
            for name, (wall, cpu) in times.items():
                yield {
                    "model": label,
                    "batch": len(w_plus),
                    "runtime": name,
                    "wall": asdict(wall),
                    "cpu": asdict(cpu),
                    "ratio": cpu.median / times["ours prepared"][1].median,
                    **asdict(parity[name]),
                }


def row(result: Result) -> list[str]:
    """A line of the table."""
    return [
        f"{result['model']}, batch {result['batch']}",
        result["runtime"],
        milliseconds(Timing(**result["wall"])),
        f"{1e3 * result['cpu']['median']:.2f}",
        f"{result['ratio']:.2f}",
        f"{127.5 * result['largest']:.2g} ({result['psnr']:.0f})",
    ]


def measure(settings: RuntimeSettings) -> list[Result]:
    """Print a table of the runtimes; return its figures."""
    results: list[Result] = []
    for label in settings.only:
        for result in compare(label, settings):
            results.append(result)
            print(row(result), file=sys.stderr, flush=True)
    head = ("model", "runtime", "ms", "processor ms", "/ prepared", "grey levels off (dB)")
    print(table(head, [row(result) for result in results]))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_benchmark(
        RuntimeSettings, measure, argv, "runtimes", "The same generator in several runtimes."
    )


if __name__ == "__main__":
    sys.exit(main())
