"""What others are told of a run: Prometheus, an alert's webhook, experiment trackers, a structured log."""
