"""The GPU kernels on a GPU, where the tests run on one.

JAX_PLATFORMS=cuda python -m pytest -q tests/attention/test_on_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp.attention import cache, pallas_gpu, reference
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from tests.attention import compare

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")

BACKENDS = {
    backend: functools.partial(pallas_gpu.attend, backend=backend)
    for backend in ("triton", "mosaic")
}


@pytest.fixture(params=BACKENDS)
def attend(request):
    if request.param == "mosaic" and jax.devices()[0].compute_capability != "9.0":
        pytest.skip("Mosaic's kernels are for Hopper")
    with jax.default_matmul_precision("highest"):
        yield BACKENDS[request.param]


def teacher_forced(frames: int, **pattern) -> np.ndarray:
    entries = teacher_forced_entries(frames)
    return Pattern(**pattern).mask(entries, entries)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [128, 152, 392, 1560])
def test_teacher_forced(attend, tokens, head_dim):
    compare.check(attend, teacher_forced(3), tokens, head_dim, "bfloat16")


@pytest.mark.parametrize("seed", range(4))
def test_any_mask_of_run_time(attend, seed):
    rng = np.random.default_rng(seed)
    mask, tokens = rng.random((3, 5)) < 0.5, 8 * int(rng.integers(16, 60))
    compare.check(attend, mask, tokens, 128, "bfloat16", traced=True)


@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_small_frames_in_float32(tokens):
    with jax.default_matmul_precision("highest"):
        compare.check(pallas_gpu.attend, teacher_forced(4, window=2), tokens, 40)


def test_the_backend_is_chosen_by_what_it_takes():
    for tokens in (150, 152):
        compare.check(pallas_gpu.attend, teacher_forced(2), tokens, 64, "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_a_layer_of_a_cache(attend, dtype):
    """Against the reference on the same rounded keys and values."""
    mask = np.array([[True] * 5 + [False], [True] * 6])
    (q, k, v), _ = compare.inputs(mask, 1560, 128, "bfloat16")
    stacked = [jnp.stack([jnp.full_like(x, 7), x]) for x in (k, v)]
    if dtype != "bfloat16":
        stacked = [cache.Quantised.of(x, dtype) for x in stacked]
    layer = jnp.int32(1)
    out, logsumexp = jax.jit(attend)(q, *stacked, jnp.asarray(mask), layer=layer)
    expected = reference.attend(q, *stacked, mask, layer)
    assert compare.error(np.float32(out), np.float32(expected[0])) < 1e-2  # of bfloat16
    assert compare.error(logsumexp, expected[1]) < 1e-3


def test_gradients_are_the_same_in_every_run(attend):
    mask = teacher_forced(2)
    qkv, cotangents = compare.inputs(mask, 392, 128, "bfloat16")
    first, second = (compare.results(attend, qkv, cotangents, mask) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
