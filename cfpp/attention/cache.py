"""The key/value cache of clean frames: a ring of frame slots behind a sink that stays."""

import flax.struct
import jax
import jax.numpy as jnp


class Cache(flax.struct.PyTreeNode):
    """Keys and values of clean frames, rotary embedding applied.

    Attributes:
      key, value: `[layers, batch, heads, slots, tokens, head_dim]`.
      frame: int32 `[slots]`, the frame that each slot holds, -1 where it is empty.
      sink: slots 0 .. sink - 1 hold the first frames for good; the others are a ring.
    """

    key: jax.Array
    value: jax.Array
    frame: jax.Array
    sink: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype, sink: int = 0) -> "Cache":
        """An empty cache of `shape` = (layers, batch, heads, slots, tokens, head_dim)."""
        zeros = jnp.zeros(shape, dtype)
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
        """
        ring = self.sink + (frame - self.sink) % (self.slots - self.sink)
        slot = jnp.where(frame < self.sink, frame, ring)
        slot = jnp.where(frame < 0, self.slots, slot)  # out of range: dropped
        return self.replace(
            key=self.key.at[:, :, :, slot].set(key.astype(self.key.dtype), mode="drop"),
            value=self.value.at[:, :, :, slot].set(value.astype(self.value.dtype), mode="drop"),
            frame=self.frame.at[slot].set(frame, mode="drop"),
        )
