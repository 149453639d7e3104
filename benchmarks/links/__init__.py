"""potluck on emulated home lines: ``python -m benchmarks.links --help``."""
