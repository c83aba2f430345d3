"""Attention between frames as Pallas kernels for TPU: forward, backward, and over a cache's layer.

The mask is a table of frames, so the kernels work on *blocks* that it can speak of: a part of one
frame, or several whole frames where these are short. A part may reach past its frame's end: there
it reads zeros, and writes nothing. A list holds the pairs of blocks with a visible pair of frames,
in order; the grid walks this list and nothing else, so that no other pair is fetched or computed.
Where the mask is known only at run time, so are the list and the length of the grid: one kernel
serves training and rollout.

Inside a block everything is kept transposed: scores are `[keys, queries]`. The softmax statistics,
the logsumexp and delta of the backward pass are then rows along the lanes, the reductions run over
sublanes, and a frame of 1,560 tokens (no multiple of 128) pads one axis of the scores, not two.

    (1) s = k q^T / sqrt(D)        (2) p = exp(s - logsumexp)          (3) out^T = v^T p
    (4) delta = sum(dout * out) - dlogsumexp
    (5) ds = p * (v dout^T - delta)  (6) dv = p dout   (7) dk = ds q   (8) dq^T = k^T ds

(FlashAttention-2, arXiv 2307.08691, Algorithms 1 and 2; dlogsumexp enters by (4).)

Dimension letters: B batch, N heads, E entries (frames), T tokens a frame, D head_dim, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cfpp.attention import schedule
from cfpp.attention.cache import Cached, Quantised, cut
from cfpp.attention.reference import LOG2_E, NOTHING
from cfpp.attention.schedule import RESIDUAL, Mask

SMALLEST_PART, LARGEST_BLOCK = 128, 1664  # tokens
# At the latter dK, dV take 9.1 MiB of a v5e's 16 MiB in bfloat16, and 11.5 MiB in float32, with
# heads of 128. In float32, heads wider than 192 get blocks of fewer tokens.
LARGEST_BYTES = LARGEST_BLOCK * 192 * 4
MOST_NUMBERS = 2**18 - 2**10  # of the lists of pairs, int32: a TPU's scalar memory has 1 MiB
LANES = 128  # of a TPU's registers: what blocks that do not fill a frame are multiples of

# (keys, queries) whose scores are computed at a time: of those tried, these keep the matrix units
# busiest in the compiler's schedules for v5e and v6e (benchmarks/tpu_compile.py). The forward pass
# has a chain of maxima to wait for, so its scores are computed AHEAD parts early.
FORWARD_PART = 128, 256
BACKWARD_PART = 512, LARGEST_BLOCK
AHEAD = 2

MASKED = 2 * NOTHING  # exp(MASKED - NOTHING) is 0, so queries that see nothing need no care

KEYS_BY_DIM = ((1,), (1,)), ((), ())  # a b^T
ROWS_AWAY = ((0,), (0,)), ((), ())  # a^T b


class Cut(NamedTuple):
    """How the frames of one side are cut: into blocks of `group` frames, or `split` blocks each."""

    group: int
    split: int
    rows: int  # tokens of a block
    tail: int = 0  # tokens of the last block of each frame, 0 where that is `rows`

    @classmethod
    def choose(cls, frames: int, tokens: int, largest: int, in_place: bool = False) -> "Cut":
        """The largest blocks of at most `largest` tokens that cut frames evenly, or nearly.

        Args:
          in_place: whether to cut without moving data, which a TPU has in tiles of 8 tokens.
        """
        if tokens <= largest:
            most = min(largest // tokens, 31)  # frames of a block are bits of an int32
            if in_place and tokens % 8:
                most = 1
            group = max(n for n in range(1, most + 1) if frames % n == 0)
            return cls(group, 1, group * tokens)
        parts = range(SMALLEST_PART, largest + 1)
        rows = max((n for n in parts if tokens % n == n % 8 == 0), default=0)
        if rows:
            return cls(1, tokens // rows, rows)
        split = -(-tokens // largest)
        rows = -(-tokens // (split * LANES)) * LANES
        split = -(-tokens // rows)
        return cls(1, split, rows, tokens - (split - 1) * rows)

    def cut(self, x: Cached) -> Cached:
        """`[..., E, T, D]` as `[..., blocks, rows, D]`; as it is if blocks do not fill frames."""
        return x if self.tail else cut(x, self.rows)

    def spec(self, array: jax.Array, place: Callable) -> pl.BlockSpec:
        """A block of an array, `[..., rows, D]` or `[..., 1, rows]`.

        Args:
          place: from indices of the grid and the tables to all but the last two indices of a block
            of an array that was cut.
        """
        outer, last = (None,) * (array.ndim - 2), array.shape[-2:]
        if not self.tail:
            return pl.BlockSpec((*outer, *last), lambda *at: (*place(*at), 0, 0))
        by_lane = last[0] == 1

        def index(*at):
            *before, block = place(*at)
            frame, part = jax.lax.div(block, self.split), jax.lax.rem(block, self.split)
            return (*before, frame, *((0, part) if by_lane else (part, 0)))

        return pl.BlockSpec((*outer, *((1, self.rows) if by_lane else (self.rows, last[1]))), index)

    def end(self, block):
        """The tokens of a block, the int32 `block`, that lie in its frame."""
        if not self.tail:
            return self.rows
        return jnp.where(jax.lax.rem(block, self.split) == self.split - 1, self.tail, self.rows)


class Pairs(NamedTuple):
    """The pairs of blocks that a kernel visits, in order; all int32.

    A block that meets no other is visited once with nothing to see, for its output to be written.

    Attributes:
      outer, inner: `[pairs]`, the block whose output is computed, and the one that it meets.
      kind: `[pairs]`, 0 where nothing is visible, 1 where some frames are, 2 where all are and
        neither block reaches past a frame's end.
      bits: `[pairs * query group]`, what each query frame of the pair sees: bit j is frame j of
        the key block.
      length: how many there are; the arrays may be longer.
    """

    outer: Mask
    inner: Mask
    kind: Mask
    bits: Mask
    length: Mask


def pairs(mask: Mask, query: Cut, key: Cut, by_key: bool) -> Pairs:
    """The pairs of blocks that a mask of frames calls for.

    Args:
      mask: bool `[query frames, key frames]`: NumPy makes NumPy pairs, JAX JAX ones.
      query, key: how either side is cut.
      by_key: whether the outer blocks are those of keys.
    """
    xp = np if isinstance(mask, np.ndarray) else jnp
    bits = schedule.blocks(schedule.split(mask, query.split), query.group, key.group).bits
    bits = bits.reshape(-1, query.group, bits.shape[1])
    bits = bits.transpose((2, 0, 1) if by_key else (0, 2, 1))  # [outer, inner, query group]
    some, every = (bits > 0).any(2), (bits == 2**key.group - 1).all(2)
    for side, axis in ((query, int(by_key)), (key, int(not by_key))):
        if side.tail:
            whole = np.arange(some.shape[axis]) % side.split < side.split - 1
            every &= np.expand_dims(whole, 1 - axis)
    alone = ~some.any(1, keepdims=True) & (np.arange(some.shape[1]) == 0)
    size = {} if xp is np else {"size": some.size, "fill_value": 0}
    outer, inner = xp.nonzero(some | alone, **size)
    kind = some.astype(np.int32) + every
    arrays = outer, inner, kind[outer, inner], bits[outer, inner].reshape(-1), (some | alone).sum()
    return Pairs(*(xp.asarray(x, np.int32) for x in arrays))


def _dot(a, b, dimensions=(((1,), (0,)), ((), ()))):
    """A product accumulated in float32."""
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _parts(rows: int, columns: int, size: tuple[int, int]) -> list:
    """Slices (keys, queries) of at most `size` that make up scores of `rows` x `columns`."""
    cut = lambda length, most: [
        pl.ds(start, min(most, length - start)) for start in range(0, length, most)
    ]
    return [(r, c) for c in cut(columns, size[1]) for r in cut(rows, size[0])]


class _Visit:
    """What every kernel asks about the pair of blocks that it visits."""

    def __init__(self, query: Cut, key: Cut, pairs, by_key: bool = False):
        outer, inner, kind, bits = pairs
        step, last_step = pl.program_id(2), pl.num_programs(2) - 1
        self.first = (step == 0) | (outer[jnp.maximum(step - 1, 0)] != outer[step])
        self.last = (step == last_step) | (outer[jnp.minimum(step + 1, last_step)] != outer[step])
        self.kind = kind[step]
        self.bits = [bits[step * query.group + frame] for frame in range(query.group)]
        self.query, self.key = query, key
        self.query_end = query.end((inner if by_key else outer)[step])
        self.key_end = key.end((outer if by_key else inner)[step])

    def compute(self, body) -> None:
        """Runs `body(part)` unless nothing is visible; `part` is a `_Whole` or a `_Partly`."""
        pl.when(self.kind == 2)(lambda: body(_Whole()))
        if self.query.group > 1 or self.key.group > 1 or self.query.tail or self.key.tail:
            pl.when(self.kind == 1)(lambda: body(_Partly(self)))


class _Whole:
    """A pair of blocks that see each other as a whole."""

    def visible(self, rows, columns) -> jax.Array | None:
        """Which of the keys `rows` the queries `columns` see, bool `[keys, queries]`; None: all."""
        return None

    def keys(self, x, rows):
        """Those of the key block's tokens `rows`, along axis 0, with zeros past the frame's end."""
        return x

    def queries(self, x, columns, axis=0):
        """The same of the query block."""
        return x


class _Partly(_Whole):
    """A pair of blocks of which some frames, or tokens, do not see one another."""

    def __init__(self, visit: _Visit):
        self.visit = visit

    def visible(self, rows, columns):
        query, key = self.visit.query, self.visit.key
        lane = _positions(columns, 1)
        seen = jnp.zeros_like(lane)
        for frame, bits in enumerate(self.visit.bits):
            seen = jnp.where(lane >= frame * (query.rows // query.group), bits, seen)
        key_row = _positions(rows, 0)
        frame = jax.lax.div(key_row, jnp.full_like(key_row, key.rows // key.group))
        visible = (seen >> frame) & 1 == 1
        return visible & (key_row < self.visit.key_end) if key.tail else visible

    def keys(self, x, rows):
        if not self.visit.key.tail or isinstance(x, float):
            return x
        return jnp.where(_positions(rows, 0) < self.visit.key_end, x, 0)

    def queries(self, x, columns, axis=0):
        if not self.visit.query.tail:
            return x
        return jnp.where(_positions(columns, axis) < self.visit.query_end, x, 0)


def _positions(part, axis: int):
    """The tokens of a part of a block, int32 `[size, 1]` or `[1, size]`."""
    shape = (1, part.size) if axis else (part.size, 1)
    return part.start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _factors(x, rows, dtype):
    """Keys or values `rows` of a block in `dtype`, and scales `[rows, 1]`, as `cache.factors`."""
    if not isinstance(x, Quantised):
        return x[rows, :], 1.0
    scale = jnp.broadcast_to(x.scale[:, rows], (8, rows.size)).T[:, :1]
    return x.values[rows, :].astype(dtype), scale


def _scores(k, q, visible, k_scale=1.0):
    """Equation (1) in units of log 2, float32 `[keys, queries]`."""
    scores = _dot(k, q, KEYS_BY_DIM) * (k_scale * (LOG2_E / math.sqrt(q.shape[1])))
    return scores if visible is None else jnp.where(visible, scores, MASKED)


def _attention_forward(query, key, *refs):
    *pairs, _, q, k, v, out, logsumexp, weighted, top, total = refs
    visit = _Visit(query, key, pairs)

    @pl.when(visit.first)
    def _():
        weighted[...] = jnp.zeros_like(weighted)  # [D, queries]
        top[...] = jnp.full_like(top, NOTHING)  # [1, queries]
        total[...] = jnp.zeros_like(total)

    def attend_to(part):
        parts = _parts(key.rows, query.rows, FORWARD_PART)

        def scores(rows, columns):
            keys, k_scale = _factors(k, rows, q.dtype)
            return _scores(keys, q[columns, :], part.visible(rows, columns), k_scale)

        ahead = [scores(*part) for part in parts[:AHEAD]]
        for n, (rows, columns) in enumerate(parts):
            ahead += [scores(*part) for part in parts[n + AHEAD : n + AHEAD + 1]]
            own, old_top = ahead.pop(0), top[:, columns]
            new_top = jnp.maximum(old_top, own.max(0, keepdims=True))
            weights = jnp.exp2(own - new_top)
            kept = jnp.exp2(old_top - new_top)
            total[:, columns] = total[:, columns] * kept + weights.sum(0, keepdims=True)
            values, v_scale = (part.keys(x, rows) for x in _factors(v, rows, q.dtype))
            fresh = _dot(values, (weights * v_scale).astype(q.dtype), ROWS_AWAY)
            weighted[:, columns] = weighted[:, columns] * kept + fresh
            top[:, columns] = new_top

    visit.compute(attend_to)

    @pl.when(visit.last)
    def _():
        seen = total[...] > 0
        divisor = jnp.where(seen, total[...], 1)
        out[...] = (weighted[...] / divisor).T.astype(out.dtype)
        logsumexp[...] = jnp.where(seen, (top[...] + jnp.log2(divisor)) / LOG2_E, NOTHING)


def _score_gradient(part, rows, columns, q, dout, logsumexp, delta, k, v):
    """Equations (2) and (5) for keys `rows` and queries `columns` of the blocks.

    Returns:
      p and ds, float32 `[keys, queries]`, the latter without the scale; q, dout and k as they
      enter the products with these.
    """
    q, dout = (part.queries(x[columns, :], columns) for x in (q, dout))
    logsumexp, delta = (part.queries(x[:, columns], columns, 1) for x in (logsumexp, delta))
    k, v = (part.keys(x[rows, :], rows) for x in (k, v))
    p = jnp.exp2(_scores(k, q, part.visible(rows, columns)) - logsumexp * LOG2_E)
    return p, p * (_dot(v, dout, KEYS_BY_DIM) - delta), q, dout, k


def _attention_dq(query, key, *refs):
    *pairs, _, q, dout, logsumexp, delta, k, v, dq, gradient = refs
    visit = _Visit(query, key, pairs)

    @pl.when(visit.first)
    def _():
        gradient[...] = jnp.zeros_like(gradient)  # [D, queries]

    def attend_to(part):
        for rows, columns in _parts(key.rows, query.rows, BACKWARD_PART):
            _, ds, _, _, keys = _score_gradient(
                part, rows, columns, q, dout, logsumexp, delta, k, v
            )
            gradient[:, columns] += _dot(keys, ds.astype(keys.dtype), ROWS_AWAY)

    visit.compute(attend_to)

    @pl.when(visit.last)
    def _():
        dq[...] = (gradient[...].T / math.sqrt(q.shape[1])).astype(dq.dtype)


def _attention_dkv(query, key, *refs):
    *pairs, _, q, dout, logsumexp, delta, k, v, dk, dv, k_gradient, v_gradient = refs
    visit = _Visit(query, key, pairs, by_key=True)

    @pl.when(visit.first)
    def _():
        k_gradient[...] = jnp.zeros_like(k_gradient)  # [keys, D]
        v_gradient[...] = jnp.zeros_like(v_gradient)

    def attend_to(part):
        for rows, columns in _parts(key.rows, query.rows, BACKWARD_PART):
            p, ds, queries, douts, _ = _score_gradient(
                part, rows, columns, q, dout, logsumexp, delta, k, v
            )
            v_gradient[rows, :] += _dot(p.astype(douts.dtype), douts)
            k_gradient[rows, :] += _dot(ds.astype(queries.dtype), queries)

    visit.compute(attend_to)

    @pl.when(visit.last)
    def _():
        dk[...] = (k_gradient[...] / math.sqrt(q.shape[1])).astype(dk.dtype)
        dv[...] = v_gradient[...].astype(dv.dtype)


class _Plan(NamedTuple):
    """What is known when the kernels are compiled."""

    query: Cut
    key: Cut
    lengths: tuple[int, int] | None  # of the pairs by query and by key; None: not known
    live: int  # pairs of tokens that are visible; all pairs where that is not known
    interpret: bool | pltpu.InterpretParams


def _call(kernel, plan, by_key, pairs, layer, inputs, outputs, scratch, products):
    """Runs a kernel.

    Args:
      kernel: one of the kernels above.
      plan: what is known of it.
      by_key: whether the outer blocks are those of keys.
      pairs: those that it visits.
      layer: int32 `[1]`, which layer it reads of keys and values with layers.
      inputs: of each the side that it belongs to, "query" or "key", and the array.
      outputs: the same with types.
      scratch: shapes of float32 scratch.
      products: matrix products that it takes, for the compiler's estimate of its cost.
    """
    batch, heads, *_, head_dim = inputs[0][1].shape
    is_outer = lambda side: (side == "key") == by_key

    def spec(side, array):
        stacked = array.ndim == 6

        def place(b, n, step, outer, inner, kind, bits, layer):
            block = (outer if is_outer(side) else inner)[step]
            return (*((layer[0],) if stacked else ()), b, n, block)

        return getattr(plan, side).spec(array, place)

    def traffic(side, array):
        tiles = array.shape[-3] if is_outer(side) else len(pairs.outer)
        return batch * heads * tiles * math.prod(array.shape[-2:]) * array.dtype.itemsize

    scores = batch * heads * plan.live
    return pl.pallas_call(
        functools.partial(kernel, plan.query, plan.key),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, heads, plan.lengths[by_key] if plan.lengths else pairs.length),
            in_specs=[jax.tree.map(functools.partial(spec, side), x) for side, x in inputs],
            out_specs=[spec(*x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[x for _, x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * head_dim,
            transcendentals=scores,
            bytes_accessed=sum(
                traffic(side, x)
                for side, tree in (*inputs, *outputs)
                for x in jax.tree.leaves(tree)
            ),
        ),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(*pairs[:4], layer, *(x for _, x in inputs))


def _forward(plan, q, k, v, pairs, layer):
    """Attention of blocks `[B, N, blocks, rows, D]`, with a logsumexp `[B, N, blocks, 1, rows]`."""
    rows, head_dim = plan.query.rows, q.shape[-1]
    logsumexp = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[-2]), jnp.float32)
    return _call(
        _attention_forward, plan, False, pairs, layer,
        inputs=[("query", q), ("key", k), ("key", v)],
        outputs=[("query", jax.typeof(q)), ("query", logsumexp)],
        scratch=[(head_dim, rows), (1, rows), (1, rows)],
        products=2,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, by_query, by_key, layer):
    return _forward(plan, q, k, v, by_query, layer)


def _attend_forward(plan, q, k, v, by_query, by_key, layer):
    # Not `_forward` itself: a kernel whose results are kept would be run again all the same.
    out, logsumexp = _attend(plan, q, k, v, by_query, by_key, layer)
    out, logsumexp = (checkpoint_name(x, RESIDUAL) for x in (out, logsumexp))
    return (out, logsumexp), (q, k, v, by_query, by_key, layer, out, logsumexp)


def _attend_backward(plan, residuals, cotangents):
    q, k, v, by_query, by_key, layer, out, logsumexp = residuals
    dout, dlogsumexp = cotangents
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)[..., None, :] - dlogsumexp
    of_queries = [("query", x) for x in (q, dout, logsumexp, delta)]
    inputs = [*of_queries, ("key", k), ("key", v)]
    (dq,) = _call(
        _attention_dq, plan, False, by_query, layer, inputs,
        outputs=[("query", jax.typeof(q))],
        scratch=[(q.shape[-1], plan.query.rows)],
        products=3,
    )  # fmt: skip
    dk, dv = _call(
        _attention_dkv, plan, True, by_key, layer, inputs,
        outputs=[("key", jax.typeof(k)), ("key", jax.typeof(v))],
        scratch=[(plan.key.rows, k.shape[-1])] * 2,
        products=4,
    )  # fmt: skip
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: jax.Array,
    k: Cached,
    v: Cached,
    mask: Mask,
    layer: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`; without a gradient where `layer` is given.

    Products are accumulated in float32. Those of float32 itself are of
    `jax_default_matmul_precision`, like all others: bfloat16 where nothing is said.

    Args:
      interpret: whether to run the kernels in Pallas's interpreter, on any device; or
        `pltpu.InterpretParams`, to emulate a TPU's memory too.

    Raises:
      ValueError: the dtypes do not fit, or the mask's lists of pairs fit no TPU.
    """
    plain = not isinstance(k, Quantised)
    if (plain and not q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            "pallas_tpu takes q, k and v all in float32 or all in bfloat16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    tokens, head_dim = q.shape[3:]
    largest = min(LARGEST_BLOCK, LARGEST_BYTES // (head_dim * q.dtype.itemsize))
    query = Cut.choose(mask.shape[0], tokens, largest)
    key = Cut.choose(mask.shape[1], tokens, largest, in_place=layer is not None)
    by_query, by_key = (pairs(mask, query, key, by_key) for by_key in (False, True))
    numbers = max(sum(x.size for x in lists) for lists in (by_query, by_key))
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"a mask of {mask.shape} frames of {tokens} tokens takes lists of {numbers} numbers, "
            f"and pallas_tpu has room for {MOST_NUMBERS}; take fewer frames, or xla"
        )
    known = isinstance(mask, np.ndarray)
    plan = _Plan(
        query,
        key,
        lengths=(int(by_query.length), int(by_key.length)) if known else None,
        live=int(mask.sum() if known else mask.size) * tokens**2,
        interpret=interpret,
    )
    arrays = query.cut(q), key.cut(k), key.cut(v)
    if layer is None:
        out, logsumexp = _attend(plan, *arrays, by_query, by_key, jnp.zeros(1, jnp.int32))
    else:
        layer = jnp.asarray(layer, jnp.int32).reshape(1)
        out, logsumexp = _forward(plan, *arrays, by_query, layer)
    return out.reshape(q.shape), logsumexp.reshape(q.shape[:-1])
