"""The cache in 8 bits: its rounding, and what that does to attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpp.attention import dispatch, pallas_gpu, pallas_tpu, reference, schedule, xla
from cfpp.attention.cache import LARGEST_VALUES, Cache, Quantised
from cfpp.attention.pattern import Pattern
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
from tests import tiny
from tests.attention import compare

IMPLEMENTATIONS = {
    "xla": xla.attend,
    "pallas_tpu": functools.partial(pallas_tpu.attend, interpret=True),
    "pallas_gpu": functools.partial(pallas_gpu.attend, interpret=True),
}


def allowed(x, dtype):
    """The largest error of each entry, as `cfpp.attention.cache` states it."""
    scale = np.abs(x).max(-1, keepdims=True) / LARGEST_VALUES[dtype]
    rounding = scale / 2 if dtype == "int8" else np.maximum(np.abs(x) / 2**4, scale / 2**10)
    # The quotient and the product are rounded too, by up to 127 * 2**-24 of a whole step each.
    return rounding * (1 + 4e-5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(LARGEST_VALUES)), st.integers(-30, 30), st.integers(0, 2**16))
def test_rounding_is_within_what_is_stated(dtype, exponent, seed):
    """At any size of numbers, and with a wide spread of them within a token."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.standard_normal((2, 3, 16)), exponent + rng.integers(-12, 1, (2, 3, 16)))
    x = x.astype(np.float32)
    x[0, 1] = 0
    quantised = Quantised.of(jnp.asarray(x), dtype)
    assert quantised.dtype == dtype and quantised.scale.shape == (2, 1, 3)
    restored = np.asarray(quantised.restored())
    assert (np.abs(restored - x) <= allowed(x, dtype)).all()
    np.testing.assert_array_equal(restored[0, 1], 0)
    largest = np.abs(x).argmax(-1)[..., None]  # the largest entry of each token is kept
    kept, whole = (np.take_along_axis(y, largest, -1) for y in (restored, x))
    np.testing.assert_allclose(kept, whole, rtol=1e-6)


@pytest.mark.parametrize("dtype", sorted(LARGEST_VALUES))
def test_attention_is_within_what_is_stated(dtype):
    """Outputs and logsumexp against those of the keys and values before they were rounded."""
    mask = np.ones((2, 3), bool)
    (q, k, v), _ = compare.inputs(mask, 40, 24)
    exact, exact_logsumexp = reference.attend(q, k, v, mask)
    rounded = [Quantised.of(x[None], dtype) for x in (k, v)]
    out, logsumexp = reference.attend(q, *rounded, mask, 0)

    dk, dv = (allowed(np.asarray(x), dtype).max() for x in (k, v))
    e = np.abs(q).sum(-1).max() * dk / np.sqrt(24)
    restored = rounded[1].restored()
    spread = restored.max((0, 3, 4)) - restored.min((0, 3, 4))  # of each component of a head
    bound = np.tanh(e / 2) * np.asarray(spread)[:, :, None, None] + dv
    assert (np.abs(logsumexp - exact_logsumexp) <= e).all()
    assert (np.abs(out - exact) <= bound).all()
    assert np.abs(out - exact).max() > 1e-4  # there is an error to bound


@pytest.mark.parametrize("dtype", sorted(LARGEST_VALUES))
@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [3, 40])
def test_implementations_read_the_same_numbers(name, dtype, tokens):
    """Equal to attention to the restored keys and values; one layer of several, masked at run time.

    Float32 sums in another order: a few rounding errors, as in `compare.check`.
    """
    mask = np.array([[True, False, True, True], [False, False, False, False]])
    (q, k, v), _ = compare.inputs(mask, tokens, 24)
    scales = np.linspace(0.1, 4, tokens, dtype=np.float32)[:, None]
    k, v = k * scales, v * scales[::-1]
    held = [Quantised.of(jnp.stack([9 * x, x]), dtype) for x in (k, v)]
    out, logsumexp = jax.jit(IMPLEMENTATIONS[name])(q, *held, jnp.asarray(mask), layer=jnp.int32(1))
    expected, expected_logsumexp = reference.attend(q, *(x.restored()[1] for x in held), mask)
    assert compare.error(out, expected) < 2e-6
    assert compare.error(logsumexp, expected_logsumexp) < 2e-6


@pytest.mark.parametrize("dtype", sorted(LARGEST_VALUES))
def test_frames_are_rounded_as_they_are_written(dtype):
    """A slot holds what its frame rounds to; other slots keep theirs, bit by bit."""
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (2, 1, 2, 1, 5, 8))
    cache = Cache.empty((2, 1, 2, 3, 5, 8), dtype, sink=1)
    for frame in range(5):
        cache = cache.write(jnp.array([frame]), draw(frame), draw(frame + 10))
    np.testing.assert_array_equal(cache.frame, [0, 3, 4])
    for slot, frame in enumerate([0, 3, 4]):
        for held, offset in ((cache.key, 0), (cache.value, 10)):
            new = Quantised.of(draw(frame + offset), dtype)
            kept = jax.tree.map(lambda x, slot=slot: x[:, :, :, slot : slot + 1], held)
            jax.tree.map(np.testing.assert_array_equal, kept, new)


@pytest.mark.parametrize("dtype", sorted(LARGEST_VALUES))
def test_an_empty_cache_is_what_zeros_round_to(dtype):
    shape = (2, 1, 2, 3, 5, 8)
    empty, rounded = Cache.empty(shape, dtype).key, Quantised.of(jnp.zeros(shape), dtype)
    assert empty.dtype == rounded.dtype
    jax.tree.map(np.testing.assert_array_equal, empty, rounded)
    assert empty.scale.dtype == rounded.scale.dtype


@pytest.mark.parametrize(("sink", "frames"), [(0, 4), (3, 1)])
def test_frames_that_do_not_fit(sink, frames):
    cache, new = Cache.empty((1, 1, 1, 3, 2, 4), "float32", sink), jnp.ones((1, 1, 1, frames, 2, 4))
    message = f"{frames} frames do not fit into a cache of 3 slots with a sink of {sink}"
    with pytest.raises(ValueError, match=message):
        cache.write(jnp.arange(frames), new, new)


@pytest.mark.parametrize(("layers", "fits"), [(31, True), (32, False), (64, False), (65, True)])
def test_a_cache_that_triton_would_not_find_all_of(layers, fits):
    """Pallas gives Triton 32-bit offsets into up to 2^32 bytes: only shapes are traced."""
    query = jax.ShapeDtypeStruct((1, 16, 1, 2**11, 128), jnp.bfloat16)
    held = jax.eval_shape(lambda: Cache.empty((layers, 1, 16, 16, 2**11, 128), "int8").key)
    mask = jax.ShapeDtypeStruct((1, 16), bool)
    run = lambda: jax.eval_shape(pallas_gpu.attend, query, held, held, mask, jnp.int32(0))
    if fits:
        assert run()[0].shape == query.shape
        return
    count = layers * 2**26
    with pytest.raises(ValueError, match=f"at most 2147483647 or more than 4294967296.*{count}"):
        run()


def test_no_gradient_through_a_quantised_cache():
    q = jnp.ones((1, 1, 1, 2, 4))
    held = Quantised.of(q[None], "int8")
    parts = [(held, held, schedule.keep_static(np.ones((1, 1), bool)), jnp.int32(0))]
    with pytest.raises(ValueError, match="no gradient is known through a cache in int8"):
        jax.grad(lambda q: dispatch.attend("xla", q, parts).sum())(q)


def test_a_rollout_with_a_quantised_cache_stays_near():
    """All frames, in units of the largest entry, by no more than half a step of the rounding.

    The entries' own keys are not rounded, and errors of many keys average out.
    """

    def rolled_out(cache_dtype):
        net = tiny.network(Pattern(window=4, sink=1), cache_dtype=cache_dtype)
        rollout = Rollout(net, consistency(2, 3.0))
        start = net.dit.cache(2, 4).key.dtype
        rows = np.ones(6, int)
        levels = jnp.asarray(rollout.sampler.sigmas)[rows], jnp.asarray(rollout.sampler.last)[rows]

        @jax.jit
        def run(params):
            given = {"actions": tiny.actions(1)}
            stream = rollout.start(params, tiny.latents(net, 1), given)
            noise, later = tiny.noise_table(net, 7, 2), {"actions": tiny.actions(6)}
            return rollout.unroll(params, stream, later, noise, *levels)[1].x0

        return start, run(tiny.params(net))

    plain, exact = rolled_out("")
    assert plain == jnp.float32
    for dtype, half_step in {"int8": 1 / 254, "float8_e4m3fn": 1 / 16}.items():
        held, rounded = rolled_out(dtype)
        assert held == dtype
        assert (rounded != exact).any()
        tiny.close(rounded, exact, half_step)


def test_a_dtype_that_no_cache_has():
    with pytest.raises(ValueError, match="cache_dtype must be one of '', int8, float8_e4m3fn, got"):
        tiny.network(cache_dtype="int4").dit.check()
