"""potluck: train one language model together, over ordinary internet lines."""

__version__ = "0.1.0"
