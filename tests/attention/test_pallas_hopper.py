"""The Hopper kernel: its numbers in JAX's simulation of a GPU, its lowering without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from cfpp.attention import pallas_gpu, pallas_hopper, reference
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from tests.attention import compare


def test_simulated():
    """Threads, barriers and copies, over blocks seen whole, in part, past the end and not at all.

    The simulator stops where a barrier's phase is waited for by nobody, or a read finds garbage
    (here: zeros past the end, as in hardware).
    """
    mask = np.array([[True, False, True], [False, False, False]])
    tokens, head_dim = 150, 64
    (q, k, v), _ = compare.inputs(mask, tokens, head_dim, "bfloat16", heads=1)
    flat = lambda x: x.reshape(*x.shape[:-3], -1, head_dim)
    stacked = (jnp.stack([x + 1, x]) for x in (flat(k), flat(v)))
    simulate = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
    out, logsumexp = pallas_hopper.forward(
        flat(q), *stacked, mask, np.ones(1, np.int32), tokens, simulate
    )
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_logsumexp = reference.attend(*exact, mask)
    rounded = compare.error(reference.attend(q, k, v, mask)[0].astype(jnp.float32), expected)
    assert compare.error(out.reshape(q.shape).astype(jnp.float32), expected) < 2 * rounded
    assert compare.error(logsumexp.reshape(q.shape[:-1]), expected_logsumexp) < 2e-6


@pytest.mark.parametrize("heads", [12, 40])
def test_lowers_for_cuda_at_wan_shapes(heads):
    """One Mosaic kernel forward; backward, Triton's two."""
    entries = teacher_forced_entries(21)
    attend = functools.partial(pallas_gpu.attend, mask=Pattern().mask(entries, entries))
    total = lambda *qkv: sum(jnp.sum(x.astype(jnp.float32)) for x in attend(*qkv, backend="mosaic"))
    x = jax.ShapeDtypeStruct((1, heads, 42, 1560, 128), jnp.bfloat16)
    calls = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"
    assert compare.lowered_for_cuda(jax.grad(total, (0, 1, 2)), (x, x, x), calls) == [1, 2]


def test_what_it_does_not_take():
    mask = np.ones((1, 1), bool)
    x = jnp.zeros((1, 1, 1, 128, 96), jnp.bfloat16)
    with pytest.raises(ValueError, match="heads of 64 or 128, got bfloat16, 96"):
        pallas_gpu.attend(x, x, x, mask, backend="mosaic")
    x = jnp.zeros((1, 1, 1, 100, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="frames of 128 tokens or more, got 100"):
        pallas_gpu.attend(x, x, x, mask, backend="mosaic")
