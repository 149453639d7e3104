"""Does the training: data, stage, pipeline, sync, optimizer, checkpoint, daemon."""
