"""models: a checkpoint, and what is computed with it."""
