"""The Hopper kernels: their numbers in JAX's simulation of a GPU, their lowering without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from cfpp.attention import pallas_gpu, reference
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from tests.attention import compare

# The simulator stops where a barrier's phase is waited for by nobody, or a read finds garbage
# (here: zeros past the end, as in hardware).
SIMULATOR = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")


simulated = functools.partial(pallas_gpu.attend, backend="mosaic", interpret=SIMULATOR)


def test_simulated():
    """Threads, barriers and copies; blocks seen whole, in part, past the end and not at all."""
    mask = np.array([[True, False, True], [False, False, False]])
    compare.check(simulated, mask, 152, 64, "bfloat16", heads=1)


@pytest.mark.slow  # the simulator compiles every thread of every block of rows anew
@pytest.mark.parametrize("seed", range(3))
def test_any_mask(seed):
    rng = np.random.default_rng(seed)
    mask, tokens = rng.random((2, 3)) < 0.6, 8 * int(rng.integers(16, 25))
    compare.check(simulated, mask, tokens, 128, "bfloat16", traced=True, heads=1)


def test_a_layer_of_many_is_read_in_place():
    mask = np.array([[True, False, True]])
    (q, k, v), _ = compare.inputs(mask, 128, 64, "bfloat16", heads=1)
    nothing = lambda x: jnp.full_like(x, jnp.nan)
    stacked = [jnp.stack([nothing(x), x]) for x in (k, v)]
    out, logsumexp = simulated(q, *stacked, jnp.asarray(mask), layer=jnp.int32(1))
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_logsumexp = reference.attend(*exact, mask)
    rounded = compare.error(reference.attend(q, k, v, mask)[0].astype(jnp.float32), expected)
    assert compare.error(out.astype(jnp.float32), expected) < 2 * rounded
    assert compare.error(logsumexp, expected_logsumexp) < 2e-6


@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (40, 128), (12, 64)])
def test_lowers_for_cuda_at_wan_shapes(heads, head_dim):
    """One kernel forward, two backward, none of them Triton's."""
    entries = teacher_forced_entries(21)
    attend = functools.partial(pallas_gpu.attend, mask=Pattern().mask(entries, entries))
    total = lambda *qkv: sum(jnp.sum(x.astype(jnp.float32)) for x in attend(*qkv, backend="mosaic"))
    x = jax.ShapeDtypeStruct((1, heads, 42, 1560, head_dim), jnp.bfloat16)
    calls = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"
    assert compare.lowered_for_cuda(jax.grad(total, (0, 1, 2)), (x, x, x), calls) == [3, 0]


@pytest.mark.parametrize(("layers", "heads"), [(30, 12), (40, 40)])
def test_lowers_for_cuda_against_a_cache(layers, heads):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    cache = shape(layers, 1, heads, 21, 1560, 128)
    shapes = (
        shape(1, heads, 2, 1560, 128), cache, cache,
        jax.ShapeDtypeStruct((2, 21), bool), jax.ShapeDtypeStruct((), jnp.int32),
    )  # fmt: skip
    attend = functools.partial(pallas_gpu.attend, backend="mosaic")
    assert compare.lowered_for_cuda(attend, shapes, ["mosaic_gpu_v2"]) == [1]


def test_what_it_does_not_take():
    mask = np.ones((1, 1), bool)
    x = jnp.zeros((1, 1, 1, 128, 96), jnp.bfloat16)
    with pytest.raises(ValueError, match="heads of 64 or 128, got bfloat16, 96"):
        pallas_gpu.attend(x, x, x, mask, backend="mosaic")
    x = jnp.zeros((1, 1, 1, 150, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="multiples of 8 tokens, got 150 and 150"):
        pallas_gpu.attend(x, x, x, mask, backend="mosaic")
    x = jnp.zeros((1, 1, 1, 100, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="frames of 128 tokens or more, got 100"):
        pallas_gpu.attend(x, x, x, mask, backend="mosaic")
