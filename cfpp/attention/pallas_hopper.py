"""The kernels of `pallas_gpu` for Hopper, by Pallas's Mosaic GPU backend.

One warpgroup loads blocks by the tensor memory accelerator, two multiply, each its own 64 rows, all
from the same schedule (warp specialisation, FlashAttention-3, arXiv 2407.08608). What lies past the
end of a sequence is read as zeros: so the hardware does it.

Blocks of rows of one head run at the same time, so that they find its columns in the L2 cache, and
those that visit the most blocks run first, so that the last to end are short.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from cfpp.attention.reference import LOG2_E, NOTHING
from cfpp.attention.schedule import Mask
from cfpp.attention.visits import Visits, visits

ROWS = 64  # of a warpgroup
GROUPS = 2  # that multiply
LARGEST_BLOCK = 128  # tokens


class _Plan(NamedTuple):
    """What is static about a kernel."""

    tokens: int  # of a frame
    columns: int  # tokens of a block that passes by
    slots: int  # such blocks in shared memory
    interpret: Any  # JAX's `InterpretGPUParams`, or False


class _Turns(NamedTuple):
    """Lets one of two warpgroups multiply while the other does everything else."""

    barrier: Any  # at which both arrive

    def end(self):
        """Leaves the tensor cores to the other."""
        mosaic.barrier_arrive(self.barrier)

    def wait(self):
        """Waits until the other leaves them."""
        mosaic.barrier_wait(self.barrier)

    def change(self):
        self.end()
        self.wait()


class _Block(NamedTuple):
    """One block of several arrays of columns, in a slot of shared memory."""

    tiles: tuple  # references, `[columns]` or `[columns, D]`
    there: Any  # the barrier at which it arrives
    freed: Any  # the barrier at which warpgroups are done with it

    def wait(self) -> tuple:
        mosaic.barrier_wait(self.there)
        return self.tiles

    def free(self):
        mosaic.barrier_arrive(self.freed)


def _visible(bits, first, plan: _Plan, j):
    """Which rows of a warpgroup see which tokens of block `j`, bool `[ROWS, columns]`.

    Every row sees one interval of the block: of its two frames the first, the second, both or
    neither.

    Args:
      bits: int32 reference `[row frames, column blocks]`, see `Visits`.
      first: the position of the first row.
    """
    tokens = plan.tokens
    frame, edge = first // tokens, (first // tokens + 1) * tokens - first
    column_edge = (j * plan.columns // tokens + 1) * tokens - j * plan.columns

    def interval(frame):
        seen = bits[jnp.minimum(frame, bits.shape[0] - 1), j]
        begin = jnp.where(seen & 1 != 0, 0, column_edge)
        return begin, jnp.where(seen & 2 != 0, plan.columns, column_edge)

    rows, columns = (
        jax.lax.broadcasted_iota(jnp.int32, (ROWS, plan.columns), axis) for axis in (0, 1)
    )
    choose = lambda a, b: jnp.where(rows < edge, a, b)
    begin, end = map(choose, interval(frame), interval(frame + 1))
    return (columns >= begin) & (columns < end)


def _wide(x, shape, dimension: int = 0):
    """A vector along one dimension of a tile."""
    return jax.lax.broadcast_in_dim(x, shape, [dimension])


def _multiply(plan: _Plan, *products, meanwhile=lambda: None) -> tuple:
    """Products of tiles by a warpgroup, float32 in registers, started together.

    Args:
      meanwhile: what to do once they are started, before they are waited for.
      *products: `(a, b, transpose, start)`: a tile in registers or shared memory, one in shared
        memory, whether to take that transposed, and what to add the product to, or None.
    """
    starts = [
        jnp.zeros((a.shape[0], b.shape[0 if transpose else 1]), jnp.float32)
        if start is None
        else start
        for a, b, transpose, start in products
    ]
    if plan.interpret:  # the simulation knows the instruction only in other forms
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        meanwhile()
        return tuple(
            start + dot(a[...], b[...], (((1,), (1 if transpose else 0,)), ((), ())))
            for start, (a, b, transpose, _) in zip(starts, products, strict=True)
        )

    def run(accumulators):
        for accumulator, (a, b, transpose, _) in zip(accumulators, products, strict=True):
            mosaic.wgmma(accumulator, a, mosaic.transpose_ref(b, (1, 0)) if transpose else b)
        meanwhile()

    return tuple(pl.run_state(run)(tuple(map(mosaic.ACC.init, starts))))


def _kernel(
    tables, order, layer, rows, columns, outputs,
    row_tiles, row_there, column_tiles, column_there, column_free, turns,
    *, body, plan: _Plan,
):  # fmt: skip
    """Runs `body` on the rows of each warpgroup, while another brings it the columns.

    Args:
      tables: references to a schedule's.
      order: int32 `[row blocks]`, which to begin with.
      layer: int32 `[1]`, of the arrays of columns.
      rows: arrays `[heads, length]` or `[heads, length, D]`; a tuple, as the next are.
      columns: tuples of such arrays, `[layers * heads, ...]`; those of a tuple arrive together.
      outputs: arrays for what `body` returns.
      row_tiles: shared memory that rows come in by, and outputs go out by.
      column_tiles: shared memory for `plan.slots` blocks of each array of `columns`.
      row_there, column_there, column_free, turns: barriers.
      body: takes the tiles of rows, `visit(step, start)`, and `_Turns`. The second runs
        `step(carry, show, *blocks)` over all visible blocks and returns the last carry;
        `show(x, hidden)` puts `hidden` into a tile where a row does not see a column.
    """
    place, head, group = map(jax.lax.axis_index, ("place", "head", "group"))
    tile = order[place]
    source = layer[0] * outputs[0].shape[0] + head

    def blocks(n):
        slot = jax.lax.rem(n, plan.slots)
        barriers = zip(column_tiles, column_there, column_free, strict=True)
        return [
            _Block(tuple(x.at[slot] for x in tiles), there.at[slot], free.at[slot])
            for tiles, there, free in barriers
        ]

    @pl.when(group == GROUPS)
    def _load():
        mosaic.set_max_registers(40, action="decrease")

        def step(n, _):
            for arrays, block in zip(columns, blocks(n), strict=True):
                pl.when(n >= plan.slots)(lambda block=block: mosaic.barrier_wait(block.freed))

                @pl.when(n < tables.seen[tile])
                def _copy(arrays=arrays, block=block):
                    here = pl.ds(tables.index[tile, n] * plan.columns, plan.columns)
                    for array, slot in zip(arrays, block.tiles, strict=True):
                        mosaic.copy_gmem_to_smem(array.at[source, here], slot, block.there)

        # The last turns only wait until every block has been used.
        jax.lax.fori_loop(0, tables.seen[tile] + plan.slots, step, None)

    @pl.when(group < GROUPS)
    def _attend():
        mosaic.set_max_registers(232, action="increase")
        first = (tile * GROUPS + group) * ROWS
        here = pl.ds(first, ROWS)
        own = [x.at[group] for x in row_tiles]
        for array, slot in zip(rows, own, strict=False):
            mosaic.copy_gmem_to_smem(array.at[head, here], slot, row_there.at[group])
        mosaic.barrier_wait(row_there.at[group])

        def visit(step, start):
            def run(n, carry, whole):
                def show(x, hidden):
                    if whole:
                        return x
                    visible = _visible(tables.bits, first, plan, tables.index[tile, n])
                    return jnp.where(visible, x, hidden)

                return step(carry, show, *blocks(n))

            part = functools.partial
            whole, seen = tables.whole[tile], tables.seen[tile]
            carry = jax.lax.fori_loop(0, whole, part(run, whole=True), start)
            return jax.lax.fori_loop(whole, seen, part(run, whole=False), carry)

        results = body(own, visit, _Turns(turns))
        for result, slot in zip(results, own, strict=False):
            slot[...] = result.astype(slot.dtype)
        mosaic.commit_smem()
        for slot, output in zip(own, outputs, strict=False):
            mosaic.copy_smem_to_gmem(slot, output.at[head, here])
        mosaic.wait_smem_to_gmem(0)


def _call(plan: _Plan, body, mask: Mask, layer, rows, columns, outputs):
    """Runs `_kernel` with `body(plan, ...)`.

    Args:
      mask: bool `[row frames, column frames]`.
      rows, columns, outputs: see `_kernel`, with `[B, N]` or `[L, B, N]` in front; of outputs only
        shapes and dtypes matter.
    """
    batch, heads, length = outputs[0].shape[:3]
    tiles = pl.cdiv(length, GROUPS * ROWS)

    def flat(x):
        """One dimension for layers, batch and heads."""
        if x.ndim > 3:
            return x.reshape(-1, *x.shape[-2:])
        # The hardware cuts off what is copied past the end of rows, but not of single numbers.
        return jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, -x.shape[-1] % (GROUPS * ROWS))))

    rows, columns = jax.tree.map(flat, (tuple(rows), tuple(map(tuple, columns))))
    out_type = [jax.eval_shape(flat, x) for x in outputs]
    if plan.interpret:  # the simulation cuts off nothing
        whole = tiles * GROUPS * ROWS
        out_type = [x.update(shape=(x.shape[0], whole, *x.shape[2:])) for x in out_type]

    def shared(number, tokens, x):
        transforms = (mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128))
        shape = (number, tokens, *x.shape[2:])
        return mosaic.SMEM(shape, x.dtype, transforms=transforms if len(shape) == 3 else ())

    tables = visits(mask, plan.tokens, GROUPS * ROWS, plan.columns)
    tables = Visits(*map(jnp.asarray, tables))
    arrived = lambda number, arrays: mosaic.Barrier(num_barriers=number, num_arrivals=len(arrays))
    in_or_out = itertools.zip_longest(rows, out_type)
    results = mosaic.kernel(
        functools.partial(_kernel, body=functools.partial(body, plan), plan=plan),
        out_type=(tuple(out_type),),
        scratch_types=(
            [shared(GROUPS, ROWS, x if y is None else y) for x, y in in_or_out],
            arrived(GROUPS, rows),
            [[shared(plan.slots, plan.columns, x) for x in arrays] for arrays in columns],
            [arrived(plan.slots, arrays) for arrays in columns],
            [mosaic.Barrier(num_barriers=plan.slots, num_arrivals=GROUPS) for _ in columns],
            mosaic.Barrier(num_arrivals=GROUPS),
        ),
        grid=(batch * heads, tiles),
        grid_names=("head", "place"),  # the last changes fastest
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=mosaic.CompilerParams(
            approx_math=True, lowering_semantics=mosaic.LoweringSemantics.Warpgroup
        ),
        interpret=plan.interpret,
    )(
        tables, jnp.argsort(-tables.seen).astype(jnp.int32), layer, rows, columns,
    )[0]  # fmt: skip
    return tuple(x[:, :length].reshape(batch, heads, length, *x.shape[2:]) for x in results)


def _forward(plan: _Plan, own, visit, turns: _Turns):
    q, _ = own
    width = q.shape[1]
    scale = LOG2_E / math.sqrt(width)

    def step(carry, show, key, value):
        acc, top, total = carry
        keys = key.wait()[0]
        [scores] = _multiply(plan, (q, keys, True, None), meanwhile=turns.change)
        key.free()
        scores = show(scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        decay = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * scale - _wide(new_top, scores.shape))
        total = total * decay + weights.sum(axis=1)
        acc = acc * _wide(decay, acc.shape)
        weights = weights.astype(q.dtype)
        # All of this is done before the other's turn ends, not after.
        acc, total, new_top, weights = jax.lax.optimization_barrier((acc, total, new_top, weights))
        turns.end()
        values = value.wait()[0]
        turns.wait()
        [acc] = _multiply(plan, (weights, values, False, acc))
        value.free()
        return acc, new_top, total

    zeros = jnp.zeros((ROWS, width), jnp.float32)
    start = zeros, jnp.full(ROWS, NOTHING, jnp.float32), jnp.zeros(ROWS, jnp.float32)
    group = jax.lax.axis_index("group")
    pl.when(group == 1)(turns.change)
    acc, top, total = visit(step, start)
    pl.when(group == 0)(turns.change)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    logsumexp = jnp.where(empty, NOTHING, top / LOG2_E + jnp.log(total))
    return acc / _wide(total, acc.shape), logsumexp


def _backward_query(plan: _Plan, own, visit, turns: _Turns):
    q, d_out, norms, deltas = own
    scale = 1 / math.sqrt(q.shape[1])
    norms, deltas = norms[...], deltas[...]

    def step(dq, show, block):
        k, v = block.wait()
        scores, d_weights = _multiply(plan, (q, k, True, None), (d_out, v, True, None))
        shape = scores.shape
        weights = show(jnp.exp2(scores * (scale * LOG2_E) - _wide(norms, shape)), 0.0)
        d_scores = weights * (d_weights - _wide(deltas, shape))
        [dq] = _multiply(plan, (d_scores.astype(q.dtype), k, False, dq))
        block.free()
        return dq

    return (visit(step, jnp.zeros(q.shape, jnp.float32)) * scale,)


def _backward_key(plan: _Plan, own, visit, turns: _Turns):
    k, v = own
    scale = 1 / math.sqrt(k.shape[1])

    def step(carry, show, block):
        dk, dv = carry
        q, d_out, norms, deltas = block.wait()
        # Transposed, [keys, queries], so that the products with dO and q need no transposition.
        [scores] = _multiply(plan, (k, q, True, None))
        shape = scores.shape
        weights = jnp.exp2(scores * (scale * LOG2_E) - _wide(norms[...], shape, 1))
        weights = show(weights, 0.0)
        dv, d_weights = _multiply(
            plan, (weights.astype(k.dtype), d_out, False, dv), (v, d_out, True, None)
        )
        d_scores = weights * (d_weights - _wide(deltas[...], shape, 1))
        [dk] = _multiply(plan, (d_scores.astype(k.dtype), q, False, dk))
        block.free()
        return dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = visit(step, (zeros, zeros))
    return dk * scale, dv


def refusal(q, k, tokens: int) -> str | None:
    """What the kernels take instead of such arrays; None where they take these.

    Args:
      q, k: arrays or shapes of `[..., length, D]`.
      tokens: of a frame.
    """
    if q.shape[-1] not in (64, 128) or q.dtype.itemsize != 2:
        return f"16-bit heads of 64 or 128, got {q.dtype}, {q.shape[-1]}"
    if tokens < LARGEST_BLOCK:  # a block would have tokens of more than two frames
        return f"frames of {LARGEST_BLOCK} tokens or more, got {tokens}"
    lengths = q.shape[-2], k.shape[-2]
    if any(length % 8 for length in lengths):  # the tiling in shared memory
        return f"sequences of multiples of 8 tokens, got {lengths[0]} and {lengths[1]}"
    return None


def forward(q, k, v, mask: Mask, layer, tokens: int, interpret: Any = False):
    """Output and logsumexp, of what there is no `refusal` of.

    Args:
      q: `[B, N, length, D]`.
      k, v: `[L, B, N, length, D]`.
      mask: bool `[query frames, key frames]`.
      layer: int32 `[1]`.
      tokens: of a frame.
      interpret: JAX's `InterpretGPUParams` to simulate the kernel on a CPU.
    """
    plan = _Plan(tokens, columns=LARGEST_BLOCK, slots=2, interpret=interpret)
    outputs = q, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    return _call(plan, _forward, mask, layer, (q,), ((k,), (v,)), outputs)


def backward(q, k, v, logsumexp, delta, d_out, mask: Mask, tokens: int, interpret: Any = False):
    """The gradients with respect to q, k and v.

    Args:
      q, k, v, d_out: `[B, N, length, D]`; d_out is the output's cotangent.
      logsumexp: float32 `[B, N, length]`, of `forward`.
      delta: float32 `[B, N, length]`, rowsum(dO O) - dL, see `pallas_gpu`.
      mask, tokens, interpret: as for `forward`.
    """
    layer = np.zeros(1, np.int32)
    norms = logsumexp * LOG2_E
    plan = _Plan(tokens, columns=LARGEST_BLOCK, slots=2, interpret=interpret)
    rows, columns = (q, d_out, norms, delta), ((k, v),)
    [dq] = _call(plan, _backward_query, mask, layer, rows, columns, (q,))
    plan = _Plan(tokens, columns=64, slots=3, interpret=interpret)
    rows, columns = (k, v), ((q, d_out, norms, delta),)
    return dq, *_call(plan, _backward_key, mask.T, layer, rows, columns, (k, v))
