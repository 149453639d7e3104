"""What a published model can do: classification, lm-eval tasks, bits per byte, and what its prefix is worth."""
