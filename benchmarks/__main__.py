"""``python -m benchmarks``: operators, the tool's jobs, their memory, and how the cost grows."""

import sys

from benchmarks import breakdown, jobs, memory, operators, scaling

if __name__ == "__main__":
    for benchmark in (operators, jobs, memory, breakdown, scaling):
        print(f"\n## {benchmark.__name__}\n", flush=True)
        if code := benchmark.main([]):
            sys.exit(code)
