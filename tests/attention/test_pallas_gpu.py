"""The GPU kernels: their numbers in Pallas's interpreter, their lowering for CUDA without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cfpp.attention import pallas_gpu
from cfpp.attention.cache import Cache
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from tests.attention import compare

attend = functools.partial(pallas_gpu.attend, interpret=True)


def teacher_forced(frames: int, **pattern) -> np.ndarray:
    entries = teacher_forced_entries(frames)
    return Pattern(**pattern).mask(entries, entries)


@settings(max_examples=4, deadline=None)
@example(np.array([[0, 0], [0, 1], [0, 0]], bool), 1, 40, False)  # dq and dk cancel
@example(np.array([[0] * 3] * 3 + [[1, 1, 0], [0] * 3], bool), 1, 40, False)  # and the logarithm
@given(
    compare.masks(),
    st.sampled_from([1, 3, 20, 33]),
    st.sampled_from([24, 40, 64]),
    st.booleans(),
)
def test_any_mask(mask, tokens, head_dim, traced):
    compare.check(attend, mask, tokens, head_dim, traced=traced)


@pytest.mark.parametrize(("head_dim", "traced"), [(24, True), (128, False)])
def test_bfloat16(head_dim, traced):
    """Within twice the rounding error of the reference, over blocks seen whole and in part."""
    mask = teacher_forced(3, window=2)
    compare.check(attend, mask, 90, head_dim, "bfloat16", traced)


def test_a_layer_of_many_is_read_in_place():
    compare.check_layer(attend, 20)


def test_what_cannot_be():
    wide = jnp.zeros((1, 1, 1, 4, 160))
    with pytest.raises(ValueError, match="heads of at most 128, got 160"):
        attend(wide, wide, wide, np.ones((1, 1), bool))
    q, k = jnp.zeros((1, 1, 1, 4, 32)), jnp.zeros((1, 1, 1, 4, 32), jnp.bfloat16)
    with pytest.raises(ValueError, match="float32, bfloat16 and bfloat16"):
        attend(q, k, k, np.ones((1, 1), bool))


def cuda_kernels(function, *shapes) -> int:
    """The number of Triton kernels in `function`, lowered for CUDA."""
    [count] = compare.lowered_for_cuda(function, shapes, ["__gpu$xla.gpu.triton"])
    return count


@pytest.mark.parametrize(
    ("heads", "frames", "tokens", "head_dim"),
    [
        (12, 21, 1560, 128),  # Wan 2.1 1.3B
        (40, 21, 1560, 128),  # 14B
        (2, 3, 20, 24),  # frames smaller than a block, heads of other sizes
        (2, 3, 256, 64),
        (2, 3, 256, 80),
        (2, 3, 200, 96),
    ],
)
def test_lowers_for_cuda(heads, frames, tokens, head_dim):
    mask = teacher_forced(frames)
    x = jax.ShapeDtypeStruct((1, heads, 2 * frames, tokens, head_dim), jnp.bfloat16)
    attend = lambda q, k, v: pallas_gpu.attend(q, k, v, mask)
    total = lambda *qkv: sum(jnp.sum(x.astype(jnp.float32)) for x in attend(*qkv))
    assert cuda_kernels(attend, x, x, x) == 1
    assert cuda_kernels(jax.grad(total, (0, 1, 2)), x, x, x) == 3


@pytest.mark.parametrize(
    ("heads", "head_dim"), [(12, 24), (12, 64), (12, 96), (12, 128), (40, 128)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_lowers_for_cuda_against_a_cache(dtype, heads, head_dim):
    layers = 30 if heads == 12 else 40  # Wan 2.1 1.3B and 14B
    cache = jax.eval_shape(lambda: Cache.empty((layers, 1, heads, 21, 1560, head_dim), dtype).key)
    assert cuda_kernels(
        pallas_gpu.attend, jax.ShapeDtypeStruct((1, heads, 2, 1560, head_dim), jnp.bfloat16),
        cache, cache, jax.ShapeDtypeStruct((2, 21), bool), jax.ShapeDtypeStruct((), jnp.int32),
    ) == 1  # fmt: skip
