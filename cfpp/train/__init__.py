"""Training: the loop, its checkpoints, its metrics and its working directory."""
