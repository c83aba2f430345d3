"""Frame-wise generation with a key/value cache: whole clips, endless streams, self-rollouts."""
