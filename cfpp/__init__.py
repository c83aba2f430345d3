"""Causal Forcing++ in JAX: from a bidirectional video diffusion model to a streaming one."""

__version__ = "0.1.0"
