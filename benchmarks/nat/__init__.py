"""Workers behind home routers: who reaches whom, and what a relay bears. ``python -m benchmarks.nat --help``."""
