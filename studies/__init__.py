"""Which way to compress is best: plans, a runner that goes on after a stop, tables with intervals."""
