"""The implementations of attention against the dense reference, and the dispatch between them."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpp.attention import dispatch, notice, pallas_gpu, reference, schedule, xla
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from cfpp.errors import UserError
from tests.attention import compare
from tests.tiny import close


@dataclasses.dataclass(frozen=True)
class Case:
    """One random attention problem."""

    pattern: Pattern
    frames: int
    draws: int
    tokens: int
    head_dim: int

    @property
    def mask(self) -> np.ndarray:
        entries = teacher_forced_entries(self.frames, self.draws)
        return self.pattern.mask(entries, entries)

    def arrays(self):
        """q, k, v and the cotangents of both results."""
        rng = np.random.default_rng(0)
        shape = (2, 2, len(self.mask), self.tokens, self.head_dim)
        draw = lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32))
        return [draw(shape) for _ in range(4)] + [draw(shape[:-1])]


@st.composite
def cases(draw):
    window = draw(st.sampled_from([None, 4, 5]))
    pattern = Pattern(
        chunk=draw(st.integers(1, 3)),
        first_chunk=draw(st.sampled_from([None, 1, 2])),
        window=window,
        sink=draw(st.integers(0, 1)) if window else 0,
    )
    sizes = dict(frames=(1, 7), draws=(0, 2), head_dim=(1, 12))
    tokens = draw(st.sampled_from([1, 3, 8, 23, 40]))
    return Case(pattern, tokens=tokens, **{n: draw(st.integers(*r)) for n, r in sizes.items()})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([(1, 4), (16, 20), (64, 64)]), st.booleans())
def test_blockwise_equals_dense(case, blocks, known_when_traced):
    """Output, logsumexp and all gradients, frames cut and grouped, masks static and not."""
    arrays = case.arrays()

    def run(attend, mask, q, k, v, d_out, d_logsumexp):
        results, pullback = jax.vjp(lambda *qkv: attend(*qkv, mask), q, k, v)
        return results, pullback((d_out, d_logsumexp))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "SMALLEST", blocks[0])
        patch.setattr(xla, "LARGEST", blocks[1])
        if known_when_traced:
            ours = jax.jit(lambda *a: run(xla.attend, case.mask, *a))(*arrays)
        else:
            ours = jax.jit(lambda m, *a: run(xla.attend, m, *a))(case.mask, *arrays)
    theirs = jax.jit(lambda *a: run(reference.attend, case.mask, *a))(*arrays)
    jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize("traced", [False, True])
def test_blockwise_beside_64_bits(traced):
    """Where JAX's integers have 64 bits, blocks of float32 are the same as elsewhere."""
    case = Case(Pattern(window=2), 3, 1, 5, 8)
    qkv, cotangents = case.arrays()[:3], tuple(case.arrays()[3:])
    mask = jnp.asarray(case.mask) if traced else case.mask
    wanted = compare.results(xla.attend, qkv, cotangents, mask)
    with jax.enable_x64(True):
        jax.tree.map(close, compare.results(xla.attend, qkv, cotangents, mask), wanted)
        stacked = (jnp.stack([x, x]) for x in qkv[1:])
        out, _ = jax.jit(xla.attend)(qkv[0], *stacked, mask, layer=1)
    close(out, wanted["out"])


@pytest.mark.parametrize("tokens", [4, 23])
@pytest.mark.parametrize("slots", [5, 6])
def test_blocks_of_a_cache(tokens, slots):
    """Blocks that do not divide the cache's frames, or a frame's tokens, show every token once."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    q = draw(1, 2, 2, tokens, 8)
    k, v = (draw(3, 1, 2, slots, tokens, 8) for _ in range(2))
    mask = rng.random((2, slots)) < 0.7
    arguments = q, k, v, jnp.asarray(mask), jnp.int32(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "LARGEST", 8)
        patch.setattr(xla, "CACHED", 16)
        ours = jax.jit(xla.attend)(*arguments)
    jax.tree.map(close, ours, reference.attend(*arguments))


def test_bfloat16_rounds_no_worse_than_dense():
    """Outputs and gradients lie within twice the rounding error of the dense computation."""
    compare.check(xla.attend, Case(Pattern(), 4, 1, 8, 16).mask, 8, 16, "bfloat16")


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_a_query_that_sees_nothing(name):
    q = k = v = jnp.ones((1, 1, 2, 3, 4))
    mask = np.array([[True, False], [False, False]])
    out, logsumexp = dispatch.choose(name, "cpu")(q, k, v, mask)
    np.testing.assert_array_equal(out[0, 0, 1], 0)
    np.testing.assert_array_equal(logsumexp[0, 0, 1], np.float32(reference.NOTHING))
    close(out[0, 0, 0], np.ones((3, 4)))
    close(logsumexp[0, 0, 0], np.full(3, 2 + np.log(3)))


def test_parts_are_merged():
    """Attention to two sets of keys is attention to them side by side, with its gradients."""
    case = Case(Pattern(), 3, 1, 4, 8)
    q, k, v, d_out, _ = case.arrays()
    past = slice(0, 2), slice(2, None)
    stacked = lambda x: jnp.stack([jnp.zeros_like(x), x])[:, :, :, past[0]]

    def merged(q, k, v):
        parts = [
            (stacked(k), stacked(v), schedule.keep_static(case.mask[:, past[0]]), jnp.int32(1)),
            (k[:, :, past[1]], v[:, :, past[1]], jnp.asarray(case.mask[:, past[1]]), None),
        ]
        return dispatch.attend("xla", q, parts)

    out, pullback = jax.vjp(merged, q, k, v)
    wanted, wanted_pullback = jax.vjp(
        lambda q, k, v: reference.attend(q, k, v, case.mask)[0], q, k, v
    )
    close(out, wanted)
    jax.tree.map(close, pullback(d_out), wanted_pullback(d_out))


@pytest.mark.parametrize("name", ["xla", "pallas_tpu", "pallas_gpu"])
def test_parts_are_merged_in_bfloat16(name):
    """Within twice the rounding error of the dense computation, though parts round one by one."""
    mask = np.array([[True, True, False, True], [True, False, True, True]])
    (q, k, v), _ = compare.inputs(mask, 24, 32, "bfloat16")
    past, own = slice(0, 2), slice(2, None)
    parts = [
        (k[None, :, :, past], v[None, :, :, past], mask[:, past], jnp.int32(0)),
        (k[:, :, own], v[:, :, own], mask[:, own], None),
    ]
    parts = [(k, v, schedule.keep_static(mask), layer) for k, v, mask, layer in parts]
    exact, _ = reference.attend(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    dense, _ = reference.attend(q, k, v, mask)
    error = lambda out: compare.error(out.astype(jnp.float32), exact)
    assert error(dispatch.attend(name, q, parts)) < 2 * error(dense)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16))
def test_schedule_visits_what_is_seen(query_group, key_group, seed):
    """The visited blocks, and the bits in them, spell out the mask; none is visited in vain."""
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 9, 2)) < 0.3
    count, index, bits = schedule.blocks(mask, query_group, key_group)
    found = np.zeros((len(bits), index.shape[1] * key_group), bool)
    for i, n in enumerate(count):
        rows = np.s_[i * query_group : (i + 1) * query_group]
        for j in index[i, :n]:
            seen = bits[rows, j, None] >> np.arange(key_group) & 1
            assert seen.any()
            found[rows, j * key_group : (j + 1) * key_group] = seen
    np.testing.assert_array_equal(found[: mask.shape[0], : mask.shape[1]], mask)
    assert not found[mask.shape[0] :].any() and not found[:, mask.shape[1] :].any()


def test_schedule_is_the_same_at_run_time():
    mask = np.random.default_rng(0).random((5, 7)) < 0.4
    static, traced = schedule.blocks(mask, 2, 3), jax.jit(lambda m: schedule.blocks(m, 2, 3))(mask)
    assert all(isinstance(x, np.ndarray) for x in static)
    jax.tree.map(np.testing.assert_array_equal, static, traced)


def test_misfits():
    q = jnp.zeros((1, 2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4, 8\), got \(1, 2, 3, 5, 8\)"):
        k = jnp.zeros((1, 2, 3, 5, 8))
        dispatch.attend("xla", q, [(k, k, schedule.keep_static(np.ones((3, 3), bool)), None)])
    with pytest.raises(ValueError, match=r"mask of \(3, 2\) does not fit 3 query and 3 key"):
        dispatch.attend("xla", q, [(q, q, schedule.keep_static(np.ones((3, 2), bool)), None)])


@pytest.mark.parametrize(
    ("q", "k", "layer", "message"),
    [
        ((2, 3, 4, 8), (2, 3, 4, 8), None, r"queries have 5 dimensions, got 4: \(2, 3, 4, 8\)"),
        ((1, 2, 3, 4, 8), (2, 3, 4, 8), None, r"keys have 5 dimensions, got 4: \(2, 3, 4, 8\)"),
        ((1, 2, 3, 4, 8), (1, 2, 3, 4, 8), 0, "keys of several layers have 6 dimensions, got 5"),
        ((1, 2, 3, 4, 8), (1, 1, 2, 3, 4, 8), None, "keys have 5 dimensions, got 6"),
        ((0, 2, 3, 4, 8), (0, 2, 3, 4, 8), None, r"got queries of \(0, 2, 3, 4, 8\)"),
        ((1, 2, 3, 0, 8), (1, 2, 3, 0, 8), None, r"got queries of \(1, 2, 3, 0, 8\)"),
        ((1, 2, 3, 4, 8), (1, 2, 0, 4, 8), None, r"got keys of \(1, 2, 0, 4, 8\)"),
        ((1, 2, 3, 4, 8), (0, 1, 2, 3, 4, 8), 0, r"got keys of \(0, 1, 2, 3, 4, 8\)"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "reference", "pallas_gpu"])
def test_arrays_that_cannot_attend(q, k, layer, message, name):
    q, k = jnp.zeros(q), jnp.zeros(k)
    mask = schedule.keep_static(np.ones((q.shape[-3], k.shape[-3]), bool))
    with pytest.raises(ValueError, match=message) as error:
        dispatch.attend(name, q, [(k, k, mask, layer)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", range(3))
def test_integers_do_not_attend(which):
    qkv = [jnp.ones((1, 1, 1, 2, 4), "int8" if i == which else "float32") for i in range(3)]
    name = ("queries", "keys", "values")[which]
    with pytest.raises(ValueError, match=f"takes {name} in floating point, got int8"):
        dispatch.attend("xla", qkv[0], [(*qkv[1:], np.ones((1, 1), bool), None)])


def test_an_implementation_that_there_is_not():
    q = jnp.ones((1, 1, 1, 2, 4))
    with pytest.raises(ValueError, match=r"auto or one of reference, .*tokamax, got flash"):
        dispatch.attend("flash", q, [(q, q, np.ones((1, 1), bool), None)])


@pytest.mark.parametrize(
    ("name", "platform"), [("cudnn", "cpu"), ("pallas_tpu", "gpu"), ("splash", "gpu")]
)
def test_an_implementation_that_the_device_lacks(name, platform):
    with pytest.raises(UserError, match=f"is {name}, which runs on .*has {platform}: use auto"):
        dispatch.choose(name, platform)


def test_kernels_run_on_a_cpu_by_the_interpreter():
    q = jnp.ones((1, 1, 2, 3, 4))
    for name in ("pallas_tpu", "pallas_gpu"):
        out, _ = dispatch.choose(name, "cpu")(q, q, q, np.eye(2, dtype=bool))
        close(out, q)


def test_other_devices_get_plain_jax():
    assert dispatch.choose("reference", "METAL") is reference.attend
    assert dispatch.choose("xla", "METAL") is xla.attend
    assert dispatch.pick("METAL", "float32", 64) == "xla"


@pytest.fixture
def told(capsys):
    """What attention tells, as if it had told nothing so far."""
    dispatch.choose.cache_clear()
    notice.say_once.cache_clear()
    return lambda: capsys.readouterr().err


def test_auto_says_once_what_it_picked(told):
    q = jnp.ones((1, 1, 2, 3, 4))
    for _ in range(2):
        dispatch.attend("auto", q, [(q, q, schedule.keep_static(np.eye(2, dtype=bool)), None)])
    assert told() == "attention: auto is xla, on cpu\n"
    for _ in range(2):
        dispatch.pick("gpu", "bfloat16", 128)
    assert told() == "attention: auto is pallas_gpu, on gpu\n"


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "line"),
    [
        ("gpu", "8.0", "float16", 128, "pallas_gpu, on gpu"),
        ("gpu", "gfx942", "float32", 64, "pallas_gpu, on gpu"),
        ("gpu", None, "bfloat16", 64, "pallas_gpu, on gpu"),
        (
            "gpu",
            "9.0",
            "bfloat16",
            192,
            "xla, on gpu: pallas_gpu takes heads of at most 128, not 192",
        ),
        ("gpu", "9.0", "float64", 64, "xla, on gpu: pallas_gpu does not take float64"),
        (
            "gpu",
            "7.5",
            "float16",
            64,
            "xla, on gpu: pallas_gpu needs compute capability 8.0, not 7.5",
        ),
        ("tpu", None, "bfloat16", 256, "pallas_tpu, on tpu"),
        ("tpu", None, "float16", 64, "xla, on tpu: pallas_tpu does not take float16"),
    ],
)
def test_auto_takes_what_the_kernels_cannot(
    told, monkeypatch, platform, capability, dtype, head_dim, line
):
    device = types.SimpleNamespace()
    if capability is not None:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    name = line.split(",")[0]
    for _ in range(2):
        assert dispatch.pick(platform, dtype, head_dim) == name
    assert told() == f"attention: auto is {line}\n"


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_kernels_take_what_auto_leaves_to_them(name):
    """And no dtype or head besides, or auto would be wrong in leaving it to xla."""
    implementation = dispatch.IMPLEMENTATIONS[name]
    attend = functools.partial(dispatch.choose(name, "cpu"), mask=np.ones((1, 1), bool))
    head_dim = implementation.head_dim or 256
    for dtype in implementation.dtypes:
        x = jax.ShapeDtypeStruct((1, 1, 1, 128, head_dim), dtype)
        jax.eval_shape(attend, x, x, x)
    if implementation.head_dim:
        assert head_dim == pallas_gpu.HEAD_DIM
    if "float16" not in implementation.dtypes:
        x = jax.ShapeDtypeStruct((1, 1, 1, 128, 64), "float16")
        with pytest.raises(ValueError, match="float16"):
            jax.eval_shape(attend, x, x, x)


@pytest.mark.parametrize(("hopper", "kernels"), [(True, "Mosaic"), (False, "Triton")])
def test_the_gpu_kernels_say_once_which_they_are(told, monkeypatch, hopper, kernels):
    monkeypatch.setattr(pallas_gpu, "_is_hopper", lambda: hopper)
    x = jax.ShapeDtypeStruct((1, 1, 1, 128, 64), jnp.bfloat16)
    for _ in range(2):
        attend = lambda *qkv: pallas_gpu.attend(*qkv, np.ones((1, 1), bool))
        jax.eval_shape(attend, x, x, x)
    assert told() == f"attention: pallas_gpu, its kernels for {kernels}\n"


def test_what_a_library_cannot_do_is_done_by_auto(told):
    """A cache beside splash: the same as by the reference, and said once."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 2, 4, 8))
    own = schedule.keep_static(np.eye(2, dtype=bool))
    parts = [(k, v, own, None), (k[None], v[None], jnp.ones((2, 2), bool), jnp.int32(0))]
    for _ in range(2):
        close(dispatch.attend("splash", q, parts), dispatch.attend("reference", q, parts))
    assert told().splitlines() == [
        "attention: splash, and auto where there is a cache, which splash does not take",
        "attention: auto is xla, on cpu",
    ]
