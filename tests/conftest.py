"""Tests compile many small programs and run each for a moment: compile fast, run slow."""

import jax

jax.config.update("jax_disable_most_optimizations", True)
