"""Faults in runs of real processes: where they strike, and what a run must make of them."""
