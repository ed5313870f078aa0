"""What one image costs, against both roofs: multiply-accumulates and bytes moved.

``python -m benchmarks.roofs``: bytes are the least that layer after layer moves, in float32: each
layer reads its weights and input once and writes its output once. The roofs are the speeds of a
large matrix product and of a copy of 64 MiB in the same rounds.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.jobs import frozen, generator, matrix_product
from benchmarks.timing import OneThread, interleaved, run_benchmark, table
from Model.complexity import macs
from Model.generator import Generator

CASES = ((256, 0.0), (256, 0.7), (1024, 0.0), (1024, 0.7))
COPIED = 2**24
"""Values of the copy."""


def bytes_moved(network: Generator) -> int:
    """Count the bytes of one image's synthesis (see the module)."""
    sides = [noise.shape[-1] for noise in network.fixed_noise]
    outputs = [c * side**2 for c, side in zip(network.channels[1:], sides, strict=True)]
    inputs = [network.channels[0] * 16, *outputs[:-1]]
    weights = sum(p.numel() for name, p in network.named_parameters() if ".weight" in name)
    # Each resolution's ToRGB reads its activations and the RGB of a quarter, and writes its own.
    rgb = sum(n + 3 * side**2 * 5 // 4 for n, side in zip(outputs[::2], sides[::2], strict=True))
    noise = sum(side**2 for side in sides)
    return 4 * (sum(inputs) + sum(outputs) + rgb + noise + weights)


@torch.no_grad()
def measured(network: Generator, settings: OneThread) -> dict[str, float]:
    """Time an image, the matrix product and the copy in turn: seconds."""
    w = torch.randn(1, network.n_latent, network.style_dim)
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    calls: dict[str, Callable[[], object]] = {
        "image": partial(network.synthesis, w, "fixed"),
        "product": matrix_product,
        "copy": partial(target.copy_, source),
    }
    times = interleaved(calls, settings.rounds, clock=settings.clock)
    return {name: timing.median for name, timing in times.items()}


def measure(settings: OneThread) -> list[dict[str, Any]]:
    """Print a table of the generators; return its figures."""
    rows, results = [], []
    for size, ratio in CASES:
        network = frozen(generator(size, ratio)).prepare("float32")
        seconds = measured(network, settings)
        work, moved = macs(network), bytes_moved(network)
        by_work = work / 2048**3 * seconds["product"]
        by_memory = moved / (8 * COPIED) * seconds["copy"]
        name = f"{size} px" + (f" pruned by {ratio:g}" if ratio else " full size")
        times = [f"{1e3 * t:.1f}" for t in (by_work, by_memory, seconds["image"])]
        rows.append([name, f"{work / 1e9:.2f}", f"{moved / 2**20:.0f}", *times])
        results.append({"model": name, "macs": work, "bytes": moved, **seconds})
        print(rows[-1], file=sys.stderr, flush=True)
    head = ("one image", "GMAC", "MiB", "ms by products", "ms by memory", "measured ms")
    print(table(head, rows))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Cost of one image against the roofs of arithmetic and memory."
    return run_benchmark(OneThread, measure, argv, "roofs", what)


if __name__ == "__main__":
    sys.exit(main())
