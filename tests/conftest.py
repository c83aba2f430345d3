"""Tests compile many small programs and run each for a moment: compile fast, run slow."""

import os

import jax

# Threads of XLA's pool. On a machine of two cores it has two, and what waits in them for others, as
# collectives between processes and simulated warpgroups do, can take the place of these for ever.
os.environ.setdefault("NPROC", "16")
jax.config.update("jax_disable_most_optimizations", True)
