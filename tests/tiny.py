"""A network small enough to test with, every parameter random, and data to feed it."""

import functools

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
    # Shapes do not depend on these, and are found once for networks that differ in no more.
    same = dict(attention="reference", remat="none", unroll=1, cache_dtype="", dtype="float32")
    return params_like(_shapes(net.dit.clone(**same, history_gradient="none")), seed)


@functools.cache
def _shapes(dit: DiT):
    return nn.meta.unbox(Network(dit, Pattern()).shapes())


def params_like(shapes, seed: int = 0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        if name == "kernel":
            return noise / np.sqrt(leaf.shape[-2], dtype=np.float32)
        return 0.2 * noise + (name == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def latents(net: Network, frames: int, batch: int = 2, seed: int = 0) -> jax.Array:
    shape = (batch, frames, net.dit.height, net.dit.width, net.dit.channels)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def actions(frames: int, batch: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, ACTIONS, (batch, frames), np.int32))


def close(a, b, relative: float = 1e-5):
    """Equal within `relative` of the largest value: float32 sums in another order."""
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


def noise_table(net: Network, frames: int, steps: int, batch: int = 2, seed: int = 9):
    """Noise as a table `[frames, steps, B, H, W, C]`, read by (frames, step)."""
    shape = (frames, steps, batch, *latents(net, 1).shape[2:])
    table = jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
    return lambda frames, step: jnp.moveaxis(table[frames, jnp.minimum(step, steps - 1)], 0, 1)
