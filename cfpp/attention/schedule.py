"""From a table of which frame sees which to the blocks of tokens that an implementation visits.

A block is several whole frames, or a part of one (`split`). Implementations never compute a block
that no query sees, and mask inside the blocks that are seen in part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RESIDUAL = "attention"  # the checkpoint name of what attention keeps for its backward pass

Mask = np.ndarray | jax.Array  # NumPy where it is known when a program is traced


@jax.tree_util.register_static
class StaticMask:
    """A NumPy mask that stays NumPy through `jax.lax.scan`: a pytree without leaves."""

    def __init__(self, mask: np.ndarray):
        self.mask = mask

    def __hash__(self):
        return hash(self.mask.tobytes())

    def __eq__(self, other):
        return isinstance(other, StaticMask) and np.array_equal(self.mask, other.mask)


def keep_static(mask: Mask) -> StaticMask | jax.Array:
    """A mask in a form that goes through `jax.lax.scan` unchanged: a NumPy one stays NumPy."""
    return StaticMask(mask) if isinstance(mask, np.ndarray) else mask


def plain(mask: StaticMask | jax.Array) -> Mask:
    """Takes `keep_static` back."""
    return mask.mask if isinstance(mask, StaticMask) else mask


class Blocks(NamedTuple):
    """The blocks of keys that each block of queries visits.

    Attributes:
      count: int32 `[query blocks]`, how many.
      index: int32 `[query blocks, key blocks]`, which: the first `count` of a row, in rising order.
        What follows them is not visited.
      bits: int32 `[query blocks * query_group, key blocks]`: bit j of a query frame's number is set
        where it sees frame j of the block.
    """

    count: Mask
    index: Mask
    bits: Mask


def blocks(mask: Mask, query_group: int = 1, key_group: int = 1) -> Blocks:
    """The schedule of blocks of whole frames.

    Args:
      mask: bool `[query frames, key frames]`. The schedule is NumPy if this is.
      query_group, key_group: frames in a block of queries and of keys, the latter at most 31. Where
        they do not divide the frames, the last block is filled up with frames that are never seen.
    """
    if not 1 <= key_group <= 31:
        raise ValueError(f"a block of keys has 1 to 31 frames, got {key_group}")
    xp = np if isinstance(mask, np.ndarray) else jnp
    mask = xp.pad(mask, [(0, -mask.shape[0] % query_group), (0, -mask.shape[1] % key_group)])
    queries, keys = mask.shape[0] // query_group, mask.shape[1] // key_group
    grouped = mask.reshape(queries, query_group, keys, key_group)
    bits = xp.sum(grouped * 2 ** np.arange(key_group), axis=-1)
    visible = xp.any(grouped, axis=(1, 3))
    # A stable sort puts the visited blocks first and leaves them in order.
    index = xp.argsort(~visible, axis=1, stable=True)
    tables = visible.sum(1), index, bits.reshape(-1, keys)
    return Blocks(*(table.astype(np.int32) for table in tables))


def split(mask: Mask, parts: int) -> Mask:
    """The table for frames cut into `parts` equal parts, each an entry of its own."""
    xp = np if isinstance(mask, np.ndarray) else jnp
    return xp.repeat(xp.repeat(mask, parts, 0), parts, 1)
