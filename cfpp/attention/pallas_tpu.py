"""Attention between frames as Pallas kernels for TPU: forward, backward, and over a cache's layer.

The mask is a table of frames, so the kernels work on *blocks* that it can speak of: a part of one
frame, or several whole frames where these are short. A schedule lists the pairs of blocks that hold
a visible pair of frames, in order; the grid walks this list and nothing else, so that an empty pair
is neither fetched nor computed. Where the mask is known only at run time, so are the list and the
length of the grid: one kernel serves training and rollout.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cfpp.attention.schedule import RESIDUAL

LARGEST_BLOCK = 1664  # tokens; beside it, scores of KEY_ROWS rows fill the 16 MiB of a v5e
KEY_ROWS = 512  # keys whose scores are held at a time
UNSEEN = -1e30  # logsumexp of a query that sees nothing
MASKED = 2 * UNSEEN  # a masked score: exp(MASKED - UNSEEN) is 0, so unseen queries need no care
LOG2_E = np.float32(np.log2(np.e))  # the hardware's exponential is 2^x

KEYS_BY_DIM = ((1,), (1,)), ((), ())  # a b^T
ROWS_AWAY = ((0,), (0,)), ((), ())  # a^T b


class Blocks(NamedTuple):
    """How the tokens of E frames are cut: blocks of `group` frames, or `split` blocks a frame."""

    group: int
    split: int
    rows: int  # tokens in a block

    def cut(self, x: jax.Array) -> jax.Array:
        """`[..., E, T, D]` as `[..., blocks, rows, D]`."""
        return x.reshape(*x.shape[:-3], -1, self.rows, x.shape[-1])


def blocks(entries: int, tokens: int) -> Blocks:
    """The largest blocks of at most `LARGEST_BLOCK` tokens that cut frames evenly.

    Raises:
      ValueError: a frame is longer than a block and divides into no parts of 128 tokens or more.
    """
    if tokens <= LARGEST_BLOCK:
        most = min(LARGEST_BLOCK // tokens, 31)  # frames of a block are bits of an int32
        group = max(n for n in range(1, most + 1) if entries % n == 0)
        return Blocks(group, 1, group * tokens)
    parts = [n for n in range(128, LARGEST_BLOCK + 1) if tokens % n == 0]
    if not parts:
        raise ValueError(
            f"a frame of {tokens} tokens does not divide into blocks of 128 to {LARGEST_BLOCK} "
            "tokens; frames of rows x columns tokens do"
        )
    rows = max(parts, key=lambda n: (n % 8 == 0, n))  # 8: a tile's rows, so cutting moves nothing
    return Blocks(1, tokens // rows, rows)


class Schedule(NamedTuple):
    """The visits of a kernel to pairs of blocks, in order; int32 arrays.

    A block to which no visit would come is visited once with nothing to see, to be written.

    Attributes:
      outer, inner: `[visits]`, the block that is written and the one that it meets.
      kind: `[visits]`, 0: nothing is visible, 1: some frames are, 2: all.
      bits: `[visits * query group]`, for each query frame of the pair of blocks the frames of the
        key block that it sees, frame j as bit j.
      visits: a scalar; the arrays may be longer than this.
    """

    outer: jax.Array
    inner: jax.Array
    kind: jax.Array
    bits: jax.Array
    visits: jax.Array


def schedule(mask, query: Blocks, key: Blocks, by_key: bool) -> Schedule:
    """The visits that a frame mask calls for.

    Args:
      mask: bool `[query frames, key frames]`; a NumPy array gives NumPy arrays.
      query, key: how either side is cut.
      by_key: the outer blocks are those of keys.
    """
    xp = np if isinstance(mask, np.ndarray) else jnp
    table = xp.repeat(xp.repeat(mask, query.split, 0), key.split, 1)
    q_blocks, k_blocks = table.shape[0] // query.group, table.shape[1] // key.group
    table = table.reshape(q_blocks, query.group, k_blocks, key.group).swapaxes(1, 2)
    kind = table.any((2, 3)).astype(np.int32) + table.all((2, 3))
    bits = (table * (1 << np.arange(key.group))).sum(3)
    if by_key:
        kind, bits = kind.T, bits.swapaxes(0, 1)
    unseen = (kind == 0).all(1, keepdims=True)
    visited = (kind > 0) | (unseen & (np.arange(kind.shape[1]) == 0))
    known = {} if xp is np else {"size": visited.size, "fill_value": 0}
    outer, inner = xp.nonzero(visited, **known)
    arrays = outer, inner, kind[outer, inner], bits[outer, inner].reshape(-1), visited.sum()
    return Schedule(*(xp.asarray(a, np.int32) for a in arrays))


def _dot(a, b, dimensions=(((1,), (0,)), ((), ()))):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


class _Visit:
    """What every kernel asks about the visit that it is on."""

    def __init__(self, query: Blocks, key: Blocks, outer, inner, kind, bits):
        step, last_step = pl.program_id(2), pl.num_programs(2) - 1
        self.first = (step == 0) | (outer[jnp.maximum(step - 1, 0)] != outer[step])
        self.last = (step == last_step) | (outer[jnp.minimum(step + 1, last_step)] != outer[step])
        self.kind = kind[step]
        self.bits = [bits[step * query.group + frame] for frame in range(query.group)]
        self.query, self.key = query, key

    def compute(self, body) -> None:
        """Runs `body(rows, visible)` for slices of the keys, unless nothing is visible.

        `visible` is None where all is, else bool `[keys, queries]`.
        """

        def run(partial):
            for start in range(0, self.key.rows, KEY_ROWS):
                rows = pl.ds(start, min(KEY_ROWS, self.key.rows - start))
                body(rows, self.visible(rows) if partial else None)

        pl.when(self.kind == 2)(lambda: run(partial=False))
        if self.query.group > 1 or self.key.group > 1:
            pl.when(self.kind == 1)(lambda: run(partial=True))

    def visible(self, rows) -> jax.Array:
        """Which of the keys `rows` each query sees, from the bits of its frame."""
        q_tokens, k_tokens = (x.rows // x.group for x in (self.query, self.key))
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.query.rows), 1)
        seen = jnp.zeros_like(lane)
        for frame, bits in enumerate(self.bits):
            seen = jnp.where(lane >= frame * q_tokens, bits, seen)
        key_row = rows.start + jax.lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0)
        return (seen >> (key_row // k_tokens)) & 1 == 1


def _scores(k, q, visible):
    """Equation (1) in units of log 2, float32 `[keys, queries]`."""
    scores = _dot(k, q, KEYS_BY_DIM) * (LOG2_E / np.float32(np.sqrt(q.shape[1])))
    return scores if visible is None else jnp.where(visible, scores, MASKED)


def _forward_kernel(query, key, *refs):
    *schedule, _, q, k, v, out, logsumexp, weighted, top, total = refs
    visit = _Visit(query, key, *schedule)

    @pl.when(visit.first)
    def _():
        weighted[...] = jnp.zeros_like(weighted)  # [D, queries]
        top[...] = jnp.full_like(top, UNSEEN)  # [1, queries]
        total[...] = jnp.zeros_like(total)

    def attend_to(rows, visible):
        scores = _scores(k[rows, :], q[...], visible)
        new_top = jnp.maximum(top[...], scores.max(0, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        kept = jnp.exp2(top[...] - new_top)
        total[...] = total[...] * kept + weights.sum(0, keepdims=True)
        fresh = _dot(v[rows, :], weights.astype(v.dtype), ROWS_AWAY)
        weighted[...] = weighted[...] * kept + fresh
        top[...] = new_top

    visit.compute(attend_to)

    @pl.when(visit.last)
    def _():
        seen = total[...] > 0
        divisor = jnp.where(seen, total[...], 1)
        out[...] = (weighted[...] / divisor).T.astype(out.dtype)
        logsumexp[...] = jnp.where(seen, (top[...] + jnp.log2(divisor)) / LOG2_E, UNSEEN)


def _score_gradient(q, k, v, dout, logsumexp, delta, visible):
    """Equations (2) and (5): p and ds, float32 `[keys, queries]`; ds lacks the scale."""
    p = jnp.exp2(_scores(k, q, visible) - logsumexp * LOG2_E)
    return p, p * (_dot(v, dout, KEYS_BY_DIM) - delta)


def _query_gradient_kernel(query, key, *refs):
    *schedule, _, q, dout, logsumexp, delta, k, v, dq, gradient = refs
    visit = _Visit(query, key, *schedule)

    @pl.when(visit.first)
    def _():
        gradient[...] = jnp.zeros_like(gradient)  # [D, queries]

    def attend_to(rows, visible):
        _, ds = _score_gradient(
            q[...], k[rows, :], v[rows, :], dout[...], logsumexp[...], delta[...], visible
        )
        gradient[...] += _dot(k[rows, :], ds.astype(k.dtype), ROWS_AWAY)

    visit.compute(attend_to)

    @pl.when(visit.last)
    def _():
        dq[...] = (gradient[...].T / np.float32(np.sqrt(q.shape[1]))).astype(dq.dtype)


def _key_value_gradient_kernel(query, key, *refs):
    *schedule, _, q, dout, logsumexp, delta, k, v, dk, dv, k_gradient, v_gradient = refs
    visit = _Visit(query, key, *schedule)

    @pl.when(visit.first)
    def _():
        k_gradient[...] = jnp.zeros_like(k_gradient)  # [keys, D]
        v_gradient[...] = jnp.zeros_like(v_gradient)

    def attend_to(rows, visible):
        p, ds = _score_gradient(
            q[...], k[rows, :], v[rows, :], dout[...], logsumexp[...], delta[...], visible
        )
        v_gradient[rows, :] += _dot(p.astype(dout.dtype), dout[...])
        k_gradient[rows, :] += _dot(ds.astype(q.dtype), q[...])

    visit.compute(attend_to)

    @pl.when(visit.last)
    def _():
        dk[...] = (k_gradient[...] / np.float32(np.sqrt(q.shape[1]))).astype(dk.dtype)
        dv[...] = v_gradient[...].astype(dv.dtype)


class _Static(NamedTuple):
    """What the kernels know when they are compiled."""

    query: Blocks
    key: Blocks
    visits: tuple[int, int] | None  # by query and by key; None: known only at run time
    live: int  # frame pairs that are visible, all of them where that is known only at run time
    interpret: object


def _call(kernel, static, by_key, schedule, layer, inputs, outputs, scratch, products):
    """Runs a kernel over a schedule.

    Args:
      kernel: one of the kernels above.
      static: what it knows at compile time.
      by_key: as in `schedule`.
      schedule: the visits.
      layer: int32 `[1]`, the layer that is read of keys and values that have layers.
      inputs: pairs of a side, "query" or "key", and an array.
      outputs: pairs of a side and a type.
      scratch: shapes of float32 scratch.
      products: matrix products for a pair of blocks, for the cost estimate.
    """
    batch, heads, _, _, head_dim = inputs[0][1].shape
    visits = static.visits[by_key] if static.visits else schedule.visits

    def spec(side, array):
        stacked = array.ndim == 6

        def index(b, n, step, outer, inner, kind, bits, layer):
            block = (outer if (side == "key") == by_key else inner)[step]
            return (*((layer[0],) if stacked else ()), b, n, block, 0, 0)

        return pl.BlockSpec((*(None,) * (array.ndim - 2), *array.shape[-2:]), index)

    def fetched(side, array):
        tiles = array.shape[-3] if (side == "key") == by_key else len(schedule.outer)
        return batch * heads * tiles * int(np.prod(array.shape[-2:])) * array.dtype.itemsize

    scores = batch * heads * static.live
    return pl.pallas_call(
        functools.partial(kernel, static.query, static.key),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, heads, visits),
            in_specs=[spec(*x) for x in inputs],
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
            bytes_accessed=sum(fetched(*x) for x in (*inputs, *outputs)),
        ),
        interpret=static.interpret,
        name=kernel.__name__.strip("_"),
    )(*schedule[:4], layer, *(x for _, x in inputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, schedules, layer):
    """Attention over blocks, `[B, N, blocks, rows, D]`; the logsumexp is `[B, N, blocks, 1, rows]`."""
    rows, head_dim = q.shape[-2:]
    statistics = (*q.shape[:3], 1, rows)
    return _call(
        _forward_kernel, static, False, schedules[0], layer,
        inputs=[("query", q), ("key", k), ("key", v)],
        outputs=[("query", jax.typeof(q)), ("query", jax.ShapeDtypeStruct(statistics, jnp.float32))],
        scratch=[(head_dim, rows), (1, rows), (1, rows)],
        products=2,
    )  # fmt: skip


def _attend_forward(static, q, k, v, schedules, layer):
    out, logsumexp = _attend(static, q, k, v, schedules, layer)
    out, logsumexp = (checkpoint_name(x, RESIDUAL) for x in (out, logsumexp))
    return (out, logsumexp), (q, k, v, schedules, layer, out, logsumexp)


def _attend_backward(static, saved, gradients):
    q, k, v, schedules, layer, out, logsumexp = saved
    dout, dlogsumexp = gradients
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)[..., None, :] - dlogsumexp
    query_side = [("query", x) for x in (q, dout, logsumexp, delta)]
    inputs = [*query_side, ("key", k), ("key", v)]
    (dq,) = _call(
        _query_gradient_kernel, static, False, schedules[0], layer, inputs,
        outputs=[("query", jax.typeof(q))],
        scratch=[q.shape[:-3:-1]],
        products=3,
    )  # fmt: skip
    dk, dv = _call(
        _key_value_gradient_kernel, static, True, schedules[1], layer, inputs,
        outputs=[("key", jax.typeof(k)), ("key", jax.typeof(v))],
        scratch=[k.shape[-2:], v.shape[-2:]],
        products=4,
    )  # fmt: skip
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(q, k, v, mask, layer=None, interpret=False) -> tuple[jax.Array, jax.Array]:
    """Softmax attention between the tokens of frames that see one another.

    Nothing of size tokens x tokens is held. Float32 operands are multiplied at JAX's matmul
    precision, bfloat16 ones as they are, both with float32 accumulation.

    Args:
      q: float32 or bfloat16 `[B, N, query E, T, D]`.
      k, v: `[B, N, key E, T, D]`, or with `layer` `[L, B, N, key E, T, D]`, read in place.
      mask: bool `[query E, key E]`, True where a frame sees a frame: a NumPy array, or a JAX array
        where it is known only at run time.
      layer: int32 scalar, the layer of `k` and `v` to read; they then have no gradient.
      interpret: what `pl.pallas_call` takes: True emulates the kernel without a TPU.

    Returns:
      The output, like `q`, and the float32 logsumexp of the scaled scores, `[B, N, query E, T]`.
      A query that sees nothing has output 0 and logsumexp -1e30.

    Raises:
      ValueError: shapes do not fit, or a frame cannot be cut into blocks (see `blocks`).
    """
    tokens = q.shape[3]
    expected = (*q.shape[:2], mask.shape[1], tokens, q.shape[4])
    if layer is not None:
        expected = (k.shape[0], *expected)
    if mask.shape[0] != q.shape[2] or k.shape != expected or v.shape != expected:
        raise ValueError(
            f"a mask of {mask.shape[0]} x {mask.shape[1]} frames and queries {q.shape} call for "
            f"keys and values {expected}, got {k.shape} and {v.shape}"
        )
    query, key = blocks(mask.shape[0], tokens), blocks(mask.shape[1], tokens)
    schedules = tuple(schedule(mask, query, key, by_key) for by_key in (False, True))
    fixed = isinstance(mask, np.ndarray)
    static = _Static(
        query,
        key,
        visits=tuple(int(s.visits) for s in schedules) if fixed else None,
        live=int(mask.sum() if fixed else mask.size) * tokens**2,
        interpret=interpret,
    )
    layer = jnp.asarray([0 if layer is None else layer], jnp.int32)
    out, logsumexp = _attend(static, query.cut(q), key.cut(k), key.cut(v), schedules, layer)
    return out.reshape(q.shape), logsumexp.reshape(q.shape[:4])
