"""A network small enough to test with, every parameter random, and data to feed it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cfpp.attention.pattern import Pattern
from cfpp.models.dit import DiT
from cfpp.models.network import Network

ACTIONS = 3


def network(pattern: Pattern | None = None, **model) -> Network:
    sizes = dict(
        channels=2, height=8, width=12, patch=4, dim=24, ffn_dim=32, heads=2, layers=2,
        frequency_dim=16, num_actions=ACTIONS, prediction="velocity",
    )  # fmt: skip
    return Network(DiT(**(sizes | model)), pattern or Pattern())


def params(net: Network, seed: int = 0):
    """Random values in every parameter: zeros and ones would hide mistakes."""
    tree = nn.meta.unbox(net.init(jax.random.key(seed)))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def latents(net: Network, frames: int, batch: int = 2, seed: int = 0) -> jax.Array:
    shape = (batch, frames, net.dit.height, net.dit.width, net.dit.channels)
    return jax.random.normal(jax.random.key(seed), shape)


def actions(frames: int, batch: int = 2, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, frames), 0, ACTIONS)


def close(a, b, relative: float = 1e-5):
    """Equal within `relative` of the largest value: float32 sums in another order."""
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


def noise_table(net: Network, frames: int, steps: int, batch: int = 2, seed: int = 9):
    """Noise as a table `[frames, steps, B, chunk, H, W, C]`, read by (frame, step)."""
    shape = (frames, steps, batch, net.pattern.chunk, *latents(net, 1).shape[2:])
    table = jax.random.normal(jax.random.key(seed), shape)
    return lambda frame, step: jnp.asarray(table)[frame, jnp.minimum(step, steps - 1)]
