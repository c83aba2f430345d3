"""Block-sparse flash attention for GPUs, by Pallas's Triton backend.

Blocks of queries visit the blocks of keys that they see (`visits`), and mask only those that they
see in part. Blocks that nobody sees are neither loaded nor computed.

With s = q k / sqrt(D), the forward pass keeps a running maximum and sum (FlashAttention-2,
arXiv 2307.08691). The backward pass computes the weights anew from the logsumexp L, in one kernel
for dq and one for dk and dv; neither needs atomics, so gradients are the same in every run:

    P = exp(s - L),   dV = P' dO,   dS = P (dO V' - delta),   delta = rowsum(dO O) - dL

Dimension letters: B batch, N heads, E entries (frames), T tokens a frame, D head_dim, L layers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cfpp.attention import pallas_hopper
from cfpp.attention.cache import Cached, Quantised, factors
from cfpp.attention.notice import say_once
from cfpp.attention.reference import LOG2_E, NOTHING
from cfpp.attention.schedule import RESIDUAL, Mask, keep_static, plain
from cfpp.attention.visits import Visits, visits
from cfpp.parallel import mesh

HEAD_DIM = 128  # the widest head whose tiles fit
WARPS = 8


class Tile(NamedTuple):
    """The sizes of a kernel: a block of rows stays, blocks of columns pass by, in tokens."""

    rows: int
    columns: int
    stages: int  # blocks of columns in flight

    @classmethod
    def choose(cls, dtype, length: int, tokens: int) -> "Tile":
        """A tile whose registers do not spill (bfloat16), and that a small clip fills.

        Args:
          length: of the longer sequence.
          tokens: of a frame: a block of columns has tokens of at most 31 frames (`visits`).
        """
        rows, columns, stages = (128, 64, 3) if jnp.dtype(dtype).itemsize == 2 else (64, 32, 2)
        fit = lambda size, largest: min(size, max(16, pl.next_power_of_2(largest)))
        return cls(fit(rows, length), fit(columns, min(length, 16 * tokens)), stages)


class _Sequence(NamedTuple):
    """One side of attention, queries or keys, as a kernel sees it."""

    length: int  # in tokens
    tokens: int  # of a frame
    head_dim: int
    block: int  # tokens loaded at once

    def load(self, ref, j, whole: bool, *outer):
        """Block `j` of `ref`, `[length]` or `[length, padded head_dim]`: zero outside of the array.

        Args:
          whole: whether the block is known to end before the sequence does.
          *outer: indices of dimensions before these.
        """
        ref = ref.at[(*outer, pl.ds(j * self.block, self.block))]
        mask = self._mask(ref.shape, j, whole)
        return ref[...] if mask is None else triton.load(ref, mask=mask, other=0.0)

    def load_cached(self, x, j, whole: bool, dtype, layer):
        """Block `j` of one layer's keys or values in `dtype`, and its scales (`cache.factors`)."""
        values, scale = factors(jax.tree.map(lambda x: self.load(x, j, whole, layer), x), dtype)
        return values, scale[None] if isinstance(x, Quantised) else scale

    def store(self, ref, j, value):
        """Writes block `j` of `ref`, as far as it lies in the array."""
        ref = ref.at[pl.ds(j * self.block, self.block)]
        triton.store(ref, value.astype(ref.dtype), mask=self._mask(ref.shape, j, False))

    def frames(self, j):
        """The frame of each token of block `j`, int32 `[block]`."""
        return self._positions(j) // self.tokens

    def _positions(self, j):
        return j * self.block + jnp.arange(self.block)

    def _mask(self, shape, j, whole):
        mask = None
        if (not whole or self.length < self.block) and self.length % self.block:
            mask = (self._positions(j) < self.length).reshape(-1, *(1,) * (len(shape) - 1))
        if len(shape) == 2 and shape[1] > self.head_dim:
            in_head = (jnp.arange(shape[1]) < self.head_dim)[None]
            mask = in_head if mask is None else mask & in_head
        return mask if mask is None else jnp.broadcast_to(mask, shape)


def _dot(a, b, contract: tuple[int, int]):
    """The product of two tiles over one dimension of each, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _visit(tables: Visits, i, body, carry):
    """Runs `body(j, carry, whole)` over the column blocks `j` that row block `i` sees."""
    step = lambda whole: lambda n, carry: body(tables.index[i, n], carry, whole)
    carry = jax.lax.fori_loop(0, tables.whole[i], step(True), carry)
    return jax.lax.fori_loop(tables.whole[i], tables.seen[i], step(False), carry)


def _visible(tables: Visits, rows: _Sequence, i, columns: _Sequence, j):
    """Which tokens of row block `i` see which of column block `j`, bool `[rows, columns]`."""
    bits = tables.bits[jnp.minimum(rows.frames(i), tables.bits.shape[0] - 1), j]
    place = columns.frames(j) - j * columns.block // columns.tokens
    return (bits[:, None] >> place[None]) & 1 != 0  # no bit is set for frames past the end


def _forward_kernel(
    index, whole, seen, bits, layer, q, k, v, out, logsumexp,
    *, query: _Sequence, key: _Sequence
):  # fmt: skip
    i, tables = pl.program_id(0), Visits(index, whole, seen, bits)
    layer = layer[0]
    q = query.load(q, i, False)
    scale = LOG2_E / math.sqrt(query.head_dim)  # exp2 is what the hardware has

    def body(j, carry, whole):
        acc, top, total = carry
        keys, k_scale = key.load_cached(k, j, whole, q.dtype, layer)
        scores = _dot(q, keys, (1, 1)) * (scale * k_scale)
        if not whole:
            scores = jnp.where(_visible(tables, query, i, key, j), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        values, v_scale = key.load_cached(v, j, whole, q.dtype, layer)
        fresh = _dot((weights * v_scale).astype(values.dtype), values, (1, 0))
        acc = acc * decay[:, None] + fresh
        return acc, new_top, total * decay + weights.sum(1)

    # A finite top where nothing has been seen yet: the difference from -inf is then no NaN.
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(len(q), NOTHING), jnp.zeros(len(q))
    acc, top, total = _visit(tables, i, body, start)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    query.store(out, i, acc / total[:, None])
    query.store(logsumexp, i, jnp.where(empty, NOTHING, top / LOG2_E + jnp.log(total)))


def _backward_query_kernel(
    index, whole, seen, bits, q, k, v, logsumexp, delta, d_out, dq,
    *, query: _Sequence, key: _Sequence
):  # fmt: skip
    i, tables = pl.program_id(0), Visits(index, whole, seen, bits)
    q, d_out, logsumexp, delta = (query.load(x, i, False) for x in (q, d_out, logsumexp, delta))
    scale = 1 / math.sqrt(query.head_dim)

    def body(j, dq, whole):
        keys, values = key.load(k, j, whole), key.load(v, j, whole)
        scores = _dot(q, keys, (1, 1)) * (scale * LOG2_E)
        weights = jnp.exp2(scores - (logsumexp * LOG2_E)[:, None])
        if not whole:
            weights = jnp.where(_visible(tables, query, i, key, j), weights, 0.0)
        d_scores = weights * (_dot(d_out, values, (1, 1)) - delta[:, None])
        return dq + _dot(d_scores.astype(keys.dtype), keys, (1, 0))

    start = jnp.zeros(q.shape, jnp.float32)
    query.store(dq, i, scale * _visit(tables, i, body, start))


def _backward_key_kernel(
    index, whole, seen, bits, q, k, v, logsumexp, delta, d_out, dk, dv,
    *, query: _Sequence, key: _Sequence
):  # fmt: skip
    j, tables = pl.program_id(0), Visits(index, whole, seen, bits)
    k, v = key.load(k, j, False), key.load(v, j, False)
    scale = 1 / math.sqrt(query.head_dim)

    def body(i, carry, whole):
        dk, dv = carry
        queries, d_outs, norms, deltas = (
            query.load(x, i, whole) for x in (q, d_out, logsumexp, delta)
        )
        # Transposed, [keys, queries], so that the products with dO and q need no transposition.
        scores = _dot(k, queries, (1, 1)) * (scale * LOG2_E)
        weights = jnp.exp2(scores - (norms * LOG2_E)[None])
        if not whole:
            weights = jnp.where(_visible(tables, key, j, query, i), weights, 0.0)
        dv += _dot(weights.astype(d_outs.dtype), d_outs, (1, 0))
        d_scores = weights * (_dot(v, d_outs, (1, 1)) - deltas[None])
        return dk + _dot(d_scores.astype(queries.dtype), queries, (1, 0)), dv

    start = jnp.zeros(k.shape, jnp.float32)
    d_keys, d_values = _visit(tables, j, body, (start, start))
    key.store(dk, j, scale * d_keys)
    key.store(dv, j, d_values)


class _Plan(NamedTuple):
    """What is static about a call."""

    tokens: int
    tile: Tile
    backend: str
    interpret: Any


def _call(kernel, arrays, outputs, rows: int, plan: _Plan):
    """Runs `kernel` on every block of rows of every head of the batch.

    Args:
      arrays: those of two dimensions or fewer are given whole; of others, `[B, N, length]` or
        `[..., B, N, length, D]`, a kernel sees what belongs to its head, with the width padded.
      outputs: shapes and dtypes, with `[B, N]` in front.
      rows: of the sequence.
    """
    batch, heads = outputs[0].shape[:2]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    width = max(16, pl.next_power_of_2(outputs[0].shape[-1]))

    def spec(x):
        if isinstance(x, Quantised):  # scales `[L, B, N, length]`
            block = (x.shape[0], None, None, x.shape[-2])
            scale = pl.BlockSpec(block, lambda i, n, b: (0, b, n, 0))
            return Quantised(spec(x.values), scale)
        if x.ndim <= 2:
            return pl.BlockSpec(x.shape, lambda i, n, b: (0,) * x.ndim)
        if x.ndim == 3:
            return pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, n, 0))
        layers = x.shape[:-4]
        block = (*layers, None, None, x.shape[-2], width)
        return pl.BlockSpec(block, lambda i, n, b: (*(0 for _ in layers), b, n, 0, 0))

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, plan.tile.rows), heads, batch),
        in_specs=[spec(x) for x in arrays],
        out_specs=[spec(x) for x in outputs],
        out_shape=outputs,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=plan.tile.stages),
        interpret=plan.interpret,
    )(*arrays)


def _sides(plan: _Plan, q, k, rows_are_keys: bool = False) -> dict[str, _Sequence]:
    """Queries and keys as a kernel sees them, either of them in the rows of its tile."""
    blocks = plan.tile.rows, plan.tile.columns
    sequence = lambda x, block: _Sequence(x.shape[-2], plan.tokens, x.shape[-1], block)
    return {
        "query": sequence(q, blocks[rows_are_keys]),
        "key": sequence(k, blocks[not rows_are_keys]),
    }


def _tables(plan: _Plan, mask, rows_are_keys: bool = False) -> Visits:
    """The schedule by which a kernel visits the columns of its tile."""
    mask = plain(mask).T if rows_are_keys else plain(mask)
    return visits(mask, plan.tokens, plan.tile.rows, plan.tile.columns)


def _forward(plan: _Plan, q, k, v, mask, layer):
    """Output and logsumexp of `q` `[B, N, length, D]`, `k` and `v` `[L, B, N, length, D]`."""
    if plan.backend == "mosaic":
        return pallas_hopper.forward(q, k, v, plain(mask), layer, plan.tokens, plan.interpret)
    kernel = functools.partial(_forward_kernel, **_sides(plan, q, k))
    outputs = q, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    arrays = *_tables(plan, mask), layer, q, k, v
    return _call(kernel, arrays, outputs, q.shape[2], plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q, k, v, mask):
    return _forward(plan, q, k[None], v[None], mask, np.zeros(1, np.int32))


def _attend_forward(plan: _Plan, q, k, v, mask):
    out, logsumexp = _attend(plan, q, k, v, mask)
    out, logsumexp = (checkpoint_name(x, RESIDUAL) for x in (out, logsumexp))
    return (out, logsumexp), (q, k, v, mask, out, logsumexp)


def _attend_backward(plan: _Plan, residuals, cotangents):
    q, k, v, mask, out, logsumexp = residuals
    d_out, d_logsumexp = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_logsumexp
    arrays = q, k, v, logsumexp, delta, d_out
    if plan.backend == "mosaic":
        gradients = pallas_hopper.backward(*arrays, plain(mask), plan.tokens, plan.interpret)
        return *gradients, None
    kernel = functools.partial(_backward_query_kernel, **_sides(plan, q, k))
    [dq] = _call(kernel, (*_tables(plan, mask), *arrays), (q,), q.shape[2], plan)
    kernel = functools.partial(_backward_key_kernel, **_sides(plan, q, k, True))
    dk, dv = _call(kernel, (*_tables(plan, mask, True), *arrays), (k, v), k.shape[2], plan)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _is_hopper() -> bool:
    return mesh.compute_capability() == 9.0


def _join(x: Cached) -> Cached:
    """Lays frames end to end: `[..., E, T, D]` as `[..., E * T, D]`."""
    if isinstance(x, Quantised):
        return Quantised(_join(x.values), x.scale.reshape(*x.scale.shape[:-3], -1))
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _check_offsets(x: Quantised) -> None:
    """Raises ValueError where Pallas would have Triton count in too few bits.

    It counts in 64 bits in arrays of more than 2^32 bytes alone, and else in 32 with a sign: of
    one byte each, it does not reach numbers that lie between.
    """
    count, most, from_here = math.prod(x.shape), 2**31 - 1, 2**32
    if x.dtype.itemsize == 1 and most < count <= from_here:
        raise ValueError(
            f"pallas_gpu takes a quantised cache of at most {most} or more than {from_here} "
            f"numbers on a device, got {count}: take a smaller batch, attention=xla or a cache "
            "that is not quantised"
        )


def attend(
    q: jax.Array,
    k: Cached,
    v: Cached,
    mask: Mask,
    layer: jax.Array | None = None,
    backend: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`; without a gradient where `layer` is given.

    Products are accumulated in float32. Those of float32 itself are of
    `jax_default_matmul_precision`, like all others: TensorFloat-32 where nothing is said.

    Args:
      backend: 'triton', or 'mosaic' (`pallas_hopper`) on Hopper alone, which leaves a quantised
        cache to Triton. None takes Mosaic's kernels where they run, and else Triton's.
      interpret: whether to run the kernels in Pallas's interpreter, on any device; for Mosaic's,
        JAX's `InterpretGPUParams`.

    Raises:
      ValueError: heads are wider than the kernels' tiles, the dtypes differ, Mosaic's kernels do
        not take such arrays, or Triton would not find all of a quantised cache.
    """
    if q.shape[-1] > HEAD_DIM:
        raise ValueError(f"pallas_gpu takes heads of at most {HEAD_DIM}, got {q.shape[-1]}")
    if not (q.dtype == k.dtype == v.dtype or isinstance(k, Quantised)):
        raise ValueError(f"q, k and v have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    frames, tokens = q.shape[2:4]
    length = max(frames, k.shape[-3]) * tokens
    joined = _join(q), _join(k), _join(v)
    refusal = pallas_hopper.refusal(*joined[:2], tokens)
    if backend == "mosaic" and refusal:
        raise ValueError(f"Mosaic's kernels take {refusal}")
    chosen = backend or ("mosaic" if _is_hopper() and not refusal else "triton")
    if isinstance(k, Quantised):
        chosen = "triton"
        _check_offsets(k)
    if backend is None:
        say_once(f"attention: pallas_gpu, its kernels for {chosen.title()}")
    plan = _Plan(tokens, Tile.choose(q.dtype, length, tokens), chosen, interpret)
    mask = keep_static(mask)
    if layer is None:
        out, logsumexp = _attend(plan, *joined, mask)
    else:
        layer = jnp.asarray(layer, jnp.int32).reshape(1)
        out, logsumexp = _forward(plan, *joined, mask, layer)
    return out.reshape(q.shape), logsumexp.reshape(q.shape[:-1])
