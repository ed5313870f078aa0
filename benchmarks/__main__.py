"""``python -m benchmarks``: the operators, the tool's jobs, and how the cost grows, one by one."""

import sys

from benchmarks import jobs, operators, scaling

if __name__ == "__main__":
    for benchmark in (operators, jobs, scaling):
        print(f"\n## {benchmark.__name__}\n", flush=True)
        if code := benchmark.main([]):
            sys.exit(code)
