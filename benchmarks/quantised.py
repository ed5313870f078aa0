"""What int8 would do to a generator: size, distance from PyTorch's images, and time.

``python -m benchmarks.quantised [--threads N]``. The bundled model by ONNX Runtime: in float32, in
float16 as ``export_onnx.py --half`` stores them, and quantised by ONNX Runtime's own tools: weights
in int8 per output channel, activations in uint8 with ranges found while the model runs ("dynamic")
or from 64 calibration latents by three methods ("static"). This is why export_onnx.py has no int8.
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.jobs import frozen
from benchmarks.runtimes import FromW, by_pytorch, distance, onnx_runtime
from benchmarks.timing import Measurement, interleaved, run_benchmark, table
from Evaluation.sampling import draw_z, mean_latent
from Model import bundled
from Model.checkpoint import load_generator
from Model.generator import Generator
from Model.onnx import Form, check_packages, to_onnx

CALIBRATION, COMPARED = 64, 32
"""Numbers of latents."""
METHODS = ("MinMax", "Percentile", "Entropy")
OPERATORS = ["Conv", "Gemm", "MatMul"]
Result = dict[str, Any]


def dynamic(source: Path, target: Path) -> None:
    """Quantise; activations get their ranges while the model runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, OPERATORS, per_channel=True, weight_type=QuantType.QInt8)


def static(source: Path, target: Path, method: str, latents: np.ndarray) -> None:
    """Quantise with the ranges that activations have on some latents, found by a method."""
    from onnxruntime import quantization as q

    inputs = iter([{"w_plus": w[None], "psi": np.ones(1, np.float32)} for w in latents])

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(inputs, None)

    q.quantize_static(
        source,
        target,
        Reader(),
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=getattr(q.CalibrationMethod, method),
    )


def variants(network: Generator, folder: Path) -> dict[str, Path]:
    """Write the generator's files."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    w_mean = mean_latent(network, seed=0)
    files = {name: folder / f"{name}.onnx" for name in ("float32", "float16")}
    for name, file in files.items():
        form = Form(input="w_plus", half=name == "float16")
        file.write_bytes(to_onnx(network, w_mean, form).SerializeToString())
    prepared = folder / "prepared.onnx"
    latents = network.w_plus([draw_z(network, range(CALIBRATION), seed=1)]).numpy()
    ways: dict[str, Callable[[Path, Path], None]] = {"int8 dynamic": dynamic}
    ways |= {f"int8 static, {m}": partial(static, method=m, latents=latents) for m in METHODS}
    with contextlib.redirect_stdout(io.StringIO()):  # the tools report every step
        quant_pre_process(files["float32"], prepared, skip_symbolic_shape=True)
        for name, way in ways.items():
            files[name] = folder / f"{name}.onnx"
            way(prepared, files[name])
    return files


def compare(network: Generator, rounds: int) -> list[Result]:
    """Measure all files of a model."""
    w_plus = network.w_plus([draw_z(network, range(COMPARED), seed=0)]).contiguous()
    expected = by_pytorch(FromW(network), w_plus)
    with TemporaryDirectory() as folder:
        files = variants(network, Path(folder))
        sizes = {name: file.stat().st_size for name, file in files.items()}
        found = {name: onnx_runtime(file) for name, file in files.items()}
        times = interleaved(
            {name: partial(run, w_plus[:1]) for name, run in found.items()},
            rounds,
            clock=time.process_time,
        )
    return [
        {
            "file": name,
            "bytes": sizes[name],
            "psnr": distance(run(w_plus), expected).psnr,
            "seconds": times[name].median,
        }
        for name, run in found.items()
    ]


def row(result: Result) -> list[str]:
    """A line of the table."""
    return [
        result["file"],
        f"{result['bytes'] / 1e6:.2f}",
        f"{result['psnr']:.1f}",
        f"{1e3 * result['seconds']:.2f}",
    ]


def measure(settings: Measurement) -> list[Result]:
    """Print a table of the files; return its figures."""
    check_packages()
    network = frozen(load_generator(bundled.COMPRESSED))
    results = compare(network, settings.rounds)
    head = ("file", "MB", "dB from PyTorch's images", "processor ms, batch 1")
    print(table(head, [row(result) for result in results]))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "What int8 would do to a generator."
    return run_benchmark(Measurement, measure, argv, "quantised", what)


if __name__ == "__main__":
    sys.exit(main())
