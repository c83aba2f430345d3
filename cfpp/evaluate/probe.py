"""A small inverse-dynamics network: which action led from one frame to the next?

It is trained on real clips only. On generated clips it tells whether the picture does what it was
told. What it reaches on real clips is the ceiling: some steps look alike (a wall stops the agent
of the arena whichever way it is pushed, many buttons of a game do nothing).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cfpp.models import codec

BATCH = 128
LEARNING_RATE = 4e-3
MAX_FRAMES = 16_384  # of real clips kept in memory: 200 MB at 64x64


class InverseDynamics(nn.Module):
    """Frame pairs to action logits.

    Attributes:
      num_actions: number of logits.
    """

    num_actions: int

    @nn.compact
    def __call__(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Maps two frames, uint8 `[B, H, W, 3]`, to logits, float32 `[B, num_actions]`."""
        before, after = codec.encode(before), codec.encode(after)
        x = jnp.concatenate([after, after - before], axis=-1)
        uniform = nn.initializers.lecun_uniform()  # compiles faster than the default
        width = 16
        while min(x.shape[1:3]) > 8:
            x = nn.gelu(nn.Conv(width, (3, 3), strides=2, kernel_init=uniform)(x))
            width = min(2 * width, 64)
        x = nn.gelu(nn.Conv(64, (3, 3), kernel_init=uniform)(x))
        # Wherever it is seen, the same motion tells the same action.
        x = nn.gelu(nn.Dense(128, kernel_init=uniform)(x.max((1, 2))))
        return nn.Dense(self.num_actions, kernel_init=uniform)(x)


class Probe(NamedTuple):
    """A trained network and its parameters."""

    network: InverseDynamics
    params: dict


def train(
    episodes: Sequence[dict[str, np.ndarray]], num_actions: int, steps: int, seed: int = 0
) -> Probe:
    """Trains a probe on real episodes (the first `MAX_FRAMES` frames of them).

    Args:
      episodes: dicts with `video` uint8 `[T, H, W, 3]` and `actions` int32 `[T]`.
      num_actions: number of actions of the world.
      steps: optimizer steps, of `BATCH` pairs each.
      seed: of the initialisation and of the order of the pairs.
    """
    frames, actions, pairs = _pairs(episodes)
    network = InverseDynamics(num_actions)
    params = jax.jit(network.init)(jax.random.key(seed), frames[:1], frames[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def loss(params, before, after, action):
        logits = network.apply(params, before, after)
        return optax.softmax_cross_entropy_with_integer_labels(logits, action).mean()

    @jax.jit
    def step(params, state, before, after, action):
        gradient = jax.grad(loss)(params, before, after, action)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        t = rng.choice(pairs, BATCH)
        params, state = step(params, state, frames[t - 1], frames[t], actions[t])
    return Probe(network, params)


def predict_actions(probe: Probe, video: np.ndarray) -> np.ndarray:
    """The likeliest action of each step in clips uint8 `[E, T, H, W, 3]`: int `[E, T-1]`."""
    return np.stack([_predict(probe.network, probe.params, clip) for clip in video])


@jax.jit(static_argnums=0)
def _predict(network: InverseDynamics, params: dict, clip: jax.Array) -> jax.Array:
    return network.apply(params, clip[:-1], clip[1:]).argmax(-1)


def _pairs(
    episodes: Sequence[dict[str, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames `[N, ...]` of several episodes, their actions, and which have a frame before them."""
    videos, actions, pairs, total = [], [], [], 0
    for index in range(len(episodes)):
        episode = episodes[index]
        length = len(episode["actions"])
        videos.append(episode["video"])
        actions.append(episode["actions"])
        pairs.append(np.arange(total + 1, total + length))
        total += length
        if total >= MAX_FRAMES:
            break
    return np.concatenate(videos), np.concatenate(actions), np.concatenate(pairs)
