"""Where the time of an image goes: operators of the 256 px generator, full and pruned, at batch 1.

``python -m benchmarks.breakdown [--threads N]``. Shares of PyTorch's profiler, an operator's own
time without that of those it calls; what Python takes between the operators is not in it.
"""

import sys
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.jobs import frozen, generator
from benchmarks.timing import Measurement, run_benchmark, table


@torch.no_grad()
def shares(ratio: float, rounds: int) -> dict[str, float]:
    """Profile images of a generator pruned by a ratio: share of every operator in their time."""
    network = frozen(generator(256, ratio))
    w = torch.randn(1, network.n_latent, network.style_dim)
    for _ in range(2):
        network.synthesis(w, "fixed")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            network.synthesis(w, "fixed")
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return {name: time / sum(times.values()) for name, time in times.items()}


def measure(settings: Measurement) -> dict[str, dict[str, float]]:
    """Print the largest shares; return all."""
    full, pruned = (shares(ratio, settings.rounds) for ratio in (0.0, 0.7))
    largest = sorted(full | pruned, key=lambda k: -max(full.get(k, 0), pruned.get(k, 0)))[:12]
    rows = [[name, f"{full.get(name, 0):.1%}", f"{pruned.get(name, 0):.1%}"] for name in largest]
    print(table(("operator", "full size", "pruned by 0.7"), rows))
    return {"full size": full, "pruned by 0.7": pruned}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    what = "Shares of the operators in the time of an image."
    return run_benchmark(Measurement, measure, argv, "breakdown", what)


if __name__ == "__main__":
    sys.exit(main())
