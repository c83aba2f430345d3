"""Blockwise attention in plain JAX: what a CPU runs, and any device without a kernel of its own.

Flash attention (Dao et al. 2022): every block of queries goes over the blocks of keys that it sees,
with a running maximum and sum of the softmax,

    (1) m' = max(m, max_j s_j),    l' = l exp(m - m') + sum_j exp(s_j - m'),
        o' = o exp(m - m') + sum_j exp(s_j - m') v_j,    s = q k^T / sqrt(D);

the output is o / l and the logsumexp m + log l. The backward pass computes the weights once more:

    (2) p = exp(s - logsumexp),    ds = p (do v^T - delta),    delta = do . out - dlogsumexp

Nothing of size tokens x tokens exists, and blocks that nobody sees cost nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from cfpp.attention import schedule
from cfpp.attention.cache import Cached, Quantised, factors
from cfpp.attention.reference import NOTHING
from cfpp.attention.schedule import Mask

# Tokens of a block of keys: enough to keep a matrix product busy, few enough for a CPU's cache and
# to skip much of a mask. Blocks of queries are of two frames, or parts of frames, at least.
SMALLEST, LARGEST = 32, 256
# Of a cache, nearly all of whose frames are seen once it is full: few queries want many keys.
CACHED = 1024


def attend(
    q: jax.Array, k: Cached, v: Cached, mask: Mask, layer: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`; without a gradient where `layer` is given."""
    frames, tokens = k.shape[-3:-1]
    parts = -(-tokens // LARGEST)
    mask = schedule.split(mask, parts)
    group = max(1, SMALLEST // tokens)
    key_group = group if layer is None else CACHED // tokens
    sizes = _Sizes(
        tokens=-(-tokens // parts),
        parts=parts,
        query_group=min(max(group, 2), 31, len(mask)),
        # A block of keys has several frames, or a part of one.
        key_group=max(1, min(key_group, 31, frames)) if parts == 1 else 1,
    )
    mask = schedule.keep_static(mask)
    if layer is not None:
        return _forward(q, k, v, mask, layer, sizes)
    return _attend(q, k, v, mask, sizes)


class _Sizes(NamedTuple):
    tokens: int  # of an entry of the mask: a frame, or a part of one
    parts: int  # of a frame
    query_group: int  # entries in a block
    key_group: int


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Fills an axis up with zeros to a multiple of `size`."""
    filling = -x.shape[axis] % size
    return jnp.pad(x, [(0, filling * (i == axis)) for i in range(x.ndim)]) if filling else x


def _rows(x: jax.Array, sizes: _Sizes) -> jax.Array:
    """`[B, N, E, T, ...]` in blocks of queries, `[B, N, blocks, query_group * tokens, ...]`."""
    batch, heads, _, _, *rest = x.shape
    x = _pad(x, 3, sizes.tokens * sizes.parts).reshape(batch, heads, -1, sizes.tokens, *rest)
    x = _pad(x, 2, sizes.query_group)
    return x.reshape(batch, heads, -1, sizes.query_group * sizes.tokens, *rest)


def _join(blocks: jax.Array, like: jax.Array, sizes: _Sizes) -> jax.Array:
    """Takes `_rows` back: to `[B, N, E, T, ...]`, the first of them as `like`."""
    batch, heads, entries, tokens = like.shape[:4]
    rest = blocks.shape[4:]
    x = blocks.reshape(batch, heads, -1, sizes.tokens, *rest)[:, :, : entries * sizes.parts]
    return x.reshape(batch, heads, entries, -1, *rest)[:, :, :, :tokens]


def _take(x: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, block, axis=2, keepdims=False)


def _numbers(count: int) -> jax.Array:
    """0 .. count - 1, int32 whatever JAX's default, as all that counts blocks is."""
    return jnp.arange(count, dtype=jnp.int32)


def _indices(*starts) -> tuple:
    """Indices of one slice, all int32: JAX takes none that are mixed, as with 64 bits they are."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)


class _Table:
    """The schedule of one call: what is visited, where it lies, and what is seen of it.

    Blocks of keys are read where they lie, as to cut up a cache would copy it. The last one is
    moved back to end where the frame or the frames end; what others have shown of it is masked.
    """

    def __init__(self, mask, sizes: _Sizes, k: Cached):
        self.sizes = sizes
        self.frames, self.tokens, head_dim = k.shape[-3:]
        blocks = schedule.blocks(schedule.plain(mask), sizes.query_group, sizes.key_group)
        self.count, self.index, self.bits = map(jnp.asarray, blocks)
        self.scale = 1 / np.sqrt(head_dim).astype(np.float32)
        _, _, *shown = self.place(_numbers(self.index.shape[1]))
        seen = self.bits == 2**sizes.key_group - 1
        seen = seen.reshape(-1, sizes.query_group, seen.shape[1]).all(1)
        self.whole = seen & (shown[0] == 0) & (shown[1] == 0)  # [query blocks, key blocks]

    def place(self, j):
        """First frame and first token of key block j, and how many of both are another block's."""
        group, tokens = self.sizes.key_group, self.sizes.tokens
        frame, part = j * group // self.sizes.parts, j % self.sizes.parts
        first_frame = jnp.minimum(frame, self.frames - group)
        first_token = jnp.minimum(part * tokens, self.tokens - tokens)
        return first_frame, first_token, frame - first_frame, part * tokens - first_token

    def take(self, x: Cached, j, layer=None) -> Cached:
        """Key block j of keys or values, `[B, N, key_group * tokens, D]`."""
        frame, token, _, _ = self.place(j)

        def cut(x, start, size):
            start, size = (0, 0, frame, *start), (*x.shape[-5:-3], self.sizes.key_group, *size)
            if layer is None:
                return jax.lax.dynamic_slice(x, _indices(*start), size)
            return jax.lax.dynamic_slice(x, _indices(layer, *start), (1, *size))[0]

        def values(x):
            out = cut(x, (token, 0), (self.sizes.tokens, x.shape[-1]))
            return out.reshape(*out.shape[:2], -1, x.shape[-1])

        if isinstance(x, Quantised):
            scale = cut(x.scale, (0, token), (1, self.sizes.tokens))  # [B, N, key_group, 1, tokens]
            return Quantised(values(x.values), scale.reshape(*scale.shape[:2], 1, -1))
        return values(x)

    def add(self, total: jax.Array, block: jax.Array, j) -> jax.Array:
        """`total`, shaped like the keys, with `block` added where key block j lies."""
        frame, token, _, _ = self.place(j)
        block = self.take(total, j) + block
        shape = *total.shape[:2], self.sizes.key_group, self.sizes.tokens, total.shape[-1]
        start = _indices(0, 0, frame, token, 0)
        return jax.lax.dynamic_update_slice(total, block.reshape(shape), start)

    def scores(self, q, k):
        """Scores of a block of queries and one of keys, not scaled, `[B, N, q, k]`."""
        k, k_scale = factors(k, q.dtype)
        return jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32) * k_scale

    def seen(self, function: Callable, s, i, j):
        """`function` of scores of query block i and key block j, which are `NOTHING` where unseen.

        Most blocks are seen as a whole: they are not masked, which would write them once more.
        """
        _, _, shown_frames, shown_tokens = self.place(j)
        rows, columns, tokens = self.sizes.query_group, self.sizes.key_group, self.sizes.tokens
        bits = jax.lax.dynamic_slice(self.bits, _indices(i * rows, j), (rows, 1)) << shown_frames
        visible = (bits >> np.arange(columns, dtype=np.int32)) & 1 == 1  # [query_group, key_group]
        visible = visible[:, None, :, None] & (np.arange(tokens) >= shown_tokens)

        def part(s):
            entries = s.reshape(*s.shape[:2], rows, tokens, columns, tokens)
            return function(jnp.where(visible, entries, NOTHING).reshape(s.shape))

        return jax.lax.cond(self.whole[i, j], function, part, s)


def _forward(q, k, v, mask, layer, sizes):
    """Equation (1)."""
    table = _Table(mask, sizes, k)
    q_blocks = _rows(q, sizes)

    def attend_block(i):
        q_i = _take(q_blocks, i)

        def visit(n, carry):
            largest, total, out = carry
            j = table.index[i, n]

            def weigh(s):
                new = jnp.maximum(largest, s.max(-1))
                return new, jnp.exp((s - new[..., None]) * table.scale)

            # In a row that has seen nothing yet, weights are 1, and fade to 0 later.
            new, p = table.seen(weigh, table.scores(q_i, table.take(k, j, layer)), i, j)
            fade = jnp.exp((largest - new) * table.scale)
            v_j, v_scale = factors(table.take(v, j, layer), q.dtype)
            gained = jnp.einsum(
                "bnqk,bnkd->bnqd",
                (p * v_scale).astype(q.dtype),
                v_j,
                preferred_element_type=jnp.float32,
            )
            return new, total * fade + p.sum(-1), out * fade[..., None] + gained

        empty = jnp.full(q_i.shape[:-1], NOTHING, jnp.float32)
        zeros = jnp.zeros(q_i.shape, jnp.float32)
        carry = empty, zeros[..., 0], zeros
        largest, total, out = jax.lax.fori_loop(0, table.count[i], visit, carry)
        seen = largest > NOTHING
        total = jnp.where(seen, total, 1)
        out = jnp.where(seen[..., None], out / total[..., None], 0).astype(q.dtype)
        return out, jnp.where(seen, largest * table.scale + jnp.log(total), NOTHING)

    out, logsumexp = jax.lax.map(attend_block, _numbers(q_blocks.shape[2]))
    return tuple(_join(jnp.moveaxis(x, 0, 2), q, sizes) for x in (out, logsumexp))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, sizes):
    return _forward(q, k, v, mask, None, sizes)


def _attend_forward(q, k, v, mask, sizes):
    out, logsumexp = _forward(q, k, v, mask, None, sizes)
    out, logsumexp = (checkpoint_name(x, schedule.RESIDUAL) for x in (out, logsumexp))
    return (out, logsumexp), (q, k, v, mask, out, logsumexp)


def _attend_backward(sizes, residuals, cotangents):
    """Equation (2)."""
    q, k, v, mask, out, logsumexp = residuals
    d_out, d_logsumexp = cotangents
    table = _Table(mask, sizes, k)
    delta = jnp.sum(d_out.astype(jnp.float32) * out, -1) - d_logsumexp
    logsumexp = jnp.where(logsumexp > NOTHING, logsumexp, 0)  # else unseen scores would weigh 1
    rows = [_rows(x, sizes) for x in (q, d_out, logsumexp, delta)]

    def descend_block(gradients, i):
        q_i, d_out_i, logsumexp_i, delta_i = (_take(x, i) for x in rows)

        weigh = lambda s: jnp.exp(s * table.scale - logsumexp_i[..., None])

        def visit(n, carry):
            dq_i, dk, dv = carry
            j = table.index[i, n]
            k_j, v_j = table.take(k, j), table.take(v, j)
            p = table.seen(weigh, table.scores(q_i, k_j), i, j)
            dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            # Of a sum over rows a CPU turns the first factor around: so that is the smaller one.
            of_keys = lambda rows, weights: dot("bnqd,bnqk->bndk", rows, weights).swapaxes(-1, -2)
            dp = dot("bnqd,bnkd->bnqk", d_out_i, v_j)
            ds = (p * (dp - delta_i[..., None]) * table.scale).astype(q.dtype)
            dv = table.add(dv, of_keys(d_out_i, p.astype(q.dtype)), j)
            dk = table.add(dk, of_keys(q_i, ds), j)
            return dq_i + dot("bnqk,bnkd->bnqd", ds, k_j), dk, dv

        start = (jnp.zeros(q_i.shape, jnp.float32), *gradients)
        dq_i, *gradients = jax.lax.fori_loop(0, table.count[i], visit, start)
        return tuple(gradients), dq_i

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(descend_block, (zeros, zeros), _numbers(rows[0].shape[2]))
    dq = _join(jnp.moveaxis(dq, 0, 2), q, sizes)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
