"""The key/value cache of clean frames: a ring of frame slots behind a sink that stays.

It may hold keys and values in 8 bits, each token of a head with a scale of its own:

    x ~ scale * value,    scale = max |x| / largest,    value = round(x / scale)

    int8             largest = 127, error <= scale / 2, 0.4 % of max |x|
    float8_e4m3fn    largest = 448, error <= max(2^-4 |x|, 2^-10 scale)

Attention works with the values as they are, and multiplies the scores by the keys' scales and the
weights by the values' scales: no implementation but `reference` writes a cache out in a wider
dtype. What the rounding does to attention follows. If no score is off by more than `e` and no value
by more than `d`,

    |logsumexp' - logsumexp| <= e,    |out' - out| <= tanh(e / 2) (max v' - min v') + d,

for each component of the output, with the extremes of v' over the keys; and
e <= |q|_1 max |dk| / sqrt(head_dim). (Weights that are multiplied by factors within e^-e and e^e,
and normalised, move by at most tanh(e / 2) in total variation.)
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

LARGEST_VALUES = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of each dtype of quantised values


class Quantised(flax.struct.PyTreeNode):
    """Keys or values in 8 bits; see the module's docstring.

    Attributes:
      values: int8 or float8_e4m3fn `[..., frames, tokens, head_dim]`.
      scale: float32 `[..., frames, 1, tokens]`.
    """

    values: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x: jax.Array, dtype) -> "Quantised":
        """Rounds `x` `[..., frames, tokens, head_dim]` to `dtype`, one of `LARGEST_VALUES`."""
        x = x.astype(jnp.float32)
        dtype = jnp.dtype(dtype)
        scale = jnp.max(jnp.abs(x), -1, keepdims=True) / LARGEST_VALUES[dtype.name]
        values = x / jnp.where(scale > 0, scale, 1)
        # The conversion to integers would cut off; that to floats rounds, and to nearest.
        values = jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values
        return cls(values.astype(dtype), jnp.swapaxes(scale, -1, -2))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    def restored(self) -> jax.Array:
        """What the values stand for, float32."""
        return self.values.astype(jnp.float32) * jnp.swapaxes(self.scale, -1, -2)


Cached = jax.Array | Quantised  # keys or values, as a cache holds them


def cut(x: Cached, tokens: int) -> Cached:
    """Frames of keys or values `[..., frames, T, head_dim]`, anew in pieces of `tokens` tokens."""
    if isinstance(x, Quantised):
        scale = x.scale.reshape(*x.scale.shape[:-3], -1, 1, tokens)
        return Quantised(cut(x.values, tokens), scale)
    return x.reshape(*x.shape[:-3], -1, tokens, x.shape[-1])


def factors(x: Cached, dtype) -> tuple[jax.Array, jax.Array | float]:
    """The two factors of keys or values: numbers in `dtype`, which holds them exactly, and scales.

    The latter are 1 where `x` is not quantised, and else float32 `[..., 1, tokens]`.
    """
    return (x.values.astype(dtype), x.scale) if isinstance(x, Quantised) else (x, 1.0)


class Cache(flax.struct.PyTreeNode):
    """Keys and values of clean frames, rotary embedding applied.

    Attributes:
      key, value: `[layers, batch, heads, slots, tokens, head_dim]`, plain or `Quantised`.
      frame: int32 `[slots]`, the frame that each slot holds, -1 where it is empty.
      sink: slots 0 .. sink - 1 hold the first frames for good; the others are a ring.
    """

    key: Cached
    value: Cached
    frame: jax.Array
    sink: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype, sink: int = 0) -> "Cache":
        """An empty cache of `shape` = (layers, batch, heads, slots, tokens, head_dim).

        It is quantised if `dtype` is one of `LARGEST_VALUES`.
        """
        zeros = jnp.zeros(shape, dtype)
        if zeros.dtype.name in LARGEST_VALUES:  # by `of`, XLA would do it while compiling
            zeros = Quantised(zeros, jnp.zeros((*shape[:-2], 1, shape[-2])))
        return cls(zeros, zeros, jnp.full(shape[3], -1, jnp.int32), sink)

    @property
    def slots(self) -> int:
        """The number of frames that the cache can hold."""
        return self.key.shape[3]

    def write(self, frame: jax.Array, key: jax.Array, value: jax.Array) -> "Cache":
        """Puts frames into their slots, over the oldest ones where the ring is full.

        Args:
          frame: int32 `[frames]`; no two may share a slot. Negative frames are not written.
          key, value: `[layers, batch, heads, frames, tokens, head_dim]`.

        Raises:
          ValueError: there are more frames than slots, or the sink leaves no slot for the ring.
        """
        if len(frame) > self.slots or self.sink >= self.slots:
            raise ValueError(
                f"{len(frame)} frames do not fit into a cache of {self.slots} slots with a sink "
                f"of {self.sink}"
            )
        ring = self.sink + (frame - self.sink) % (self.slots - self.sink)
        slot = jnp.where(frame < self.sink, frame, ring)
        slot = jnp.where(frame < 0, self.slots, slot)  # out of range: dropped

        def put(held, new):
            if isinstance(held, Quantised):
                new = Quantised.of(new, held.dtype)
            set_slots = lambda old, new: old.at[:, :, :, slot].set(
                new.astype(old.dtype), mode="drop"
            )
            return jax.tree.map(set_slots, held, new)

        return self.replace(
            key=put(self.key, key),
            value=put(self.value, value),
            frame=self.frame.at[slot].set(frame, mode="drop"),
        )
