"""``python -m benchmarks``: operators, the tool's jobs, their memory, and how the cost grows."""

import sys

from benchmarks import breakdown, jobs, memory, operators, operators_per_iteration, scaling

if __name__ == "__main__":
    for benchmark in (operators, jobs, memory, breakdown, scaling, operators_per_iteration):
        print(f"\n## {benchmark.__name__}\n", flush=True)
        if code := benchmark.main([]):
            sys.exit(code)
