"""Which way to compress is best: plans, a resumable runner, tables with intervals."""
