"""Runs implementations of attention on random data, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from cfpp.attention import reference
from cfpp.attention.reference import NOTHING
from cfpp.attention.schedule import keep_static, plain


def lowered_for_cuda(function, shapes, calls) -> list[int]:
    """How often each of `calls`, names of custom calls, is in `function` lowered for an H100."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("gpu",), abstract_device=device)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    with jax.sharding.use_abstract_mesh(mesh):  # JAX 0.11 asks for the device's kind
        exported = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=allowed
        )(*shapes)
    return [exported.mlir_module().count(call) for call in calls]


@st.composite
def masks(draw):
    """Bool `[query frames, key frames]`: any, so frames that see nothing or everything too."""
    queries, keys = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    row = st.lists(st.booleans(), min_size=keys, max_size=keys)
    return np.array(draw(st.lists(row, min_size=queries, max_size=queries)))


def inputs(mask, tokens: int, head_dim: int, dtype="float32", batch: int = 1, heads: int = 2):
    """Random q, k and v, and cotangents of the output and the logsumexp."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((batch, heads, *shape)), dtype)
    q, d_out = (draw(mask.shape[0], tokens, head_dim) for _ in range(2))
    k, v = (draw(mask.shape[1], tokens, head_dim) for _ in range(2))
    return (q, k, v), (d_out, draw(mask.shape[0], tokens).astype(jnp.float32))


def results(attend, qkv, cotangents, mask) -> dict[str, np.ndarray]:
    """Output, logsumexp and the gradients with respect to q, k and v, all float32.

    An implementation without a logsumexp is differentiated by its output alone. A NumPy mask is
    known when `attend` is traced, a JAX mask only at run time.
    """

    @jax.jit
    def run(qkv, cotangents, mask):
        values, pullback = jax.vjp(lambda *qkv: attend(*qkv, plain(mask)), *qkv)
        d_out, d_logsumexp = cotangents
        dq, dk, dv = pullback((d_out, None if values[1] is None else d_logsumexp))
        return {"out": values[0], "logsumexp": values[1], "dq": dq, "dk": dk, "dv": dv}

    values = run(qkv, cotangents, keep_static(mask))
    return {name: np.asarray(x, np.float32) for name, x in values.items() if x is not None}


def error(values: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error, relative to the values expected; those of `NOTHING` must be exact."""
    nothing = expected == NOTHING
    np.testing.assert_array_equal(values == NOTHING, nothing)
    values, expected = np.where(nothing, 0, values), np.where(nothing, 0, expected)
    return np.linalg.norm(values - expected) / max(np.linalg.norm(expected), 1e-30)


def check(
    attend, mask, tokens: int, head_dim: int, dtype="float32", traced: bool = False, heads: int = 2
):
    """Checks outputs and gradients against the dense reference in float32.

    In float32, sums in another order differ by a few rounding errors, 6e-8, of terms that partly
    cancel. In bfloat16, the error may be twice that of the reference itself run in bfloat16.
    """
    qkv, cotangents = inputs(mask, tokens, head_dim, dtype, heads=heads)
    has_logsumexp = jax.eval_shape(lambda *qkv: attend(*qkv, mask)[1], *qkv) is not None
    if not has_logsumexp:
        cotangents = cotangents[0], jnp.zeros_like(cotangents[1])
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, cotangents))
    expected = results(reference.attend, *exact, mask)
    values = results(attend, qkv, cotangents, jnp.asarray(mask) if traced else mask)
    rounded = expected
    if dtype != "float32":
        rounded = results(reference.attend, qkv, cotangents, mask)
    # Where few keys are seen, what cancels may be larger than what is left: in dq and dk terms as
    # large as dv, in the logarithm of a sum terms of 1.
    seen = expected["logsumexp"][expected["logsumexp"] != NOTHING] if has_logsumexp else np.zeros(0)
    terms = dict.fromkeys(("dq", "dk"), np.linalg.norm(expected["dv"]))
    terms["logsumexp"] = np.sqrt(seen.size)
    for name, value in values.items():
        left = np.linalg.norm(seen if name == "logsumexp" else expected[name])
        cancelled = terms.get(name, 0.0) / max(left, 1e-30)
        allowed = 2e-6 * max(1.0, cancelled) + 2 * error(rounded[name], expected[name])
        assert error(value, expected[name]) < allowed, name


def check_layer(attend, tokens: int):
    """Checks that one layer of several is read, and no other, under a mask of run time."""
    mask = np.array([[True, False, True]])
    (q, k, v), _ = inputs(mask, tokens, 24)
    nothing = lambda x: jnp.full_like(x, jnp.nan)
    stacked = (jnp.stack([nothing(x), x, nothing(x)]) for x in (k, v))
    out, logsumexp = jax.jit(attend)(q, *stacked, jnp.asarray(mask), layer=jnp.int32(1))
    expected, expected_logsumexp = reference.attend(q, k, v, mask)
    assert error(out, expected) < 2e-6
    assert error(logsumexp, expected_logsumexp) < 2e-6
