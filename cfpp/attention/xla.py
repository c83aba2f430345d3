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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from cfpp.attention import schedule
from cfpp.attention.cache import Cached, Quantised, cut, factors
from cfpp.attention.reference import NOTHING
from cfpp.attention.schedule import Mask

# Tokens of a block of keys: enough to keep a matrix product busy, few enough for a CPU's cache and
# to skip much of a mask. Blocks of queries are of two frames, or parts of frames, at least.
SMALLEST, LARGEST = 32, 256


def attend(
    q: jax.Array, k: Cached, v: Cached, mask: Mask, layer: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`; without a gradient where `layer` is given."""
    frames, tokens = k.shape[-3:-1]
    parts = next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= LARGEST)
    group = max(1, min(SMALLEST // tokens, 31))
    query_group, key_group = min(max(group, 2), len(mask)), min(group, frames)
    if layer is not None:  # filling up the last block would copy the whole cache
        key_group = next(n for n in range(key_group, 0, -1) if frames % n == 0)
    mask = schedule.keep_static(schedule.split(mask, parts))
    sizes = _Sizes(tokens // parts, query_group, key_group)
    if layer is not None:
        return _forward(q, k, v, mask, layer, sizes)
    return _attend(q, k, v, mask, sizes)


class _Sizes(NamedTuple):
    tokens: int  # of an entry of the mask: a frame, or a part of one
    query_group: int  # entries in a block
    key_group: int


def _cut(x: Cached, tokens: int, group: int) -> Cached:
    """`[..., frames, tokens, D]` to `[..., blocks, group * tokens, D]`, filled up with zeros."""
    if isinstance(x, Quantised):  # of a cache, which `group` divides; scales `[..., blocks, size]`
        x = cut(x, tokens * group)
        return x.replace(scale=x.scale.reshape(*x.scale.shape[:-2], -1))
    *outer, frames, frame_tokens, width = x.shape
    x = x.reshape(*outer, -1, width)
    size = tokens * group
    filling = -frames * frame_tokens % size
    x = jnp.pad(x, [(0, 0)] * len(outer) + [(0, filling), (0, 0)]) if filling else x
    return x.reshape(*outer, -1, size, width)


def _join(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Takes `_cut` back: `[B, N, blocks, size, ...]` to the shape of `like`."""
    tokens = like.shape[2] * like.shape[3]
    flat = blocks.reshape(*blocks.shape[:2], -1, *blocks.shape[4:])[:, :, :tokens]
    return flat.reshape(*like.shape[:4], *blocks.shape[4:])


def _take(x: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, block, axis=2, keepdims=False)


class _Table:
    """The schedule of one call, and the scores of a visit."""

    def __init__(self, mask, sizes: _Sizes, head_dim: int):
        self.sizes = sizes
        blocks = schedule.blocks(schedule.plain(mask), sizes.query_group, sizes.key_group)
        # Blocks of one entry are seen as a whole or not at all.
        self.partial = sizes.query_group * sizes.key_group > 1
        self.count, self.index, self.bits = map(jnp.asarray, blocks)
        self.scale = 1 / np.sqrt(head_dim).astype(np.float32)

    def scores(self, q, k, i, j):
        """Scaled scores of query block i and key block j `[B, N, q, k]`, and which are visible."""
        k, k_scale = factors(k, q.dtype)
        s = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32)
        s *= self.scale * k_scale
        if not self.partial:
            return s, True
        rows, columns, tokens = self.sizes.query_group, self.sizes.key_group, self.sizes.tokens
        bits = jax.lax.dynamic_slice(self.bits, (i * rows, j), (rows, 1))
        visible = (bits >> np.arange(columns)) & 1 == 1  # [query_group, key_group]
        visible = jnp.broadcast_to(visible[:, None, :, None], (rows, tokens, columns, tokens))
        visible = visible.reshape(rows * tokens, columns * tokens)
        return jnp.where(visible, s, NOTHING), visible


def _forward(q, k, v, mask, layer, sizes):
    """Equation (1)."""
    table = _Table(mask, sizes, q.shape[-1])
    q_blocks = _cut(q, sizes.tokens, sizes.query_group)
    k_blocks, v_blocks = (_cut(x, sizes.tokens, sizes.key_group) for x in (k, v))

    def take(x, j):
        if layer is None:
            return _take(x, j)
        if isinstance(x, Quantised):
            return Quantised(take(x.values, j), take(x.scale, j)[:, :, None])
        start, size = (layer, 0, 0, j, 0, 0)[: x.ndim], (1, *x.shape[1:3], 1, *x.shape[4:])
        return jax.lax.dynamic_slice(x, start, size)[0, :, :, 0]

    def attend_block(i):
        q_i = _take(q_blocks, i)

        def visit(n, carry):
            largest, total, out = carry
            j = table.index[i, n]
            s, visible = table.scores(q_i, take(k_blocks, j), i, j)
            new = jnp.maximum(largest, s.max(-1))
            p = jnp.where(visible, jnp.exp(s - new[..., None]), 0)
            fade = jnp.exp(largest - new)
            v_j, v_scale = factors(take(v_blocks, j), q.dtype)
            gained = jnp.einsum(
                "bnqk,bnkd->bnqd",
                (p * v_scale).astype(q.dtype),
                v_j,
                preferred_element_type=jnp.float32,
            )
            return new, total * fade + p.sum(-1), out * fade[..., None] + gained

        empty = jnp.full(q_i.shape[:-1], NOTHING)
        zeros = jnp.zeros(q_i.shape, jnp.float32)
        carry = empty, zeros[..., 0], zeros
        largest, total, out = jax.lax.fori_loop(0, table.count[i], visit, carry)
        seen = total > 0
        total = jnp.where(seen, total, 1)
        out = (out / total[..., None]).astype(q.dtype)
        return out, jnp.where(seen, largest + jnp.log(total), NOTHING)

    out, logsumexp = jax.lax.map(attend_block, jnp.arange(q_blocks.shape[2]))
    return tuple(_join(jnp.moveaxis(x, 0, 2), q) for x in (out, logsumexp))


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
    table = _Table(mask, sizes, q.shape[-1])
    delta = jnp.sum(d_out.astype(jnp.float32) * out, -1) - d_logsumexp
    cut_rows = lambda x: _cut(x, sizes.tokens, sizes.query_group)
    cut_numbers = lambda x: cut_rows(x[..., None])[..., 0]
    rows = cut_rows(q), cut_rows(d_out), cut_numbers(logsumexp), cut_numbers(delta)
    k_blocks, v_blocks = (_cut(x, sizes.tokens, sizes.key_group) for x in (k, v))

    def descend_block(gradients, i):
        q_i, d_out_i, logsumexp_i, delta_i = (_take(x, i) for x in rows)

        def visit(n, carry):
            dq_i, dk, dv = carry
            j = table.index[i, n]
            k_j, v_j = _take(k_blocks, j), _take(v_blocks, j)
            s, visible = table.scores(q_i, k_j, i, j)
            p = jnp.where(visible, jnp.exp(s - logsumexp_i[..., None]), 0)
            dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dp = dot("bnqd,bnkd->bnqk", d_out_i, v_j)
            ds = (p * (dp - delta_i[..., None]) * table.scale).astype(q.dtype)
            dv = dv.at[:, :, j].add(dot("bnqk,bnqd->bnkd", p.astype(q.dtype), d_out_i))
            dk = dk.at[:, :, j].add(dot("bnqk,bnqd->bnkd", ds, q_i))
            return dq_i + dot("bnqk,bnkd->bnqd", ds, k_j), dk, dv

        start = (jnp.zeros(q_i.shape, jnp.float32), *gradients)
        dq_i, *gradients = jax.lax.fori_loop(0, table.count[i], visit, start)
        return tuple(gradients), dq_i

    zeros = jnp.zeros(k_blocks.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(descend_block, (zeros, zeros), jnp.arange(rows[0].shape[2]))
    dq, dk, dv = _join(jnp.moveaxis(dq, 0, 2), q), _join(dk, k), _join(dv, v)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
