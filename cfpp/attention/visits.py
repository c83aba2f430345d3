"""From a table of which frame sees which to blocks of tokens that are cut without regard to frames.

Frames follow one another without padding, and blocks begin wherever they fall: 1,560 tokens are no
multiple of a tensor core's tile, and padding each frame to one would cost 14 % of the work. A block
of queries has a list of key blocks that it visits: first those that it sees whole, then those that
it sees in part, which alone need the mask (FlexAttention, arXiv 2412.05496).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from cfpp.attention.schedule import Mask


class Visits(NamedTuple):
    """The blocks of columns that each block of rows visits.

    Attributes:
      index: int32 `[row blocks, column blocks]`, those seen whole, then those seen in part, then
        the others.
      whole, seen: int32 `[row blocks]`, how many are seen whole, and how many at all.
      bits: int32 `[row frames, column blocks]`: bit n is set where a row frame sees the n-th frame
        that has a token in the block.
    """

    index: Mask
    whole: Mask
    seen: Mask
    bits: Mask


def visits(mask: Mask, tokens: int, row_block: int, column_block: int) -> Visits:
    """The schedule of blocks that are cut from frames laid end to end.

    Args:
      mask: bool `[row frames, column frames]`: NumPy makes a NumPy schedule, JAX a JAX one.
      tokens: of one frame.
      row_block, column_block: tokens of a block, the latter of at most 31 frames.
    """
    xp = np if isinstance(mask, np.ndarray) else jnp
    row_frames, column_frames = mask.shape
    row_first, row_end = _frames_of_blocks(row_frames * tokens, tokens, row_block)
    column_first, column_end = _frames_of_blocks(column_frames * tokens, tokens, column_block)
    # visible[i, j] counts the visible pairs among the first i row and j column frames.
    visible = xp.pad(xp.cumsum(xp.cumsum(xp.asarray(mask, int), 0), 1), ((1, 0), (1, 0)))
    in_columns = visible[:, column_end] - visible[:, column_first]
    seen = in_columns[row_end] - in_columns[row_first]
    pairs = (row_end - row_first)[:, None] * (column_end - column_first)
    # The last columns are seen in part if they reach past the end.
    inside = np.arange(1, len(column_end) + 1) * column_block <= column_frames * tokens
    whole = (seen == pairs) & inside
    rank = xp.where(whole, 0, xp.where(seen > 0, 1, 2))
    place = np.arange(max(column_end - column_first))
    frame = column_first[:, None] + place
    in_block = frame < column_end[:, None]
    bits = xp.asarray(mask, int)[:, np.where(in_block, frame, 0)] * in_block << place
    return Visits(
        *(
            x.astype(np.int32)
            for x in (
                xp.argsort(rank, 1, stable=True), whole.sum(1), (seen > 0).sum(1), bits.sum(-1)
            )
        )
    )  # fmt: skip


def _frames_of_blocks(length: int, tokens: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The first frame, and the first frame after, that blocks of a sequence have a token of."""
    start = np.arange(0, length, block)
    return start // tokens, (np.minimum(start + block, length) - 1) // tokens + 1
