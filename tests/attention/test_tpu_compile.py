"""The TPU kernels through the real TPU compiler, without a TPU: layouts and memory must fit."""

import importlib.util
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cfpp.attention import library, pallas_tpu
from cfpp.attention.cache import Cache
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from cfpp.parallel import topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)

HEADS = PartitionSpec(None, "heads")
STACKED_HEADS = PartitionSpec(None, None, "heads")
EVERYWHERE = PartitionSpec()


@pytest.fixture(autouse=True, scope="module")
def environment():
    with mock.patch.dict(os.environ):
        topology.prepare_environment()
        yield


def kernels(name: str, function, arguments, out_specs) -> list[str]:
    """Compiles `function` for a topology, heads over devices; the kernels that it calls.

    Args:
      arguments: (shape, dtype, PartitionSpec) of each, or a pytree of these.
    """
    mesh = Mesh(np.array(topology.devices(name)), ("heads",))
    of_each = lambda function: jax.tree.map(
        lambda array: function(*array),
        tuple(arguments),
        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[-1], PartitionSpec),
    )
    shapes = of_each(
        lambda shape, dtype, spec: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, spec)
        )
    )
    specs = of_each(lambda shape, dtype, spec: spec)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
    )
    program = jax.jit(mapped).lower(*shapes).compile().as_text()
    return sorted(
        kernel
        for kernel in ("attention_forward", "attention_dq", "attention_dkv")
        for line in program.splitlines()
        if "tpu_custom_call" in line and kernel in line.split("=")[0]
    )


def gradients(mask):
    def run(q, k, v, d_out, d_logsumexp):
        _, pullback = jax.vjp(lambda *qkv: pallas_tpu.attend(*qkv, mask), q, k, v)
        return pullback((d_out, d_logsumexp))

    return run


@pytest.mark.parametrize(
    ("name", "heads", "frames", "tokens", "head_dim"),
    [
        ("v5e:2x2", 12, 21, 1560, 128),  # Wan 2.1 1.3B
        ("v5p:2x2x1", 12, 21, 1560, 128),
        ("v6e:2x2", 12, 21, 1560, 128),
        ("tpu7x:2x2x1", 40, 21, 1560, 128),  # 14B
        ("v5e:2x2", 8, 4, 24, 24),  # several frames a block, masked inside
        ("v6e:2x2", 8, 4, 256, 64),  # heads of other sizes
        ("v5p:2x2x1", 8, 4, 40, 80),
        ("tpu7x:2x2x1", 8, 4, 40, 96),
        ("v5e:2x2", 8, 4, 1667, 128),  # blocks that do not fill a frame
    ],
)
def test_training_compiles(name, heads, frames, tokens, head_dim, dtype=jnp.bfloat16):
    entries = teacher_forced_entries(frames)
    shape = (1, heads, 2 * frames, tokens, head_dim)
    x, statistic = (shape, dtype, HEADS), (shape[:-1], jnp.float32, HEADS)
    run = gradients(Pattern().mask(entries, entries))
    found = kernels(name, run, [x, x, x, x, statistic], (HEADS, HEADS, HEADS))
    assert found == ["attention_dkv", "attention_dq", "attention_forward"]


def test_training_compiles_with_wide_heads_in_float32():
    """Where blocks of as many tokens as narrower heads have do not fit the chip."""
    test_training_compiles("v5e:2x2", 4, 4, 1560, 256, jnp.float32)


def test_splash_compiles():
    """With a mask that its kernels compute."""
    entries = teacher_forced_entries(3)
    mask = Pattern().mask(entries, entries)
    total = lambda *qkv: library.splash(*qkv, mask)[0].astype(jnp.float32).sum()
    sharding = SingleDeviceSharding(topology.devices("v5e:2x2")[0])
    x = jax.ShapeDtypeStruct((1, 2, 6, 200, 128), jnp.bfloat16, sharding=sharding)
    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile().as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"%splash_mha_{kernel}" in program


@pytest.mark.parametrize(
    ("name", "heads", "queries", "tokens", "head_dim", "dtype"),
    [
        ("v5e:2x2", 12, 2, 1560, 128, "bfloat16"),  # Wan 2.1 1.3B
        ("v5e:2x2", 12, 2, 1560, 128, "float8_e4m3fn"),
        ("v5p:2x2x1", 40, 1, 1560, 128, "int8"),  # 14B
        ("v6e:2x2", 12, 1, 1560, 128, "int8"),
        ("tpu7x:2x2x1", 40, 1, 1560, 128, "float8_e4m3fn"),
        ("v5e:2x2", 12, 1, 1667, 128, "int8"),
        ("v5e:2x2", 8, 1, 256, 64, "int8"),
        ("v6e:2x2", 8, 1, 256, 96, "float8_e4m3fn"),
        ("v5p:2x2x1", 8, 2, 256, 24, "bfloat16"),
    ],
)
def test_attention_to_a_cache_compiles(name, heads, queries, tokens, head_dim, dtype):
    """Against 21 slots, of which those that are filled are known at run time."""
    shape = 30, 1, heads, 21, tokens, head_dim
    cache = jax.tree.map(
        lambda x: (x.shape, x.dtype, STACKED_HEADS),
        jax.eval_shape(lambda: Cache.empty(shape, dtype).key),
    )
    arguments = [
        ((1, heads, queries, tokens, head_dim), jnp.bfloat16, HEADS), cache, cache,
        ((queries, 21), bool, EVERYWHERE), ((), jnp.int32, EVERYWHERE),
    ]  # fmt: skip
    found = kernels(name, pallas_tpu.attend, arguments, (HEADS, HEADS))
    assert found == ["attention_forward"]
