"""The forward pass of `pallas_gpu` for Hopper, by Pallas's Mosaic GPU backend.

One warpgroup loads blocks of keys and values by the tensor memory accelerator, two multiply, each
its own 64 queries, all from the same schedule (warp specialisation, FlashAttention-3, arXiv
2407.08608). What lies past the end of a sequence is read as zeros: so the hardware does it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from cfpp.attention.reference import NOTHING
from cfpp.attention.schedule import Mask
from cfpp.attention.visits import visits

ROWS = 64  # queries of a warpgroup
GROUPS = 2  # that multiply
COLUMNS = 128  # keys of a block
SLOTS = 2  # blocks in shared memory
LOG2E = math.log2(math.e)


def _visible(bits, rows, first, tokens: int, j):
    """Which of a warpgroup's queries see which keys of block `j`, bool `[ROWS, COLUMNS]`.

    Every query sees one interval of the block: of its two frames the first, the second, both or
    neither.

    Args:
      bits: int32 reference `[query frames, key blocks]`, see `Visits`.
      rows: `[ROWS]`, 0, 1, ...
      first: the position of the first query.
    """
    frame, edge = first // tokens, (first // tokens + 1) * tokens - first
    key_edge = (j * COLUMNS // tokens + 1) * tokens - j * COLUMNS

    def interval(frame):
        seen = bits[jnp.minimum(frame, bits.shape[0] - 1), j]
        begin = jnp.where(seen & 1 != 0, 0, key_edge)
        return begin, jnp.where(seen & 2 != 0, COLUMNS, key_edge)

    choose = lambda a, b: jnp.where(rows < edge, a, b)
    begin, end = map(choose, interval(frame), interval(frame + 1))
    shape = (ROWS, COLUMNS)
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    wide = lambda x: jax.lax.broadcast_in_dim(x, shape, [0])
    return (columns >= wide(begin)) & (columns < wide(end))


def _multiply(a, b, transpose: bool, interpret: bool):
    """The product of two tiles by a warpgroup, float32 in registers.

    Args:
      a: a tile, in registers or shared memory; b: one in shared memory.
      transpose: whether to take b transposed.
      interpret: whether in JAX's simulation, which knows the instruction only in other forms.
    """
    if interpret:
        dimensions = (((1,), (1 if transpose else 0,)), ((), ()))
        return jax.lax.dot_general(a[...], b[...], dimensions, preferred_element_type=jnp.float32)

    def run(accumulator):
        mosaic.wgmma(accumulator, a, mosaic.transpose_ref(b, (1, 0)) if transpose else b)
        return accumulator[...]

    shape = a.shape[0], b.shape[0 if transpose else 1]
    return pl.run_scoped(run, mosaic.ACC(shape, jnp.float32))


def _kernel(
    index, whole, seen, bits, layer, q, k, v, out, logsumexp,
    q_tile, k_tiles, v_tiles, norms, q_there, k_there, v_there, k_free, v_free,
    *, tokens: int, heads: int, interpret: bool
):  # fmt: skip
    tile, head, group = map(jax.lax.axis_index, ("tile", "head", "group"))
    source = layer[0] * heads + head
    slot = lambda n: jax.lax.rem(n, SLOTS)

    @pl.when(group == GROUPS)
    def _load():
        mosaic.set_max_registers(40, action="decrease")

        def step(n, _):
            for array, tiles, there, free in (
                (k, k_tiles, k_there, k_free),
                (v, v_tiles, v_there, v_free),
            ):
                pl.when(n >= SLOTS)(lambda free=free: mosaic.barrier_wait(free.at[slot(n)]))

                @pl.when(n < seen[tile])
                def _copy(array=array, tiles=tiles, there=there):
                    block = array.at[source, pl.ds(index[tile, n] * COLUMNS, COLUMNS)]
                    mosaic.copy_gmem_to_smem(block, tiles.at[slot(n)], there.at[slot(n)])

        # The last turns only wait until every block has been used.
        jax.lax.fori_loop(0, seen[tile] + SLOTS, step, None)

    @pl.when(group < GROUPS)
    def _attend():
        mosaic.set_max_registers(232, action="increase")
        first = (tile * GROUPS + group) * ROWS
        here = pl.ds(first, ROWS)
        own = q_tile.at[group]
        mosaic.copy_gmem_to_smem(q.at[head, here], own, q_there.at[group])
        mosaic.barrier_wait(q_there.at[group])
        width = q.shape[-1]
        scale = LOG2E / math.sqrt(width)
        rows = jax.lax.broadcasted_iota(jnp.int32, (ROWS,), 0)
        wide = lambda x, like: jax.lax.broadcast_in_dim(x, like.shape, [0])

        def step(n, carry, whole):
            acc, top, total = carry
            mosaic.barrier_wait(k_there.at[slot(n)])
            scores = _multiply(own, k_tiles.at[slot(n)], True, interpret) * scale
            mosaic.barrier_arrive(k_free.at[slot(n)])
            if not whole:
                visible = _visible(bits, rows, first, tokens, index[tile, n])
                scores = jnp.where(visible, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1))
            decay = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - wide(new_top, scores))
            total = total * decay + weights.sum(axis=1)
            mosaic.barrier_wait(v_there.at[slot(n)])
            weights = weights.astype(q.dtype)
            values = _multiply(weights, v_tiles.at[slot(n)], False, interpret)
            mosaic.barrier_arrive(v_free.at[slot(n)])
            return acc * wide(decay, acc) + values, new_top, total

        zeros = jnp.zeros((ROWS, width), jnp.float32)
        carry = zeros, jnp.full(ROWS, NOTHING, jnp.float32), jnp.zeros(ROWS, jnp.float32)
        carry = jax.lax.fori_loop(0, whole[tile], functools.partial(step, whole=True), carry)
        acc, top, total = jax.lax.fori_loop(
            whole[tile], seen[tile], functools.partial(step, whole=False), carry
        )
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        own[...] = (acc / wide(total, acc)).astype(q.dtype)
        norms.at[group][...] = jnp.where(empty, NOTHING, top / LOG2E + jnp.log(total))
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(own, out.at[head, here])
        mosaic.copy_smem_to_gmem(norms.at[group], logsumexp.at[head, here])
        mosaic.wait_smem_to_gmem(0)


def forward(q, k, v, mask: Mask, layer, tokens: int, interpret: Any = False):
    """Output and logsumexp.

    Args:
      q: `[B, N, length, D]`.
      k, v: `[L, B, N, length, D]`.
      mask: bool `[query frames, key frames]`.
      layer: int32 `[1]`.
      tokens: of a frame.
      interpret: JAX's `InterpretGPUParams` to simulate the kernel on a CPU.

    Raises:
      ValueError: the kernel does not take such heads or frames.
    """
    width = q.shape[-1]
    if width not in (64, 128) or q.dtype.itemsize != 2:
        raise ValueError(f"Mosaic's kernel takes 16-bit heads of 64 or 128, got {q.dtype}, {width}")
    if tokens < COLUMNS:  # a block would have tokens of more than two frames
        raise ValueError(f"Mosaic's kernel takes frames of {COLUMNS} tokens or more, got {tokens}")
    tables = visits(mask, tokens, GROUPS * ROWS, COLUMNS)
    flat = lambda x: x.reshape(-1, *x.shape[-2:])
    batch, heads, length = q.shape[:3]
    outer, tiles = batch * heads, pl.cdiv(length, GROUPS * ROWS)
    shared = lambda *shape: mosaic.SMEM(
        shape,
        q.dtype,
        transforms=(mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)),
    )
    arrived = lambda number: mosaic.Barrier(num_barriers=number)
    freed = lambda number: mosaic.Barrier(num_barriers=number, num_arrivals=GROUPS)
    call = mosaic.kernel(
        functools.partial(_kernel, tokens=tokens, heads=outer, interpret=bool(interpret)),
        # Filled up to whole tiles, so that every store is aligned and inside.
        out_type=(
            jax.ShapeDtypeStruct((outer, tiles * GROUPS * ROWS, width), q.dtype),
            jax.ShapeDtypeStruct((outer, tiles * GROUPS * ROWS), jnp.float32),
        ),
        scratch_types=(
            shared(GROUPS, ROWS, width),
            shared(SLOTS, COLUMNS, width),
            shared(SLOTS, COLUMNS, width),
            mosaic.SMEM((GROUPS, ROWS), jnp.float32),
            arrived(GROUPS),
            arrived(SLOTS),
            arrived(SLOTS),
            freed(SLOTS),
            freed(SLOTS),
        ),
        grid=(tiles, outer),
        grid_names=("tile", "head"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=mosaic.CompilerParams(
            approx_math=True, lowering_semantics=mosaic.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    out, logsumexp = call(*map(jnp.asarray, tables), layer, flat(q), flat(k), flat(v))
    return tuple(
        x[:, :length].reshape(batch, heads, length, *x.shape[2:]) for x in (out, logsumexp)
    )
