"""What people look at: the page, its data, and what is folded for it from the run's records."""
